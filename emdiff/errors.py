"""What a user can mend."""


class UsageError(Exception):
    """Bad input: a file, a value or a combination of options that the user can correct.

    The message is one line that names the file or option, the value found there, and what to do instead. The command line prints it
    without a traceback and exits with status 2; any other exception is a defect of the program.

    >>> str(UsageError("data.npz: noise_std is 0; pass --noise-std with a positive standard deviation"))
    'data.npz: noise_std is 0; pass --noise-std with a positive standard deviation'
    """
