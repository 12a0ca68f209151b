r"""Expectation maximisation: learn p(x) from observations by alternating two steps, k = 1, 2, ...

    E-step    x | obs for every observation, under the prior p_{k-1}: walk the posterior's M-density down the levels, jump at the last
    M-step    p_k: train the denoiser on what the walks ended with

What M-steps regress on is in pairs.

Source: Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al. 2024); Dempster, Laird & Rubin (1977).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.accumulate import accumulate, levels
from emdiff.ahead import ahead
from emdiff.basewalk import descend, fused, guided
from emdiff.data import Data, Observations, measured, observer_name
from emdiff.deconvolution import whitened
from emdiff.denoise import Denoiser
from emdiff.guidance import TOLERANCE, FusedPosterior, PosteriorDenoiser
from emdiff.langevin import STEPS
from emdiff.mdae import MDAE
from emdiff.near import near_data
from emdiff.prior import TAU_FIRST
from emdiff.rows import Array, Store, steps
from emdiff.unfinished import Batches

Progress = Callable[[int], None]

BLIND = 8.0
"""What the least known directions of x spread where entries are missing, in units of the data's std: levels are spent below it."""

RETRIES = 3
"""Times a chain that left the data's range is restarted before its last good sample is kept."""


class Walk(NamedTuple):
    """How the E-step walks; levels are in units of the data's std.

    Attributes:
        guidance: "fused", "cg" or "gmres".
        tau_first: Level at which persistent chains re-enter; infinite starts every chain anew from its observation (fused only).
        tau_last: Level of the last jump.
        tau_relax: Level of the last jump in iterations that over-relax there (relax); tau_last for none.
        levels: Levels from first to last.
        corrected: Give back the spread that predictions drop (accumulate); without, few levels end nearer to the mean, and narrower.
        steps: Langevin steps at each level.
        delta: Their step, in units of the level's tau.
        gamma: Their friction, per unit time in which tau is 1.
        step: Their discretisation, a key of `langevin.STEPS`.
        iterations: Most solver iterations of "cg" and "gmres".
        tolerance: Largest error of a jump that an unfinished solve may leave, rms over entries, in units of its level.
        coarse: Level above which a solve takes one iteration.
        batch: Chains at once.
        pool: Prior samples from which chains restart (pool); 0 for persistent chains.
    """

    guidance: str = "fused"
    tau_first: float = math.inf
    tau_last: float = 0.1
    tau_relax: float = 0.25
    levels: int = 24
    corrected: bool = True
    steps: int = 0
    delta: float = 1.0
    gamma: float = 1.0
    step: str = "sachs"
    iterations: int = 3
    tolerance: float = TOLERANCE
    coarse: float = 1.0
    batch: int = 500
    pool: int = 0


class Draws(NamedTuple):
    """What an E-step ends with, for every observation.

    Attributes:
        y: Last measurement (N, *S), of level tau.
        x: Its jump (N, *S).
        tau: 0 where x are complete samples and y = x.
        restarted: Chains that left the data's range and were walked again.
        kept: Data whose chains did so RETRIES times, bool (N,): y and x are their last state, not a draw, and no M-step should see them.
        residual: Mean relative residual of the solves at the last level; 0 without a solver.
        iterations: Mean solver iterations there.
        sample: With a solver, a complete sample of x | y, obs (N, *S): the jump and its posterior deviation. None where the jump stands for it.
    """

    y: Array
    x: Array
    tau: float
    restarted: int = 0
    kept: Tensor | None = None
    residual: float = 0.0
    iterations: float = 0.0
    sample: Array | None = None


def choose_guidance(data: Data, wanted: str = "auto") -> tuple[str, str]:
    """Guidance and the reason for it: fused where an observation is one more measurement, else CG.

    Raises:
        ValueError: if fused is wanted where it does not apply.
    """
    one = data.rows(slice(0, 1))
    fusable, name = one.observer.as_measurement(one.obs) is not None, one.observer.name
    if wanted == "fused" and not fusable:
        raise ValueError(f"--guidance fused needs At cov_obs^-1 A diagonal, and observer {name} mixes entries; use cg")
    if wanted == "auto" and fusable:
        return "fused", f"observer {name} sees entries one by one, so that an observation is one more measurement of x: exact, one pass, no Jacobians"
    if wanted == "auto":
        return "cg", f"observer {name} mixes entries of x, so that no level per entry says what it saw: moment matching by conjugate gradients"
    aside = "; fused would be exact here, and faster" if fusable and wanted != "fused" else ""
    return wanted, f"as asked{aside}"


def posterior(prior: Denoiser, data: Observations, walk: Walk) -> Denoiser:
    """The denoiser of p(x | obs) for a batch of observations."""
    if walk.guidance == "fused":
        return FusedPosterior(prior, *data.observer.as_measurement(data.obs))
    return PosteriorDenoiser(prior, data.observer, data.obs, walk.guidance, walk.iterations, walk.tolerance, walk.coarse)


def walk_levels(data: Data, walk: Walk) -> list[float]:
    """The levels of a walk on these observations.

    From infinity, where all entries are observed, the fused levels fall geometrically from the observations' own noise; where some are
    not, from TAU_FIRST as if fused with noise BLIND.
    """
    if math.isfinite(walk.tau_first):
        return levels(walk.tau_first, walk.tau_last, walk.levels)
    found = measured(data)
    if found is None:
        raise ValueError(
            f"a walk from infinity needs observations that are measurements of x; observer {observer_name(data)} needs a finite tau_first"
        )
    if found.complete:
        return levels(math.inf, walk.tau_last, walk.levels, found.median)
    return levels(TAU_FIRST, walk.tau_last, walk.levels, BLIND)


def walk_batch(
    prior: Denoiser, data: Observations, chains: Tensor | None, walk: Walk, taus: list[float], generator: torch.Generator, tau_chains: float,
    complete: bool = True,
) -> Draws:  # fmt: skip
    """Sample x | obs for a batch: see `e_step`; nothing is restarted here."""
    if isinstance(prior, MDAE) and prior.base is not None:
        return walk_from_base(prior, data, chains, walk, taus, generator)
    target = posterior(prior, data, walk)
    tau = walk.tau_first
    if math.isinf(tau):
        y = data.obs.new_zeros(len(data), *data.shape)
    else:
        tau, taus = taus[0], taus[1:]
        eps = torch.randn(chains.shape, generator=generator, dtype=chains.dtype, device=chains.device)
        y = chains + math.sqrt(max(tau**2 - tau_chains**2, 0.0)) * eps
    end = accumulate(target, y, tau, taus, generator, walk.corrected, walk.steps, walk.delta, walk.gamma, STEPS[walk.step])
    if not isinstance(target, PosteriorDenoiser):
        return Draws(end.y, end.xhat, end.tau)
    residual, iterations = float(target.solve.residual.mean()), float(target.solve.iterations.float().mean())
    sample = target.draw(end.y[:, None], end.y.new_full((1,), end.tau), generator) if complete else None
    return Draws(end.y, end.xhat, end.tau, residual=residual, iterations=iterations, sample=sample)


def walk_from_base(prior: MDAE, data: Observations, chains: Tensor | None, walk: Walk, taus: list[float], generator: torch.Generator) -> Draws:
    """Sample x | obs for a batch under a prior with a base (basewalk); fused walks start from TAU_FIRST, where the base knows all there is."""
    seen = whitened(data)
    target, departs = prior.base.given(seen), prior.departs()
    if walk.guidance == "fused":
        departure, chains = fused(prior, *data.observer.as_measurement(data.obs)) if departs else None, None
        taus = levels(TAU_FIRST, walk.tau_last, walk.levels)
    else:
        departure = guided(prior, seen) if departs else None
    end = descend(target, departure, (len(data), *data.shape), taus, generator, chains)
    return Draws(end.y, end.xhat, end.tau, sample=end.x)


def escaped(x: Tensor, bound: float) -> Tensor:
    """Which samples (B, *S) are not finite or leave [-bound, bound], shape (B,)."""
    size = x.flatten(1).abs().amax(1)
    return ~((size <= bound) & size.isfinite())


@torch.no_grad()
def e_step(
    prior: Denoiser,
    data: Data,
    chains: Array | None,
    walk: Walk,
    generator: torch.Generator,
    bound: float = math.inf,
    progress: Progress = lambda done: None,
    tau_chains: float | None = None,
    store: Store | None = None,
    checkpoint: Path | None = None,
) -> Draws:
    """Sample x | obs for every observation.

    Args:
        prior: Denoiser of p_{k-1}.
        data: All observations, standardised.
        chains: Last measurements (N, *S) of level tau_chains, from the previous E-step; they re-enter at walk.tau_first with noise added,
            which leaves their law what it was. None is allowed where walk.tau_first is infinite.
        walk: How to walk.
        generator: Source of randomness, on the device of the walk.
        bound: Samples beyond it, or not finite, are walked again, at most RETRIES times; then the chain keeps its last sample.
        progress: Called with the number of observations done.
        tau_chains: Level of chains; walk.tau_last if None.
        store: Makes the arrays "y", "x" and, with a solver, "sample", which are filled batch by batch; None takes tensors.
        checkpoint: File for the number of batches done and the state of the generator, from which an E-step that was stopped goes on where the
            arrays of `store` still hold what they held; None for none.

    Returns:
        Draws, on the CPU or where `store` holds them.
    """
    device, taus, data = generator.device, walk_levels(data, walk), near_data(data, generator.device)
    tau_chains = walk.tau_last if tau_chains is None else tau_chains
    drawn = walk.guidance != "fused" or getattr(prior, "base", None) is not None  # walks that end with a sample of its own
    shape, names = (len(data), *data.shape), ("y", "x", "sample") if drawn else ("y", "x")
    done = Batches(checkpoint if store else None, f"{generator.initial_seed()} {walk} {len(data)} {bound} {tau_chains}", generator)
    arrays: dict[str, Any] = {name: store(name, shape) for name in names} if store else {}
    if done.parts and not all(array.found for array in arrays.values()):
        done.forget(generator)
    parts = steps(done.count(), len(data), walk.batch)
    batches = ahead(lambda span: (data.rows(span), None if chains is None else chains[span]), parts, device)
    for span in parts:
        done.between(arrays, generator)
        if span.start:
            progress(span.start)
        draws = _walk_within(bound, prior, *next(batches), walk, taus, generator, tau_chains)
        for name in names:
            batch = getattr(draws, name)
            if name not in arrays:
                arrays[name] = torch.empty(shape, dtype=batch.dtype)
            arrays[name][span] = batch
        done.add(draws.kept, (draws.tau, draws.restarted, draws.residual, draws.iterations))
    done.save(arrays, generator)
    progress(len(data))
    tau, restarted, residual, iterations = zip(*done.parts)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return Draws(arrays["y"], arrays["x"], tau[0], sum(restarted), torch.cat(done.kept), mean(residual), mean(iterations), arrays.get("sample"))


def _walk_within(bound: float, prior: Denoiser, batch: Observations, before: Tensor | None, walk: Walk, *how: Any) -> Draws:
    """`walk_batch`, where samples beyond the bound are walked again: see `e_step`."""
    draws = walk_batch(prior, batch, before, walk, *how)
    y, x, sample = draws.y, draws.x, draws.x if draws.sample is None else draws.sample
    restarted = 0
    for _ in range(RETRIES):
        bad = escaped(x, bound).nonzero()[:, 0]
        if not len(bad):
            break
        restarted += len(bad)
        again = walk_batch(prior, batch.rows(bad), None if before is None else before[bad], walk, *how)
        y, x = y.index_copy(0, bad, again.y), x.index_copy(0, bad, again.x)
        sample = sample.index_copy(0, bad, again.x if again.sample is None else again.sample)
    bad = escaped(x, bound)
    if bool(bad.any()):
        last = torch.zeros_like(x) if before is None else before
        y, x, sample = (torch.where(bad.reshape(-1, *[1] * (x.ndim - 1)), last, a) for a in (y, x, sample))
    return draws._replace(y=y, x=x, sample=None if draws.sample is None else sample, restarted=restarted, kept=bad)
