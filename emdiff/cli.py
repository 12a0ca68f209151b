"""The command line: `emdiff observe | fit | train | sample | denoise | reconstruct | evaluate | report | check-observer`.

train, sample and denoise are in cli_prior. Torch is imported when a command runs: --help is quick.
"""

import errno
import os
import re
import sys
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Literal, NoReturn, Optional, Union

from jsonargparse import ArgumentParser, auto_parser, get_loader, set_loader
from yaml import YAMLError

from emdiff.checks import at_least, positive, suffix
from emdiff.cli_prior import denoise, sample, train
from emdiff.errors import LOST, FitFailed, Lost, UsageError
from emdiff.interrupt import Stopped, last_work, listening
from emdiff.launch import launch, launched
from emdiff.reading import check_configs, guarded
from emdiff.settings import TrainSettings, WalkSettings
from observers.instruments import Recipe, identity
from observers.noise_recipes import NoiseRecipe, level

Device = Literal["auto", "cpu", "cuda"]

set_loader("yaml", guarded(get_loader("yaml")), (YAMLError,))


def observe(
    data: str,
    noise_std: float,
    out: str,
    observer: Recipe = identity(),
    noise: NoiseRecipe = level(),
    count: Optional[int] = None,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Make observations of clean data: obs = A x + n. The truth is stored next to them, for evaluation only.

    Args:
        data: Clean data, .npz, .npy or .h5; uint8 images become [0, 1].
        noise_std: Standard deviation of n, in the units of the data; of counts that of their read-out, which may be 0.
        out: File to write, .npz or .h5, or a folder of .npy files (FOLDER/).
        observer: How A is drawn: identity, mask, projection, blur, downsample, fourier, multicoil, radon, compressed, compose, stack,
            mixed; --observer.help mask tells what can be set.
        noise: How the law of n is drawn about noise_std: level (one for all), per_datum, per_entry, low_rank, stationary or counts;
            --noise.help per_datum tells what can be set.
        count: Take the first so many data; all by default.
        seed: Seed of masks and noise.
        device: Accepted for uniformity; observing runs on the CPU.
    """
    if noise_std != 0 or not noise.without_readout:
        positive("--noise-std", noise_std)
    suffix("--out", out, (".npz", ".h5", ".hdf5", "/"))
    from emdiff.commands_observe import observe_command

    observe_command(Path(data), observer, noise, noise_std, count, Path(out), seed)


def fit(
    observations: str,
    out: Optional[str] = None,
    iters: int = 10,
    start: Literal["auto", "mixture", "gaussian", "self-supervised"] = "auto",
    guidance: Literal["auto", "fused", "cg", "gmres"] = "auto",
    relax: Optional[int] = None,
    strata: Optional[bool] = None,
    init_prior: Optional[str] = None,
    stop: Literal["never", "auto"] = "never",
    observer: Optional[str] = None,
    noise_std: Optional[Union[float, Literal["auto"]]] = None,
    shape: Optional[list[int]] = None,
    uint8_range: bool = False,
    seed: int = 0,
    device: Device = "auto",
    devices: int = 1,
    compile: bool = False,
    wandb: Literal["auto", "online", "offline", "off"] = "auto",
    fork: Optional[str] = None,
    keep: Optional[int] = None,
    walk: WalkSettings = WalkSettings(),
    train: TrainSettings = TrainSettings(),
) -> None:
    """Learn a prior from observations; running the same command again continues it.

    Args:
        observations: File of observations, .npz or .h5, or a folder of .npy files; it may be larger than memory.
        out: Run folder. Unset: runs/NAME-HASH of the observations and the settings, so that the same command finds its run again.
        iters: EM iterations; more than a finished run has continues it.
        start: Where EM starts from; auto says which it took and why.
        guidance: How observations guide walks; auto says which it took and why.
        relax: Last iteration that may over-relax (jumps, re-noised: fast but biased), which happens only where the last samples spread more
            than the data, as estimated from the observations, or lie closer to the observations than the noise explains. 0: exact iterations
            only. Unset: no limit where one of these can be told, else 0.
        strata: In exact iterations, take out of the samples of images the variance that the observations object to, stratum by stratum of how much
            the prior lets an entry vary: less grain in dark pixels (docs/method.md). Unset: of images, under fused guidance and known noise.
        init_prior: A prior.safetensors to start from, such as one of `emdiff train`, in place of `start`; its scale of the data is taken too.
        stop: auto ends the fit when the figures that need no truth (chi2, and the agreement of re-observed prior samples with the observations)
            have not improved for three iterations; either way the run's prior for later commands is that of the best iteration with auto, of
            the last with never.
        observer: Name of the observer, or module:Class, or path/file.py:Class, if the file does not hold it or holds another.
        noise_std: Noise level in the units of the observations, likewise; auto estimates one for all entries, and EM updates it.
        shape: Shape of x, likewise.
        uint8_range: Accept uint8 observations and divide them by 255.
        seed: Seed of everything random.
        device: cpu, cuda, or whichever is there.
        devices: Processes on this machine that fit together, one GPU each, or sharing the processor's threads; torchrun and SLURM: docs/scaling.md.
        compile: Run the network of the E-step through torch.compile; pays where an E-step takes minutes (docs/speed.md).
        wandb: Weights & Biases: auto is online where you are logged in, else offline.
        fork: New run folder, to which the finished rounds of --out are copied; the fit goes on there under the settings of this command.
        keep: Keep priors, samples and pictures of the last so many rounds only, and of the best; figures are kept of all. Unset: all rounds.
        walk: The E-step.
        train: The M-step.
    """
    config = _plain(locals())
    with listening():
        from emdiff.commands_fit import fit_command

        at_least("--iters", iters, 1)
        at_least("--devices", devices, 1)
        at_least("--keep", 1 if keep is None else keep, 1)
        if fork is not None and out is None:
            raise UsageError(f"--fork {fork}: say with --out which run to fork")
        fit_command(config, _plain({name: parameter.default for name, parameter in signature(COMMANDS["fit"]).parameters.items()}), fork)


def reconstruct(
    run: str,
    observations: str,
    samples: int = 4,
    out: str = "reconstructions.npz",
    observer: Optional[str] = None,
    noise_std: Optional[float] = None,
    shape: Optional[list[int]] = None,
    uint8_range: bool = False,
    seed: int = 0,
    device: Device = "auto",
    compile: bool = False,
) -> None:
    """Sample x | obs for every observation of a file, under a run's prior; writes samples, mean and std, and a picture.

    Args:
        run: Run folder of `emdiff fit`.
        observations: File of observations, not necessarily the ones the run learned from.
        samples: Posterior samples per observation, at least 2 for a std.
        out: File to write, .npz, .h5 or a folder (FOLDER/), with samples (N, samples, *S), mean and std (N, *S).
        observer: Name of the observer, if the file does not hold it.
        noise_std: Noise level, if the file does not hold it; unset, that of the run if it has estimated one.
        shape: Shape of x, if the file does not hold it.
        uint8_range: Accept uint8 observations and divide them by 255.
        seed: Seed.
        device: Where to run.
        compile: Run the network through torch.compile; pays from some minutes of sampling on, and with fused guidance only.
    """
    from emdiff.commands import reconstruct_command
    from emdiff.observations import open_observations
    from emdiff.posterior import run_level

    at_least("--samples", samples, 2)
    suffix("--out", out, (".npz", ".h5", ".hdf5", "/"))
    data = open_observations(Path(observations), observer, noise_std or run_level(Path(run)), tuple(shape) if shape else None, uint8_range)
    reconstruct_command(Path(run), data, samples, Path(out), seed, device, compile)


def evaluate(
    run: str,
    observations: str,
    truth: Optional[str] = None,
    samples: int = 16,
    count: Optional[int] = None,
    prior_samples: int = 1000,
    oracle: Optional[str] = None,
    features: str = "random-conv-64",
    out: Optional[str] = None,
    observer: Optional[str] = None,
    noise_std: Optional[float] = None,
    shape: Optional[list[int]] = None,
    uint8_range: bool = False,
    seed: int = 0,
    device: Device = "auto",
    wandb: Optional[Literal["auto", "online", "offline", "off"]] = None,
) -> None:
    """Say whether a fit can be believed, without clean data; and with them, how far it is from the best possible.

    Args:
        run: Run folder of `emdiff fit`.
        observations: File of observations, those of the fit or others of the same kind.
        truth: File of the clean data behind them, in the same order. Unset: the truth in the file of observations, if there is one.
        samples: Posterior samples per observation, at least 4.
        count: Evaluate the first so many observations. Unset: all, or where their samples would exceed 1 GB a random subset that does not.
        prior_samples: Prior samples.
        oracle: A prior.safetensors, such as one trained on clean data; every figure is also given as a ratio to that prior's.
        features: Feature module for Frechet and kernel distances: random-conv-64, or trust:FILE, a TorchScript file that maps images to
            vectors. Such a file is a program: name only one whose maker you trust.
        out: Folder to write metrics.json and arrays.npz. Unset: RUN/evaluation.
        observer: Name of the observer, if the file does not hold it.
        noise_std: Noise level, if the file does not hold it; unset, that of the run if it has estimated one.
        shape: Shape of x, if the file does not hold it.
        uint8_range: Accept uint8 observations and divide them by 255.
        seed: Seed.
        device: Where to run.
        wandb: Log the figures to the W&B run of the fit as eval/NAME, with calibration tables and the report. Unset: as the fit did.
    """
    from emdiff.commands import evaluate_command
    from emdiff.observations import open_observations
    from emdiff.posterior import run_level

    at_least("--samples", samples, 4)
    at_least("--prior-samples", prior_samples, 2)
    data = open_observations(Path(observations), observer, noise_std or run_level(Path(run)), tuple(shape) if shape else None, uint8_range)
    if count is not None and not 2 <= count <= len(data):
        raise UsageError(f"--count is {count}; {observations} holds {len(data)} observations, give 2 to {len(data)}")
    evaluate_command(
        Path(run), Path(observations), data, count, Path(truth or observations), truth is not None, samples, prior_samples,
        Path(oracle) if oracle else None, features, Path(out) if out else Path(run) / "evaluation", seed, device, wandb,
    )  # fmt: skip


def report(run: str, out: Optional[str] = None, pdf: Optional[str] = None) -> None:
    """Write a page on a run: figures over iterations, pictures, the evaluation if there is one. One file that works offline.

    Args:
        run: Run folder of `emdiff fit`.
        out: File to write, .html; report.html in the run folder by default.
        pdf: Print the page to this .pdf too; needs Chromium.
    """
    suffix("--out", out or "report.html", (".html",))
    suffix("--pdf", pdf or "report.pdf", (".pdf",))
    from emdiff.printing import find_browser, write_pdf
    from emdiff.report import write_report

    browser = find_browser() if pdf else ""
    page = write_report(Path(run), Path(out) if out else None)
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB); open it in a browser")
    if pdf:
        print(f"printed: {write_pdf(page, Path(pdf), browser)}")


def _plain(settings: dict) -> dict:
    """Settings of a fit as plain values, without --fork, which is no setting of the run it makes."""
    return {name: asdict(value) if name in ("walk", "train") else value for name, value in settings.items() if name != "fork"}


def check_observer(
    name: str,
    observations: Optional[str] = None,
    shape: Optional[list[int]] = None,
    count: int = 8,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Check that an observer keeps its contract: exact adjoint, linear, each datum alone. The last line is one JSON object.

    Exit status 0: it does; 1: it does not; 2: it cannot be checked.

    Args:
        name: A built-in name, module:Class, or path/file.py:Class; may stand without --name.
        observations: A file that holds the observer's arrays. Unset: random ones, by the recipe of a built-in observer or the class method `example`.
        shape: Shape of x; 16 16 by default.
        count: Size of the batch, at least 2.
        seed: Seed of everything random.
        device: Where to compute.
    """
    from emdiff.check import check_command

    at_least("--count", count, 2)
    sys.exit(check_command(name, observations, tuple(shape) if shape else None, count, seed, device))


class Parser(ArgumentParser):
    """A parser whose complaints are one line, and status 2."""

    def error(self, message, ex=None):
        """Print the complaint and leave."""
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        print(f"emdiff: {' '.join(lines)}; see --help", file=sys.stderr)
        sys.exit(2)


COMMANDS = {
    "observe": observe,
    "fit": fit,
    "train": train,
    "sample": sample,
    "denoise": denoise,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
    "report": report,
    "check-observer": check_observer,
}


def dashes(argument: str) -> str:
    """--noise-std=0.5 -> --noise_std=0.5; values are left alone."""
    found = re.match(r"--[A-Za-z][\w.-]*", argument)
    return argument if not found else found[0][:2] + found[0][2:].replace("-", "_") + argument[found.end() :]


def spread(devices: int, device: str, arguments: list[str]) -> int:
    """Run a command in several processes on this machine; returns its exit status."""
    if device != "cpu":
        from emdiff.plan import resolve_device
        from emdiff.processes import check_devices

        check_devices(resolve_device(device), devices)
    return launch(devices, [sys.executable, "-m", "emdiff.cli", *arguments])


FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
"""What the system says of disks, files and quotas that are full."""


def main(arguments: Optional[list[str]] = None) -> None:
    """Run a command; bad input ends with status 2 and one message."""
    if arguments is None:
        last_work()
    arguments = [dashes(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    if arguments[:1] == ["check-observer"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments.insert(1, "--name")
    parser = auto_parser(COMMANDS, as_positional=False, parser_class=Parser, prog="emdiff", allow_abbrev=False)
    try:
        check_configs(arguments)
    except UsageError as error:
        parser.error(str(error))
    chosen = parser.parse_args(arguments)
    try:
        settings = parser.instantiate(chosen)[chosen.subcommand]
    except ValueError as error:
        parser.error(str(error))
    settings.pop("config", None)
    try:
        if settings.get("devices", 1) > 1 and not launched():
            sys.exit(spread(settings["devices"], settings["device"], arguments))
        COMMANDS[chosen.subcommand](**settings)
    except UsageError as error:
        end(2, f"{error}")
    except FitFailed as error:
        end(3, f"{error}")
    except Lost as error:
        end(LOST, f"{error}; the same command continues" if str(error) else "")
    except Stopped as stop:
        end(stop.status, f"stopped by {stop}; the same command continues where it was")
    except KeyboardInterrupt:
        end(130, "interrupted")
    except OSError as error:
        if error.errno not in FULL:
            raise
        end(2, f"{error}: a disk is full, or the one that standard output or error go to; the same command continues")


def end(status: int, message: str) -> NoReturn:
    """End with a status and a message, said if standard error can be written."""
    try:
        if message:
            print(f"emdiff: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # what they still hold cannot be written at exit either, and would make the status 120
    sys.exit(status)


if __name__ == "__main__":
    main()
