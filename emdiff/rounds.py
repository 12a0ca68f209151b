"""Rounds from the first on: an E-step, what becomes of its chains and pairs, an M-step.

With several processes each walks its part of the observations and leaves it in the round's scratch/, from where all of them train.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.ahead import moved
from emdiff.compiled import for_sampling
from emdiff.data import Data
from emdiff.em import Draws, e_step
from emdiff.firsts import first_steps, level_maps
from emdiff.folder import RunFolder
from emdiff.near import held_near, mirrored, near
from emdiff.noise import updated_level
from emdiff.outline import Listener, Plan
from emdiff.pairs import PairLoss, drawn
from emdiff.pool import restart
from emdiff.prior import Prior, load_prior
from emdiff.processes import ALONE, Team
from emdiff.relax import closes, followed, over_relaxed, relaxed_walk, spreads
from emdiff.rows import Array, chosen_rows, fill
from emdiff.scale import Scale
from emdiff.shrink import keep
from emdiff.strata import relaxed_by_strata
from emdiff.streams import stream, stream_seed
from emdiff.training import Trained, train
from emdiff.turns import in_place, on_turn, rows_of, those_of

QUIET = 128
"""Batch whose gradients leave little enough noise at the full rate."""


class Walked(NamedTuple):
    """What the E-step of a round leaves.

    Attributes:
        draws: Of the observations whose turn it was, as they are trained on.
        relaxed: Whether the round over-relaxes at tau_relax.
        level: The noise level from these draws, in the user's units, where it is not known.
        chi2: Of the measurements that they are jumps from (`followed`).
        shrunk: Mean share k by which strata of them were drawn in (strata); None where they were not looked at so.
    """

    draws: Draws
    relaxed: bool = False
    level: float | None = None
    chi2: float | None = None
    shrunk: float | None = None


def em_round(
    k: int, data: Data, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, team: Team = ALONE
) -> tuple[Array, Prior, dict[str, Any]]:  # fmt: skip
    """One E-step and one M-step: samples x (N, *S), the new prior, figures; data standardised. Leaves chains and samples in the folder."""
    prior, clock = load_prior(run.round_path(k - 1) / "prior.safetensors", plan.device), time.perf_counter()
    rows = on_turn(k, len(data), plan.refresh, plan.seed)
    if k == 1 and not based(prior):
        x = run.array(0, "samples").map(scale.standardise)
        walked = Walked(Draws(x, x, 0.0), level=None if plan.level is None else run.figure(0, "noise_std"))
    else:
        walked = walk_all(k, data, rows, prior, scale, plan, run, listener, team)
    draws = walked.draws
    x, pairs = merged(k, rows, draws, scale, plan, run, team)
    team.once(lambda: run.put(k, "samples", x, scale.restore))
    chi2 = walked.chi2
    close = k > 1 and not walked.relaxed and not plan.strata and chi2 is not None and team.lead(closes, k, plan, those_of(data, rows), chi2)
    pairs = over_relaxed(pairs) if close else pairs
    seconds_e, clock = time.perf_counter() - clock, time.perf_counter()
    trained = m_step(k, prior, pairs, data, plan, run, listener, team)
    metrics = {
        **({} if chi2 is None else {"chi2": chi2}),
        "over_relaxed": walked.relaxed or close,
        **({} if walked.shrunk is None else {"shrunk": walked.shrunk}),
        "loss": trained.loss,
        "retreats": trained.retreats,
        "restarted": draws.restarted,
        "kept": 0 if draws.kept is None else int(draws.kept.sum()),
        "solver_residual": draws.residual,
        "solver_iterations": draws.iterations,
        **({"departure_kept": trained.denoiser.keep.tolist()} if based(prior) else {}),
        "seconds_e": seconds_e,
        "seconds_m": time.perf_counter() - clock,
        **({} if plan.level is None else {"noise_std": walked.level}),
    }
    return x, prior._replace(denoiser=trained.denoiser), metrics


def based(prior: Prior) -> bool:
    """Whether a prior departs from a mixture."""
    return getattr(prior.denoiser, "base", None) is not None


def walk_all(
    k: int, data: Data, rows: Tensor | None, prior: Prior, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, team: Team
) -> Walked:  # fmt: skip
    """The E-step of the observations at `rows`, None for all; each process walks its part of them."""
    some, mine, here = those_of(data, rows), team.rows(len(data), rows), torch.device(plan.device)
    filed = lambda name, shape: run.scratch(k, team.mark(name), shape)  # noqa: E731
    store = mirrored(filed, here) if team.alone and rows is None else filed  # with turns, files are written from files
    own, seed = those_of(data, mine), team.seed(plan.seed)
    relax = k > 1 and spreads(k, plan, run.figure(k - 1, "sample_std"), scale)
    bar = listener.phase(f"round {k}: E-step", len(own))
    walk = team.lead(relaxed_walk, some, plan.walk) if relax else plan.walk
    chains = rows_of(run.array(k - 1, "chains"), mine) if k > 1 else None
    if walk.pool and not (based(prior) and not prior.denoiser.departs()):
        chains = restart(prior, own, chains, walk.pool, walk.tau_first, stream(seed, "pool", k, device=plan.device), store)
    walker, draw = for_sampling(prior, plan.device, plan.compile).denoiser, stream(seed, "e-step", k, device=plan.device)
    state = run.checkpoint(k, team.mark("walk"))
    part = e_step(walker, own, chains, walk, draw, run.figure(0, "bound"), bar, plan.walk.tau_last, store, state)
    draws = of_all(k, part, run, team)
    level = None
    if plan.level is not None:
        complete = (draws.y, draws.tau) if draws.sample is None else (draws.sample, 0.0)
        level = scale.std * team.lead(updated_level, some, *complete, stream(plan.seed, "noise", k))
    chi2, share = team.lead(followed, some, draws), None
    if plan.strata and k > 1 and not relax:
        bar, draw = listener.phase(f"round {k}: strata", 2 * len(own)), stream(seed, "strata", k, device=plan.device)
        made = held_near(filed, here) if team.alone and rows is None else filed
        part, share = relaxed_by_strata(walker, own, part, draw, made, walk.batch, team.total, bar)
        draws = of_all(k, part, run, team, "relaxed_")
    return Walked(over_relaxed(draws) if relax else draws, relax, level, chi2, share)


def of_all(k: int, draws: Draws, run: RunFolder, team: Team, prefix: str = "") -> Draws:
    """The draws of all processes, from those of each, whose files' names begin so."""
    arrays = {name: run.whole(k, prefix + name, array, team) for name in ("y", "x", "sample") if (array := getattr(draws, name)) is not None}
    restarted, kept, residual, iterations = zip(*team.gather((draws.restarted, draws.kept, draws.residual, draws.iterations)))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return Draws(arrays["y"], arrays["x"], draws.tau, sum(restarted), torch.cat(kept), mean(residual), mean(iterations), arrays.get("sample"))


def merged(
    k: int, rows: Tensor | None, draws: Draws, scale: Scale, plan: Plan, run: RunFolder, team: Team
) -> tuple[Array, Draws]:  # fmt: skip
    """Samples x (N, *S) and the pairs to train on, from draws of the observations at `rows`, None for all, and the last ones of the others."""
    extra, draw = math.sqrt(max(plan.walk.tau_last**2 - draws.tau**2, 0.0)), stream(plan.seed, "chains", k)
    end = lambda y: y + extra * torch.randn(y.shape, generator=draw) if extra else y  # noqa: E731
    x = draws.x if draws.sample is None else draws.sample
    if rows is None:
        team.once(lambda: run.put(k, "chains", draws.y, end))
        return x, drawn(draws)

    def write() -> None:
        ends = fill(run.scratch(k, "ends", draws.y.shape), draws.y, end).commit()
        run.put(k, "chains", in_place(rows, ends, ~draws.kept, run.array(k - 1, "chains")))

    team.once(write)
    x = in_place(rows, x, ~draws.kept, run.array(k - 1, "samples").map(scale.standardise))
    return x, Draws(run.array(k, "chains"), x, plan.walk.tau_last)


def m_step(k: int, prior: Prior, pairs: Draws, data: Data, plan: Plan, run: RunFolder, listener: Listener, team: Team) -> Trained:
    """The prior's denoiser retrained on pairs, with a base all but a tenth, which says how much of its departure is kept."""
    departs = based(prior)
    if departs:
        pairs = shuffled(pairs, stream(plan.seed, "held out"))
    here = torch.device(plan.device)
    maps = near(level_maps(data), here) if plan.maps else None
    pairs = pairs._replace(x=near(pairs.x, here), y=near(pairs.y, here))
    loss = PairLoss(pairs, plan.walk.tau_last, maps, even=departs, carried=maps is not None and maps.device.type != here.type)
    steps = first_steps(plan) if k == 1 else plan.steps
    count = len(pairs.x) - (max(1, len(pairs.x) // 10) if departs else 0)
    how = (plan.batch, rate_of(k, plan), stream_seed(plan.seed, "m-step", k), 0, plan.device, listener.phase(f"round {k}: M-step", steps))
    trained = train(prior.denoiser, loss, count, steps, *how, run.checkpoint(k), team=team)
    if departs:
        unseen, draw = torch.arange(count, len(pairs.x)), stream(plan.seed, "keep", k, device=plan.device)
        drawn_pairs = lambda index, g: loss.inputs(moved(loss.read(index), here), g)  # noqa: E731
        trained.denoiser.keep = team.lead(lambda: keep(trained.denoiser, drawn_pairs, unseen, draw).cpu()).to(plan.device)
    return trained


def rate_of(k: int, plan: Plan) -> float:
    """The rate of round k's M-step: after a self-supervised start half of the start's, then a third, and so on down to batch / QUIET of it.

    That start leaves a network which is nearly right. What M-steps have to add is little, and what the noise of their gradients leaves behind enters
    the samples of the next E-step as variance, which EM is slow to remove. That noise goes with rate over batch. Falling rates are those of
    stochastic approximation (SAEM; Delyon, Lavielle & Moulines 1999).
    """
    return plan.rate / max(1.0, min(k + 1, QUIET / plan.batch)) if plan.start.kind == "self-supervised" else plan.rate


def shuffled(draws: Draws, generator: torch.Generator) -> Draws:
    """The pairs in an order that is the same in every round, so that those held out never train."""
    order = torch.randperm(len(draws.x), generator=generator)
    return draws._replace(x=chosen_rows(draws.x, order), y=chosen_rows(draws.y, order), sample=None)
