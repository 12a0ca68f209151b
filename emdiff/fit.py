r"""The loop: start, then E-step and M-step in turn, each round a folder (runs). Nothing here ever sees the truth.

Round k continues from what round k - 1 left on disk and from a seed made of (seed, k), so an interrupted fit and an uninterrupted one
are one code path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emdiff.compiled import for_sampling
from emdiff.data import Data, held
from emdiff.em import Draws, e_step, relaxed_walk
from emdiff.firsts import first_steps, level_maps, start_round
from emdiff.metrics import prior_figures, sample_figures
from emdiff.noise import depends_on_signal, updated_level, with_counts, with_level
from emdiff.outline import Listener, Plan
from emdiff.pairs import PairLoss, drawn, over_relaxed
from emdiff.pool import restart
from emdiff.prior import Prior, load_prior, sample_prior, save_prior
from emdiff.rows import Array, chosen_rows, fill
from emdiff.runs import Run, latest_prior
from emdiff.scale import Scale
from emdiff.shrink import keep
from emdiff.streams import stream, stream_seed
from emdiff.training import train
from emdiff.turns import in_place, on_turn, rows_of, those_of
from emdiff.verdict import best_iteration, should_stop

PRIOR_LEVELS = 32
"""Levels of the prior samples that each round's figures and pictures are made of."""

SPREAD = 1.005
"""An iteration over-relaxes if the last samples' std exceeds the data's own, estimated from the observations, by this factor."""


def run_fit(
    data: Data,
    scale: Scale,
    plan: Plan,
    run: Run,
    listener: Listener,
    evaluate: Callable[[Array, Tensor | None], dict[str, float]] = lambda x, rows: {},
) -> Prior:
    """Fit a prior, continuing whatever the run folder holds.

    Args:
        data: Observations in the user's units.
        scale: Their scale.
        plan: Settings.
        run: The run folder.
        listener: Told of phases and rounds.
        evaluate: Figures of samples x (n, *S) of the observations of indices `rows` (n,), None for all, which only the caller can compute, such as
            errors against a truth.

    Returns:
        The prior of the last round, or of the best where plan.stop.
    """
    if run.finished() >= 0:
        scale = load_prior(run.round_path(0) / "prior.safetensors").scale  # a fork may have another seed, its rounds keep their scale
    given = data
    for k in range(run.finished() + 1, plan.iters + 1):
        if plan.stop and k > 1 and should_stop(run.history()):
            break
        clock = time.perf_counter()
        run.begin(k)
        data = with_current_noise(k, given, plan, run)
        standard = held(scale.view(data))
        x, prior, metrics = start_round(standard, scale, plan, run, listener) if k == 0 else em_round(k, standard, scale, plan, run, listener)
        if k == 0 and plan.level is not None:
            metrics["noise_std"] = plan.level
        save_prior(run.round_path(k) / "prior.safetensors", prior)
        samples = fill(run.new_array(k, "samples", x.shape), x, scale.restore).commit()
        pictures = {"samples": samples[:64]}
        if k:
            bar = listener.phase(f"round {k}: prior samples", plan.prior_samples)
            fast, draw = for_sampling(prior, plan.device, plan.compile), stream(plan.seed, "prior samples", k, device=plan.device)
            fresh = sample_prior(fast, plan.prior_samples, draw, PRIOR_LEVELS, progress=bar)
            pictures["prior"] = fresh[:64]
            metrics |= prior_figures(data, fresh, stream(plan.seed, "figures", k))
        rows = on_turn(k, len(data), plan.refresh, plan.seed)
        new = rows_of(samples, rows)
        metrics |= {"iter": k, **sample_figures(those_of(data, rows), new), **evaluate(new, rows), "seconds": time.perf_counter() - clock}
        run.finish(k, metrics)
        listener.round(k, metrics, pictures)
    run.choose(best_iteration(run.history()) if plan.stop else None)
    return load_prior(latest_prior(run.path), plan.device)


def with_current_noise(k: int, data: Data, plan: Plan, run: Run) -> Data:
    """The observations with the noise that round k takes for theirs: an unknown level, or counts, as estimated by round k - 1."""
    if plan.level is not None:
        return with_level(data, run.figure(k - 1, "noise_std") if k else plan.level)
    if depends_on_signal(data):
        return with_counts(data, run.array(k - 1, "samples") if k else None)
    return data


def em_round(k: int, data: Data, scale: Scale, plan: Plan, run: Run, listener: Listener) -> tuple[Array, Prior, dict[str, Any]]:
    """One E-step and one M-step: samples x (N, *S), the new prior, figures; data standardised. Leaves the chains in the folder."""
    prior = load_prior(run.round_path(k - 1) / "prior.safetensors", plan.device)
    clock, store = time.perf_counter(), lambda name, shape: run.scratch(k, name, shape)
    rows = on_turn(k, len(data), plan.refresh, plan.seed)
    walk, relax = plan.walk, k > 1 and over_relaxes(k, plan, run.figure(k - 1, "sample_std"), scale)
    based = getattr(prior.denoiser, "base", None) is not None
    if k == 1 and not based:
        x = run.array(0, "samples").map(scale.standardise)
        draws, level = Draws(x, x, 0.0), None if plan.level is None else run.figure(0, "noise_std")
    else:
        some, generator = those_of(data, rows), stream(plan.seed, "e-step", k, device=plan.device)
        bar = listener.phase(f"round {k}: E-step", len(some))
        walk = relaxed_walk(some, walk) if relax else walk
        chains, bound = run.array(k - 1, "chains") if k > 1 else None, run.figure(0, "bound")
        if walk.pool and not (based and not prior.denoiser.departs()):
            chains = restart(prior, data, chains, walk.pool, walk.tau_first, stream(plan.seed, "pool", k, device=plan.device), store)
        walker = for_sampling(prior, plan.device, plan.compile).denoiser
        draws = e_step(walker, some, rows_of(chains, rows), walk, generator, bound, bar, plan.walk.tau_last, store, run.checkpoint(k, "walk"))
        draws = draws._replace(**{name: getattr(draws, name).commit() for name in ("y", "x", "sample") if getattr(draws, name) is not None})
        if plan.level is not None:
            complete = (draws.y, draws.tau) if draws.sample is None else (draws.sample, 0.0)
            level = scale.std * updated_level(some, *complete, stream(plan.seed, "noise", k))
        draws = over_relaxed(draws) if relax else draws
    extra, draw = math.sqrt(max(plan.walk.tau_last**2 - draws.tau**2, 0.0)), stream(plan.seed, "chains", k)
    end = lambda y: y + extra * torch.randn(y.shape, generator=draw)  # noqa: E731
    x, pairs = draws.x if draws.sample is None else draws.sample, drawn(draws)
    if rows is None:
        fill(run.new_array(k, "chains", draws.y.shape), draws.y, end).close()
    else:
        ends = fill(store("ends", draws.y.shape), draws.y, end).commit()
        merged = in_place(rows, ends, ~draws.kept, chains)
        x = in_place(rows, x, ~draws.kept, run.array(k - 1, "samples").map(scale.standardise))
        pairs = Draws(fill(run.new_array(k, "chains", merged.shape), merged, lambda y: y).commit(), x, plan.walk.tau_last)
    seconds_e, clock = time.perf_counter() - clock, time.perf_counter()
    if based:
        pairs = shuffled(pairs, stream(plan.seed, "held out"))
    loss = PairLoss(pairs, plan.walk.tau_last, level_maps(data) if plan.maps else None, even=based)
    steps = first_steps(plan) if k == 1 else plan.steps
    count = len(pairs.x) - (max(1, len(pairs.x) // 10) if based else 0)
    bar = listener.phase(f"round {k}: M-step", steps)
    seed = stream_seed(plan.seed, "m-step", k)
    trained = train(prior.denoiser, loss, count, steps, plan.batch, plan.rate, seed, 0, plan.device, bar, run.checkpoint(k))
    if based:
        unseen, draw = torch.arange(count, len(pairs.x)), stream(plan.seed, "keep", k, device=plan.device)
        trained.denoiser.keep = keep(trained.denoiser, loss.inputs, unseen, draw)
    metrics = {
        "over_relaxed": bool(relax),
        "loss": trained.loss,
        "retreats": trained.retreats,
        "restarted": draws.restarted,
        "kept": 0 if draws.kept is None else int(draws.kept.sum()),
        "solver_residual": draws.residual,
        "solver_iterations": draws.iterations,
        **({"departure_kept": trained.denoiser.keep.tolist()} if based else {}),
        "seconds_e": seconds_e,
        "seconds_m": time.perf_counter() - clock,
        **({} if plan.level is None else {"noise_std": level}),
    }
    return x, prior._replace(denoiser=trained.denoiser), metrics


def shuffled(draws: Draws, generator: torch.Generator) -> Draws:
    """The pairs in an order that is the same in every round, so that those held out never train."""
    order = torch.randperm(len(draws.x), generator=generator)
    return draws._replace(x=chosen_rows(draws.x, order), y=chosen_rows(draws.y, order), sample=None)


def over_relaxes(k: int, plan: Plan, sample_std: float, scale: Scale) -> bool:
    """Whether round k over-relaxes: the samples of the round before, of std sample_std, spread more than the data do."""
    return k <= plan.relax and sample_std > SPREAD * scale.std
