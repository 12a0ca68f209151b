r"""The loop: start, then E-step and M-step in turn, each round a folder (runs). Nothing here ever sees the truth.

Round k continues from what round k - 1 left on disk and from a seed made of (seed, k), so an interrupted fit and an uninterrupted one
are one code path.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.compiled import for_sampling
from emdiff.data import Data, held
from emdiff.finished import latest_prior
from emdiff.firsts import start_round
from emdiff.folder import RunFolder
from emdiff.metrics import prior_figures, sample_figures
from emdiff.near import near_data
from emdiff.noise import depends_on_signal, with_counts, with_level
from emdiff.outline import Listener, Plan
from emdiff.prior import Prior, load_prior, sample_prior, save_prior
from emdiff.processes import ALONE, Team
from emdiff.rounds import em_round
from emdiff.rows import Array, Rows
from emdiff.runs import Run
from emdiff.scale import Scale
from emdiff.streams import stream
from emdiff.turns import on_turn, rows_of, those_of
from emdiff.verdict import best_iteration, should_stop

PRIOR_LEVELS = 32
"""Levels of the prior samples that each round's figures and pictures are made of."""

Judge = Callable[[Array, Tensor | None], dict[str, float]]
"""Figures of samples x (n, *S) of the observations of indices (n,), None for all."""


def run_fit(
    data: Data, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, evaluate: Judge = lambda x, rows: {}, team: Team = ALONE
) -> Prior:  # fmt: skip
    """Fit a prior, continuing whatever the run folder holds.

    Args:
        data: Observations in the user's units.
        scale: Their scale.
        plan: Settings.
        run: The run folder; a `Run` in the first process.
        listener: Told of phases, and in the first process of rounds.
        evaluate: Figures that only the caller can compute, such as errors against a truth; asked in the first process.
        team: The processes that fit it, all with the same data and plan.

    Returns:
        The prior of the last round, or of the best where plan.stop.
    """
    finished = team.lead(run.finished)
    if finished >= 0:
        scale = load_prior(run.round_path(0) / "prior.safetensors").scale  # a fork may have another seed, its rounds keep their scale
    current = None
    for k in range(finished + 1, plan.iters + 1):
        if plan.stop and k > 1 and team.lead(lambda: should_stop(run.history())):
            break
        clock = time.perf_counter()
        team.once(lambda k=k: run.begin(k))
        current = current_data(k, data, current, scale, plan, run)
        how = (current.standard, scale, plan, run, listener, team)
        x, prior, metrics = start_round(*how) if k == 0 else em_round(k, *how)
        team.once(end_round, k, current, scale, x, prior, metrics, clock, plan, run, listener, evaluate)
    team.once(lambda: run.choose(best_iteration(run.history()) if plan.stop else None))
    return load_prior(latest_prior(run.path), plan.device)


def end_round(
    k: int, data: Current, scale: Scale, x: Array, prior: Prior, metrics: dict[str, Any], clock: float, plan: Plan, run: Run, listener: Listener,
    evaluate: Judge,
) -> None:  # fmt: skip
    """Write round k, with samples x (N, *S), standardised, and all figures; `clock` is when it began. For one process."""
    if k == 0 and plan.level is not None:
        metrics["noise_std"] = plan.level
    save_prior(run.round_path(k) / "prior.safetensors", prior)
    if k == 0:  # other rounds put theirs before they train
        run.put(0, "samples", x, scale.restore)
    samples = run.array(k, "samples")
    pictures = {"samples": samples[:64]}
    if k:
        bar = listener.phase(f"round {k}: prior samples", plan.prior_samples)
        fast, draw = for_sampling(prior, plan.device, plan.compile), stream(plan.seed, "prior samples", k, device=plan.device)
        fresh = sample_prior(fast, plan.prior_samples, draw, PRIOR_LEVELS, progress=bar)
        pictures["prior"] = fresh[:64]
        metrics |= prior_figures(data.given, fresh, stream(plan.seed, "figures", k))
    rows = on_turn(k, len(data.given), plan.refresh, plan.seed)
    new = rows_of(samples if x.device.type == "cpu" else Rows(x.shape, lambda at: scale.restore(x[at])), rows)
    metrics |= {"iter": k, **sample_figures(those_of(data.near, rows), new), **metrics, **evaluate(new, rows), "seconds": time.perf_counter() - clock}
    run.finish(k, metrics)
    listener.round(k, metrics, pictures)


class Current(NamedTuple):
    """The observations with the noise that a round takes for theirs.

    Attributes:
        given: In the user's units.
        near: The same, once the start is over on the device that works on them, where there is room.
        standard: Standardised, in memory or there.
        started: Whether the start is over.
    """

    given: Data
    near: Data
    standard: Data
    started: bool


def current_data(k: int, data: Data, before: Current | None, scale: Scale, plan: Plan, run: RunFolder) -> Current:
    """The observations as round k takes them; those of the round before where nothing changed."""
    given, here = with_current_noise(k, data, plan, run), torch.device(plan.device)
    if before is not None and given is before.given and before.started == bool(k):
        return before
    near = near_data(given, here) if k else given
    standard = held(scale.view(near))
    return Current(given, near, near_data(standard, here) if k else standard, bool(k))


def with_current_noise(k: int, data: Data, plan: Plan, run: RunFolder) -> Data:
    """The observations with the noise that round k takes for theirs: an unknown level, or counts, as estimated by round k - 1."""
    if plan.level is not None:
        return with_level(data, run.figure(k - 1, "noise_std") if k else plan.level)
    if depends_on_signal(data):
        return with_counts(data, run.array(k - 1, "samples") if k else None)
    return data
