r"""The loop: start, then E-step and M-step in turn, each round a folder (runs). Nothing here ever sees the truth.

Round k continues from what round k - 1 left on disk and from a seed made of (seed, k), so an interrupted fit and an uninterrupted one
are one code path.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from emdiff.compiled import for_sampling
from emdiff.components import STAGES, fit_mixture
from emdiff.data import Data, held, measured
from emdiff.em import Draws, PairLoss, Walk, drawn, e_step, over_relaxed, relaxed_walk
from emdiff.gaussian import condition, fit_gaussian
from emdiff.mdae import MDAE
from emdiff.metrics import prior_figures, sample_figures
from emdiff.noise import depends_on_signal, updated_level, with_counts, with_level
from emdiff.pool import restart
from emdiff.posterior import sample_posterior
from emdiff.prior import Prior, build_network, load_prior, sample_prior, save_prior, set_precision
from emdiff.rows import BLOCK, Array, Index, Rows, chosen_rows, fill, row_spans, spans
from emdiff.runs import Run, latest_prior
from emdiff.scale import Scale
from emdiff.shrink import keep
from emdiff.start import Choice, first_samples, hidden_variance, recorrupt, self_supervised_loss
from emdiff.streams import stream, stream_seed
from emdiff.training import Trained, train
from emdiff.turns import in_place, on_turn, rows_of, those_of
from emdiff.verdict import best_iteration, should_stop

GAUSSIAN_ITERATIONS = 20
"""EM iterations of the Gaussian start, where it has no closed form."""

HELD_OUT = 4096
"""Most observations held out of the self-supervised training: each check looks at all of them."""

PRIOR_LEVELS = 32
"""Levels of the prior samples that each round's figures and pictures are made of."""

SPREAD = 1.005
"""An iteration over-relaxes if the last samples' std exceeds the data's own, estimated from the observations, by this factor."""


class Plan(NamedTuple):
    """All that a fit has to know.

    Attributes:
        iters: EM iterations.
        start: The start, decided.
        walk: The E-step.
        network: Arguments of `build_network`.
        start_steps: Most training steps of the self-supervised start; those of the first M-step after a Gaussian one (`first_steps`).
        steps: Training steps of an M-step.
        batch: Data per training step.
        rate: Learning rate.
        refresh: Observations walked anew in each iteration from the second on, in turn; the others keep their last pair, chain and jump. 0 for all.
        relax: Last iteration that may over-relax; it does so if the samples' spread exceeds the data's.
        maps: Whether observations are fused whose levels differ between entries or data.
        prior_samples: Prior samples drawn per round for figures.
        seed: Seed of everything random.
        device: "cpu" or "cuda".
        level: Where the noise level is not known, its first estimate, which EM updates; else None.
        init_prior: The prior that EM starts from; None for a start from the observations alone.
        stop: End when the figures that need no truth have stopped to improve, and keep the best iteration (verdict).
        compile: Run the network of the E-step and of prior samples through torch.compile (compiled).
    """

    iters: int
    start: Choice
    walk: Walk
    network: dict[str, Any]
    start_steps: int = 1200
    steps: int = 700
    batch: int = 128
    rate: float = 2e-3
    refresh: int = 0
    relax: int = 0
    maps: bool = False
    prior_samples: int = 500
    seed: int = 0
    device: str = "cpu"
    stop: bool = False
    compile: bool = False
    level: float | None = None
    init_prior: str | None = None


class Listener(Protocol):
    """Whoever is told of a fit's progress."""

    def phase(self, name: str, total: int) -> Callable[..., None]:
        """A phase of `total` units begins; call the result with the units done, and a note."""
        ...

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """Round k is complete. Pictures are samples (n, *S) in the user's units."""
        ...


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


def start_round(data: Data, scale: Scale, plan: Plan, run: Run, listener: Listener) -> tuple[Array, Prior, dict[str, Any]]:
    """First samples x (N, *S), the network they leave behind, and figures; data standardised."""
    if plan.init_prior is not None:
        return start_from_prior(data, scale, plan, run, listener)
    if plan.start.kind == "mixture":
        return start_from_mixture(data, scale, plan, run, listener)
    torch.manual_seed(stream_seed(plan.seed, "network"))
    denoiser = set_precision(build_network(data.shape, **plan.network), plan.device)
    metrics: dict[str, Any] = {"start": plan.start.kind}
    v = 0.0
    if plan.start.kind == "self-supervised":
        trained = train_start(denoiser, data, plan, listener, run.checkpoint(0))
        denoiser = trained.denoiser
        metrics |= {"start_steps": trained.steps, "start_held_out": trained.held_out, "retreats": trained.retreats}
        if plan.maps:
            new = data.rows(slice(len(data) - min(held_out(len(data)), 2000), len(data))).to(plan.device)
            metrics["hidden_variance"] = v = hidden_variance(denoiser, new, stream(plan.seed, "hidden variance", device=plan.device))
    gaussian = None
    if plan.start.kind == "gaussian":
        bar = listener.phase("start: Gaussian EM", GAUSSIAN_ITERATIONS)
        gaussian = fit_gaussian(data, GAUSSIAN_ITERATIONS, generator=stream(plan.seed, "gaussian"), progress=bar).to(plan.device)
    draw, x, largest = stream(plan.seed, "first samples", device=plan.device), run.scratch(0, "x", (len(data), *data.shape)), 0.0
    bar = listener.phase("start: first samples", len(data))
    for i in range(0, len(data), plan.walk.batch):
        span = slice(i, min(i + plan.walk.batch, len(data)))
        batch = data.rows(span).to(plan.device)
        if plan.start.kind == "gaussian":
            part = condition(gaussian, batch.observer, batch.obs, draw).x
        else:
            part = first_samples(denoiser, batch, draw, v)
        x[span], largest = part, max(largest, float(part.abs().max()))
        bar(span.stop)
    metrics["bound"] = 2 * largest
    return x.commit(), Prior(denoiser, scale, data.shape, plan.walk.tau_last, plan.network), metrics


def start_from_mixture(data: Data, scale: Scale, plan: Plan, run: Run, listener: Listener) -> tuple[Array, Prior, dict[str, Any]]:
    """As `start_round`: a mixture fitted to the observations becomes the base of an untrained network; first samples are exact draws."""
    torch.manual_seed(stream_seed(plan.seed, "network"))
    found = fit_mixture(data, stream(plan.seed, "mixture"), listener.phase("start: mixtures of Gaussians", STAGES))
    network = {**plan.network, "base": len(found.denoiser.weights)}
    denoiser = build_network(data.shape, **network)
    denoiser.base = found.denoiser
    denoiser.to(plan.device)
    draw, bar = stream(plan.seed, "first samples", device=plan.device), listener.phase("start: first samples", len(data))
    draws = e_step(denoiser, data, None, plan.walk, draw, progress=bar, store=lambda name, shape: run.scratch(0, name, shape))
    x = draws.sample.commit()
    held_out = {str(j): value for j, value in found.held_out.items()}
    metrics = {"start": "mixture", "components": found.components, "members": found.members, "components_held_out": held_out}
    metrics["bound"] = 2 * max(float(x[part].abs().max()) for part in row_spans(x))
    return x, Prior(denoiser, scale, data.shape, plan.walk.tau_last, network), metrics


def start_from_prior(data: Data, scale: Scale, plan: Plan, run: Run, listener: Listener) -> tuple[Array, Prior, dict[str, Any]]:
    """Samples x | obs (N, *S) under a prior trained elsewhere, that prior, and figures; data standardised with its scale."""
    prior = load_prior(Path(plan.init_prior), plan.device)
    standard, draws = prior._replace(scale=Scale(0.0, 1.0)), stream(plan.seed, "first samples", device=plan.device)
    x, largest = run.scratch(0, "x", (len(data), *data.shape)), 0.0
    for span in spans(len(data), math.prod(data.shape), len(data), BLOCK):
        phase = lambda name, total, first=span.start: listener.phase(f"start: {name}" + (f" from {first}" if first else ""), total)
        part = sample_posterior(standard, data.rows(span), plan.walk, 1, draws, phase).x[:, 0]
        x[span], largest = part, max(largest, float(part.abs().max()))
    return x.commit(), prior._replace(scale=scale, tau_last=plan.walk.tau_last), {"start": "prior", "bound": 2 * largest}


def train_start(denoiser: MDAE, data: Data, plan: Plan, listener: Listener, checkpoint: Path) -> Trained:
    """Train a denoiser on recorrupted observations, a tenth of them held out, at most HELD_OUT."""

    def loss(denoiser: MDAE, index: Tensor, draws: torch.Generator) -> Tensor:
        batch = data.rows(index.cpu())
        z, sigma = batch.observer.as_measurement(batch.obs)
        return self_supervised_loss(denoiser, recorrupt(z.to(draws.device), sigma.expand(z.shape).to(draws.device), draws))

    bar = listener.phase("start: self-supervised training", plan.start_steps)
    seed = stream_seed(plan.seed, "self-supervised")
    return train(denoiser, loss, len(data), plan.start_steps, plan.batch, plan.rate, seed, held_out(len(data)), plan.device, bar, checkpoint)


def first_steps(plan: Plan) -> int:
    """Steps of the first M-step: plan.start_steps where the start trained no network, or none of the many maps of levels; where later ones are
    short, since observations take turns, two of them, for the levels below the observations' noise that the network has not met."""
    if plan.start.kind == "gaussian" or plan.maps:
        return plan.start_steps
    return 2 * plan.steps if plan.refresh else plan.steps


def held_out(count: int) -> int:
    """Observations that the start's training is not shown, the last ones."""
    return max(1, min(count // 10, HELD_OUT))


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


def level_maps(data: Data) -> Array | None:
    """Levels (N, *S) of observations that are measurements of x, where these differ between entries or data, else None."""
    found = measured(data)
    if found is None or found.uniform:
        return None

    def levels(index: Index) -> Tensor:
        part = data.rows(index)
        return part.observer.as_measurement(part.obs)[1].expand(len(part), *data.shape)

    return Rows((len(data), *data.shape), levels)
