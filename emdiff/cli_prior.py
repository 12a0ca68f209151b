"""The commands that make a prior from clean data and use one: `emdiff train | sample | denoise`. Torch is imported when a command runs."""

from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Literal, Optional

from emdiff.checks import at_least, positive, suffix
from emdiff.errors import UsageError
from emdiff.interrupt import listening
from emdiff.settings import ModelSettings, ObjectiveSettings, WalkSettings

Device = Literal["auto", "cpu", "cuda"]


def train(
    data: str,
    out: Optional[str] = None,
    root: Optional[str] = None,
    download: bool = False,
    count: Optional[int] = None,
    held_out: Optional[int] = None,
    flips: bool = False,
    pictures: int = 64,
    keep: Optional[int] = None,
    seed: int = 0,
    device: Device = "auto",
    wandb: Literal["auto", "online", "offline", "off"] = "auto",
    model: ModelSettings = ModelSettings(),
    train: ObjectiveSettings = ObjectiveSettings(),
    walk: WalkSettings = WalkSettings(),
) -> None:
    """Train a prior on clean data; running the same command again continues it.

    Args:
        data: mnist, cifar10, fashion_mnist, digits, a file (.npz, .npy, .h5) or a folder of images; uint8 becomes [0, 1].
        out: Run folder. Unset: runs/train-NAME-HASH of the data and the settings.
        root: Folder with NAME.npz or torchvision's files, for data given by name. Unset: the environment's EMDIFF_DATA, else ./data.
        download: Let torchvision fetch data that are not there; nothing is downloaded otherwise.
        count: Take the first so many data; all by default.
        held_out: Random data to set aside: their loss is reported and chooses the round whose prior is kept. Unset, one in 20, and at most 1,000;
            with 0 the last round is kept.
        flips: Mirror half of the images left to right, anew in every step.
        pictures: Prior samples drawn after every round.
        keep: Keep priors and pictures of the last so many rounds only, and of the best; figures are kept of all. Unset: all rounds.
        seed: Seed of everything random.
        device: cpu, cuda, or whichever is there.
        wandb: Weights & Biases: auto is online where you are logged in, else offline.
        model: What is trained.
        train: How.
        walk: The walk that `emdiff reconstruct` takes with this prior.
    """
    config = _plain(locals())
    at_least("--keep", 1 if keep is None else keep, 1)
    with listening():
        from emdiff.commands_prior import train_command

        train_command(config, _plain({name: parameter.default for name, parameter in signature(TRAIN).parameters.items()}))


TRAIN = train  # within the function the name is that of its settings


def _plain(settings: dict) -> dict:
    """Settings of a training as plain values."""
    return {name: asdict(value) if name in ("model", "train", "walk") else value for name, value in settings.items()}


def sample(
    run: str,
    count: int = 64,
    out: str = "samples.npz",
    levels: int = 64,
    steps: Optional[int] = None,
    chain: bool = False,
    every: int = 100,
    sigma: Optional[float] = None,
    measurements: int = 4,
    delta: Optional[float] = None,
    gamma: float = 0.25,
    u: float = 1.0,
    step: Literal["sachs", "cheng", "overdamped"] = "sachs",
    noisy_start: bool = True,
    warm_start: bool = False,
    keep: int = 1024,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Draw unconditional samples from a run's prior, and a picture of them; or follow one long chain.

    Args:
        run: Run folder of `emdiff fit` or `emdiff train`, or a prior's file.
        count: Number of samples.
        out: File to write, .npz with x in the units of the data; the picture gets its name with .png, figures of a chain with .json.
        levels: Noise levels of the walk; more is slower and more exact.
        steps: Langevin steps: at each level (0 if unset), or in all for a chain (10,000) and for priors of fixed levels (1,000).
        chain: Follow one chain through one M-density and keep a jump every `every` steps, for any number of steps in constant memory.
        every: Steps between jumps of a chain (the paper's Delta k).
        sigma: Level of the M-density of a chain, in the units of the data. Unset: 1 where the data's std is about .3, in general 3.2 of it.
        measurements: M of the M-density of a chain.
        delta: Step of a chain, in the units of the data. Unset: sigma/2.
        gamma: Friction of a chain, per unit time.
        u: Inverse mass of a chain.
        step: Discretisation of a chain: sachs (Algorithm 1), cheng (Algorithm 2) or overdamped.
        noisy_start: Start a chain at U[0, 1] plus noise (Remark 4), or without the noise.
        warm_start: Start a chain at a draw by accumulating measurements instead; where noise is small, one from elsewhere may never find the data.
        keep: Most jumps of a chain to keep; when there are more, every second is dropped.
        seed: Seed.
        device: Where to run.
    """
    from emdiff.commands_prior import chain_command, sample_command

    at_least("--count", count, 1)
    at_least("--levels", levels, 2)
    at_least("--steps", 1 if steps is None else steps, 1 if chain else 0)
    suffix("--out", out, (".npz",))
    if not chain:
        sample_command(Path(run), count, Path(out), levels, steps, seed, device)
        return
    for name, value in {"--gamma": gamma, "--u": u, "--sigma": sigma or 1.0, "--delta": delta or 1.0}.items():
        positive(name, value)
    for name, value in {"--every": every, "--measurements": measurements}.items():
        at_least(name, value, 1)
    at_least("--keep", keep, 2)
    if (steps or 10_000) < every:
        raise UsageError(f"--steps {steps} is less than --every {every}, which leaves no jump; lower --every")
    walk = {"delta": delta, "gamma": gamma, "u": u, "step": step, "noisy_start": noisy_start, "warm_start": warm_start}
    chain_command(Path(run), Path(out), steps or 10_000, every, sigma, measurements, walk, keep, seed, device)


def denoise(
    run: str,
    observations: str,
    out: str = "denoised.npz",
    flow: bool = False,
    rate: float = 1.0,
    steps: int = 500,
    noise_std: Optional[float] = None,
    shape: Optional[list[int]] = None,
    uint8_range: bool = False,
    device: Device = "auto",
) -> None:
    """Denoise in a single step, E[x | obs], or follow the flow to the attractor of each observation (associative memory).

    Args:
        run: Run folder of `emdiff fit` or `emdiff train`, or a prior's file.
        observations: File of observations that are measurements of x (noise, or masks and noise).
        out: File to write, .npz with x (N, *S); with the flow also attractor (N, *S), steps and converged (N,); the picture gets its name with .png.
        flow: Follow y <- y + rate (E[x | y] - y) at the level of the noise until it stands still.
        rate: Step of the flow, above 0 and at most 1.
        steps: Most steps of the flow.
        noise_std: Noise level, if the file does not hold it.
        shape: Shape of x, if the file does not hold it.
        uint8_range: Accept uint8 observations and divide them by 255.
        device: Where to run.
    """
    from emdiff.commands_prior import denoise_command
    from emdiff.observations import read_observations

    suffix("--out", out, (".npz",))
    at_least("--steps", steps, 1)
    if not 0 < rate <= 1:
        raise UsageError(f"--rate is {rate:g}; give a value above 0 and at most 1")
    data = read_observations(Path(observations), None, noise_std, tuple(shape) if shape else None, uint8_range)
    denoise_command(Path(run), data, Path(out), rate if flow else None, steps, device)
