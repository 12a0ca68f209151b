"""Posterior samples under a finished prior, several per observation: what `emdiff reconstruct` writes and `emdiff evaluate` judges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data, Observations, measured
from emdiff.em import Walk, choose_guidance, e_step
from emdiff.errors import UsageError
from emdiff.finished import latest_prior, round_metrics, round_of
from emdiff.langevin import STEPS
from emdiff.metrics import residual_chi2
from emdiff.noise import depends_on_signal, with_counts
from emdiff.pool import applies, restart
from emdiff.prior import TAU_FIRST, Prior, has_gains, sees_entries
from emdiff.reading import number, read_yaml

BURN_IN = 5
"""Passes of persistent chains that start at the mean, before the first sample is taken."""

FORGOTTEN = 5.0
"""Level, in units of the data's std, from which a walk is independent of where its chain was, for all that a sample shows."""

AWAY = 4.0
"""How many times further than what its fit takes for diverged a chain may go: other observations may be of larger x."""


class Posterior(NamedTuple):
    """Posterior samples in the user's units.

    Attributes:
        x: Samples (N, L, *S), on the CPU.
        restarted: Chains that left the data's range and were walked again.
        residual: Mean relative residual of the solves; 0 without a solver.
        iterations: Mean solver iterations.
        chi2: Residual chi2 of each (N, L): where x are jumps, of the measurements that they were made from.
        tau: The level of those, standardised; 0 where x are complete samples.
    """

    x: Tensor
    restarted: int
    residual: float
    iterations: float
    chi2: Tensor
    tau: float = 0.0


def run_walk(run: Path, data: Data, device: str) -> Walk:
    """The walk a run was made with, and its guidance; auto's choice where these observations do not allow that.

    Raises:
        UsageError: if the run's configuration cannot be read, or holds no walk.
    """
    file = run / "config.yaml"
    config, known = read_yaml(file), Walk()._asdict()
    stored, wanted = config.get("walk"), config.get("guidance", "auto")
    if not isinstance(stored, dict) or wanted not in ("auto", "fused", "cg", "gmres"):
        raise UsageError(f"{file}: holds no settings of a walk; restore the file")
    try:
        guidance, _ = choose_guidance(data, wanted)
    except ValueError:
        guidance, _ = choose_guidance(data, "auto")
    walk = {**known, **stored, "guidance": guidance, "batch": default_batch(device)}
    walk["pool"] = default_pool(data, guidance) if stored.get("pool") is None else stored["pool"]
    walk["tau_first"] = stored.get("tau_first") or default_tau_first(guidance, walk["pool"])
    for name, value in walk.items():
        kind = type(known.get(name))
        if name not in known or not (isinstance(value, kind) or (kind is float and type(value) is int)) or (kind is int and not 0 <= value <= 10**7):
            raise UsageError(f"{file}: walk.{name} is {value!r}, which is no setting of a walk; restore the file")
    if walk["step"] not in STEPS or not 0 < walk["tau_last"] < walk["tau_first"] or not 2 <= walk["levels"] <= 10_000:
        raise UsageError(
            f"{file}: {walk['levels']} {walk['step']} levels from {walk['tau_first']} to {walk['tau_last']} are no walk; restore the file"
        )
    return Walk(**walk)


def default_pool(data: Data, guidance: str) -> int:
    """Prior samples from which chains restart: where moment matching guides vectors; none elsewhere."""
    return 8192 if guidance != "fused" and applies(data) else 0


def default_tau_first(guidance: str, pool: int) -> float:
    """Where chains re-enter: anew from the observation where it is one more measurement; close to where a pool puts them; else where next to nothing
    of where they were is left."""
    return math.inf if guidance == "fused" else 0.3 if pool else TAU_FIRST


def default_batch(device: str) -> int:
    """Chains at once: on a CPU no more than fill it, since larger batches are not faster and take more memory (docs/speed.md)."""
    return 4096 if device == "cuda" else 128


def check_shape(prior: Prior, data: Data, run: Path) -> None:
    """Refuse observations of data of another shape.

    Raises:
        UsageError: naming both shapes.
    """
    if data.shape != prior.shape:
        raise UsageError(f"the observations are of data of shape {data.shape}, the prior of {run} is for {prior.shape}; give --shape or another run")


def check_levels(prior: Prior, data: Data, guidance: str, path: Path) -> None:
    """Refuse fused guidance by observations of which entries are missing or noisier than others, under a network that does not see which.

    Raises:
        UsageError: with what to do.
    """
    if guidance == "fused" and not sees_entries(prior) and not measured(data).even:
        raise UsageError(
            f"{path}: this prior takes one noise level per datum, and of these observations entries are missing or noisier than others; give a prior "
            "that was fitted to such observations, or trained on clean data with --model.masks true"
        )


STEADY = "one solver iteration per level, since more diverge on products with V of a network with gains"
"""What there is to say where `steady` changes a walk."""


def steady(walk: Walk, prior: Prior) -> Walk:
    """The walk, with one solver iteration per level where it would take several with products with V of a network with gains (docs/method.md)."""
    return walk._replace(iterations=1) if walk.guidance != "fused" and has_gains(prior) else walk


def run_level(run: Path) -> float | None:
    """The noise level that a run has estimated, in the user's units, where it was asked to; else None."""
    config = run / "config.yaml"
    if not config.is_file() or read_yaml(config).get("noise_std") != "auto":
        return None
    k = round_of(latest_prior(run))
    return number(round_metrics(run)[k], "noise_std", run / f"round_{k:03d}" / "metrics.json")


def run_bound(run: Path) -> float:
    """How far from the data's mean, in units of their std, a sample may lie before its chain counts as diverged; infinite where the run is no fit."""
    start = round_metrics(run)[0]
    return AWAY * number(start, "bound", run / "start" / "metrics.json") if "bound" in start else math.inf


def settled(prior: Prior, data: Observations, walk: Walk, generator: torch.Generator, bound: float = math.inf) -> Observations:
    """Observations whose noise depends on the signal with the variance that one posterior sample each tells; others as they are."""
    if not depends_on_signal(data):
        return data
    first = with_counts(data, None).rows(slice(None))
    return with_counts(data, sample_posterior(prior, first, walk, 1, generator, bound=bound).x[:, 0]).rows(slice(None))


def sample_posterior(
    prior: Prior,
    data: Observations,
    walk: Walk,
    count: int,
    generator: torch.Generator,
    phase: Callable[[str, int], Callable[[int], None]] = lambda name, total: lambda done: None,
    bound: float = math.inf,
) -> Posterior:
    """Draw `count` samples of x | obs for every observation.

    Where every walk starts anew (walk.tau_first infinite, or FORGOTTEN and more) samples are independent given the prior, and so are those that start
    from a pool, except for data that the pool cannot serve (pool); else they are successive states of persistent chains, after BURN_IN passes.

    Args:
        prior: The prior, on the generator's device.
        data: Observations in the user's units.
        walk: How to walk.
        count: Samples per observation.
        generator: Source of randomness.
        phase: Told the name and length of each pass; returns what to call with the number of observations done.
        bound: Standardised samples beyond it are walked again (`em.e_step`).
    """
    standard = prior.scale.observations(data)
    persistent = math.isfinite(walk.tau_first)
    chains = torch.zeros(len(data), *data.shape) if persistent else None
    burn_in = BURN_IN if walk.tau_first < FORGOTTEN and not walk.pool else 0
    x = torch.empty(len(data), count, *data.shape)
    chi2 = torch.empty(len(data), count)
    restarted, residual, iterations = 0, 0.0, 0.0
    for i in range(-burn_in, count):
        name = f"sample {i + 1} of {count}" if i >= 0 else f"burn-in {i + burn_in + 1} of {burn_in}"
        if walk.pool:
            chains = restart(prior, standard, chains if i else None, walk.pool, walk.tau_first, generator)
        end = e_step(prior.denoiser, standard, chains, walk, generator, bound, phase(name, len(data)))
        chains = end.y if persistent else None
        restarted, residual, iterations = restarted + end.restarted, end.residual, end.iterations
        if i >= 0:
            last = end.x if end.sample is None else end.sample
            x[:, i] = prior.scale.restore(last)
            jumps = end.sample is None and end.tau > 0 and walk.guidance == "fused"
            chi2[:, i] = residual_chi2(standard, end.y, end.tau) if jumps else residual_chi2(standard, last)
    return Posterior(x, restarted, residual, iterations, chi2, end.tau if jumps else 0.0)
