r"""Training a prior on clean data: `emdiff train`, in rounds, each a folder (runs), so that an interrupted training goes on where it was.

Round k continues from the memory that round k - 1 left on disk (weights, average, optimiser) and from a seed made of (seed, k), and within a round
from the state that `training` saves: an interrupted training and an uninterrupted one end at the same weights on the same machine.
"""

from __future__ import annotations

import copy
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.ahead import ahead
from emdiff.chain import ChainWalk, own_levels, run_chain
from emdiff.datasets import Dataset, in_units
from emdiff.denoise import Denoiser
from emdiff.measurement import effective, measure
from emdiff.memory import Memory, Optimiser, load_memory, save_memory
from emdiff.models import fixed_levels
from emdiff.near import beside, near
from emdiff.objectives import ManyLevels, OneSet, errors
from emdiff.outline import Listener
from emdiff.precision import set_precision
from emdiff.prior import TAU_FIRST, Prior, build_network, load_prior, sample_prior, save_prior
from emdiff.runs import Run
from emdiff.scale import Scale
from emdiff.streams import stream, stream_seed
from emdiff.training import train

REPORTED = 0.25
"""Level, in the units of the data, at which the loss of a pooled prior is reported: that of the paper's 1/4 x 1 and 1 x 16."""

LOSS_DATA = 1000
"""Most data that a reported loss is a mean over."""

MOST_LOOKS = 20
"""Measurements of each of a few held-out data."""

PICTURE_STEPS = 200
"""Steps of the chains that a channel view's pictures are drawn with."""


class TrainPlan(NamedTuple):
    """All that a training has to know.

    Attributes:
        network: Arguments of `prior.build_network`.
        tau_last: Finest level to train, in units of the data's std; the effective one of fixed levels.
        objective: A key of `objectives.OBJECTIVES`, for fixed levels.
        optimiser: How weights are moved.
        batch: Data per step.
        steps: Steps in all.
        rounds: Parts.
        flips: Mirror half of the images left to right.
        pictures: Prior samples drawn per round.
        seed: Seed of everything random.
        device: "cpu" or "cuda".
        masks: Train levels that differ between entries, too.
        held_out: Data set aside, whose loss chooses the round that is kept.
    """

    network: dict[str, Any]
    tau_last: float
    objective: str = "mean"
    optimiser: Optimiser = Optimiser()
    batch: int = 128
    steps: int = 4000
    rounds: int = 10
    flips: bool = False
    pictures: int = 64
    seed: int = 0
    device: str = "cpu"
    masks: bool = False
    held_out: int = 0


class Standardised:
    """A data set as losses see it (`objectives.Batches`).

    Args:
        data: Clean data.
        scale: Their scale.
        flips: Mirror each image left to right with probability one half.
        device: Where they are needed; they are brought there as they are stored, if it has room (near).
    """

    def __init__(self, data: Dataset, scale: Scale, flips: bool = False, device: str = "cpu") -> None:
        self.stored, self.scale, self.flips = near(data.stored(), torch.device(device)), scale, flips

    def read(self, index: Tensor) -> Tensor:
        """What is stored at indices (B,), where it lies."""
        return self.stored[beside(index, self.stored)]

    def unflipped(self) -> Standardised:
        """The same data, none mirrored."""
        same = copy.copy(self)
        same.flips = False
        return same

    def batch(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        """Standardised data (B, *S), each mirrored or not, from what is stored, both on the generator's device."""
        x = self.scale.standardise(in_units(stored))
        if not self.flips:
            return x
        flip = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        return torch.where(flip.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def measure_scale(data: Dataset, most: int = 200_000_000) -> Scale:
    """Mean and std over all entries of evenly spaced data, as many as have at most `most` entries, but at least 500."""
    d = torch.Size(data.shape).numel()
    index = torch.arange(0, len(data), max(1, len(data) // max(500, most // d)))
    count = total = squares = 0.0
    for part in index.split(max(1, 10_000_000 // d)):
        x = data.read(part).double()
        count, total, squares = count + x.numel(), total + float(x.sum()), squares + float(x.square().sum())
    mean = total / count
    return Scale(mean, max(squares / count - mean**2, 1e-24) ** 0.5)


def run_training(data: Dataset, scale: Scale, plan: TrainPlan, run: Run, listener: Listener) -> tuple[Prior, int]:
    """Train a prior, continuing whatever the run folder holds.

    Args:
        data: Clean data (N, *S), in the user's units.
        scale: Their scale.
        plan: How.
        run: The run folder, which keeps every round.
        listener: Told of progress and of every round.

    Returns:
        The prior of the round that is kept, on the plan's device, and which round that is.

    Raises:
        FitFailed: as `training.train`.
        UsageError: for files of the run that cannot be read or written.
    """
    training, apart = data.split(plan.held_out, stream(plan.seed, "held out")) if plan.held_out else (data, None)
    often = plan.steps * plan.batch >= len(training)  # all of them are read anyway
    source = Standardised(training, scale, plan.flips, plan.device if often else "cpu")
    judge = Standardised(apart, scale, device=plan.device) if apart else None
    for k in range(run.finished() + 1, plan.rounds + 1):
        clock = time.perf_counter()
        folder = run.begin(k)
        if k == 0:
            torch.manual_seed(stream_seed(plan.seed, "network"))
            denoiser = build_network(data.shape, **plan.network)
            state = {name: value.detach() for name, value in denoiser.state_dict().items()}
            save_memory(folder / "memory.safetensors", Memory(0, state, state, {}))
            run.finish(0, {"iter": 0, "steps": 0, "parameters": sum(p.numel() for p in denoiser.parameters())})
            continue
        prior, metrics = train_round(k, source, plan, run, listener)
        save_prior(folder / "prior.safetensors", prior)
        metrics |= {"image_loss": image_loss(prior, source, plan)} | ({"held_out_loss": held_out_loss(prior, judge, plan)} if judge else {})
        pictures = {"data": data.read(torch.arange(min(64, len(data))))}
        if plan.pictures:
            pictures["samples"] = draw(prior, plan.pictures, plan, k, listener)
            metrics |= {"prior_mean": float(pictures["samples"].mean()), "prior_std": float(pictures["samples"].std())}
        metrics |= {"iter": k, "seconds": time.perf_counter() - clock}
        run.finish(k, metrics)
        run.choose(best_round(run.history()))
        (run.round_path(k - 1) / "memory.safetensors").unlink(missing_ok=True)
        listener.round(k, metrics, pictures)
    best = best_round(run.history()) or plan.rounds
    run.choose(best_round(run.history()))  # again: a training may have been killed between the two files
    prior = load_prior(run.round_path(best) / "prior.safetensors", plan.device)
    save_prior(run.path / "prior.safetensors", prior)
    return prior, best


def best_round(history: list[dict[str, Any]]) -> int | None:
    """The round of the least held-out loss; None where no data were held out.

    >>> best_round([{"iter": 0}, {"iter": 1, "held_out_loss": 2.0}, {"iter": 2, "held_out_loss": 3.0}])
    1
    """
    rows = [row for row in history if "held_out_loss" in row]
    return min(rows, key=lambda row: row["held_out_loss"])["iter"] if rows else None


def train_round(k: int, data: Standardised, plan: TrainPlan, run: Run, listener: Listener) -> tuple[Prior, dict[str, Any]]:
    """One part of the training: the average so far as a prior, and figures. Leaves its memory in the folder."""
    count, *shape = data.stored.shape
    denoiser = set_precision(build_network(tuple(shape), **plan.network), plan.device)
    memory = load_memory(run.round_path(k - 1) / "memory.safetensors", denoiser.state_dict())
    loss = loss_of(denoiser, data, plan)
    steps = plan.steps * k // plan.rounds - memory.step
    bar = listener.phase(f"round {k} of {plan.rounds}", steps)
    clock = time.perf_counter()
    seed = stream_seed(plan.seed, "train", k)
    trained = train(denoiser, loss, count, steps, plan.batch, seed=seed, device=plan.device, progress=bar,
                    checkpoint=run.checkpoint(k), optimiser=plan.optimiser, memory=memory, total=plan.steps)  # fmt: skip
    save_memory(run.round_path(k) / "memory.safetensors", trained.memory)
    seconds = time.perf_counter() - clock
    figures = {"loss": trained.loss, "steps": trained.memory.step, "retreats": trained.retreats}
    figures |= {"seconds_train": seconds, "images_per_second": steps * plan.batch / seconds}
    return Prior(trained.denoiser, data.scale, tuple(shape), plan.tau_last, plan.network), figures


def loss_of(denoiser: Denoiser, data: Standardised, plan: TrainPlan) -> ManyLevels | OneSet:
    """What is minimised, on some data: eq. 14 or its variants at fixed levels, else `ManyLevels`."""
    levels = fixed_levels(denoiser)
    return ManyLevels(data, plan.tau_last, TAU_FIRST, plan.masks) if levels is None else OneSet(data, levels, plan.objective)


@torch.no_grad()
def held_out_loss(prior: Prior, data: Standardised, plan: TrainPlan) -> float:
    """What is minimised (`loss_of`: per entry, in data variances), of the averaged network, on data (n, *S) that it was not trained on: with the same
    draws in every round, and for a few data with up to MOST_LOOKS measurements of each."""
    generator, count = stream(plan.seed, "held-out loss", device=plan.device), data.stored.shape[0]
    loss, total, index = loss_of(prior.denoiser, data, plan), 0.0, torch.arange(count).repeat(max(1, min(MOST_LOOKS, LOSS_DATA // count)))
    for stored in ahead(data.read, index.split(plan.batch), generator.device):
        total += len(stored) * float(loss(prior.denoiser, stored, generator))
    return total / len(index)


@torch.no_grad()
def image_loss(prior: Prior, data: Standardised, plan: TrainPlan) -> float:
    """Eq. 14 as the paper reports it: the mean over m of |x - xhat^(m)|^2, summed over an image, in the units of the data.

    At the prior's own levels, or one measurement of level REPORTED where it takes any; over the first LOSS_DATA data, with the same noise in every
    round.
    """
    generator = stream(plan.seed, "image loss", device=plan.device)
    levels = fixed_levels(prior.denoiser)
    sigma = torch.tensor([REPORTED / prior.scale.std], device=plan.device) if levels is None else levels
    whole, parts = data.unflipped(), []
    for stored in ahead(data.read, torch.arange(min(LOSS_DATA, data.stored.shape[0])).split(plan.batch), generator.device):
        x = whole.batch(stored, generator)
        parts.append(errors(prior.denoiser, x, measure(x, sigma, generator), sigma).mean(1))
    return prior.scale.std**2 * float(torch.cat(parts).mean())


def draw(prior: Prior, count: int, plan: TrainPlan, k: int, listener: Listener) -> Tensor:
    """Prior samples (count, *S) in the user's units: by accumulating measurements, or by chains of the prior's own M-density."""
    generator, own = stream(plan.seed, "prior samples", k, device=plan.device), own_levels(prior)
    bar = listener.phase(f"round {k}: prior samples", count if own is None else PICTURE_STEPS)
    if own is None:
        return sample_prior(prior, count, generator, progress=bar)
    chain = ChainWalk(own, delta=min(own) / 2, gamma=1.0)
    return run_chain(prior, chain, PICTURE_STEPS, PICTURE_STEPS // 10, generator, count=count, progress=bar)[0]


def tau_of(levels: list[float]) -> float:
    """Effective noise of fixed levels (M,)."""
    return float(effective(torch.tensor(levels, dtype=torch.float64)))
