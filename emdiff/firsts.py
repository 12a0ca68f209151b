"""Round 0: first samples, and the network that the start leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff.ahead import ahead
from emdiff.components import STAGES, fit_mixture
from emdiff.data import Data, Observations, measured
from emdiff.em import e_step
from emdiff.first_samples import Deviations, deviations, first_samples
from emdiff.folder import RunFolder
from emdiff.gaussian import fit_gaussian, pathwise
from emdiff.mdae import MDAE
from emdiff.near import beside, near_data
from emdiff.outline import Listener, Plan
from emdiff.posterior import sample_posterior
from emdiff.precision import set_precision
from emdiff.prior import Prior, build_network, load_prior
from emdiff.processes import ALONE, Team
from emdiff.rows import BLOCK, Array, Index, Rows, row_spans, spans, steps
from emdiff.scale import Scale
from emdiff.smooth import correlation_length
from emdiff.start import antithetic, recorrupt, self_supervised_loss
from emdiff.streams import stream, stream_seed
from emdiff.training import Optimiser, Trained, train
from emdiff.turns import those_of
from emdiff.written import NewArray

GAUSSIAN_ITERATIONS = 20
"""EM iterations of the Gaussian start, where it has no closed form."""

HELD_OUT = 4096
"""Most observations held out of the self-supervised training: each check looks at all of them."""


def start_round(
    data: Data, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, team: Team = ALONE
) -> tuple[Array, Prior, dict[str, Any]]:  # fmt: skip
    """First samples x (N, *S), the network they leave behind, and figures; data standardised. Each process makes its part of the samples."""
    if plan.init_prior is not None:
        return start_from_prior(data, scale, plan, run, listener, team)
    if plan.start.kind == "mixture":
        return start_from_mixture(data, scale, plan, run, listener, team)
    torch.manual_seed(stream_seed(plan.seed, "network"))
    denoiser = set_precision(build_network(data.shape, **plan.network), plan.device)
    metrics, by = dict[str, Any](start=plan.start.kind), Deviations()
    if plan.start.kind == "self-supervised":
        trained = train_start(denoiser, data, plan, listener, run.checkpoint(0), team)
        denoiser = trained.denoiser
        metrics |= {"start_steps": trained.steps, "start_held_out": trained.held_out, "retreats": trained.retreats}
        by = team.lead(deviations, denoiser, unseen(data, plan), stream(plan.seed, "deviations", device=plan.device))
        metrics |= {"start_factor": by.c, "start_variance": by.v}
    own, gaussian = those_of(data, team.rows(len(data))), None
    if plan.start.kind == "gaussian":
        bar, draw = listener.phase("start: Gaussian EM", GAUSSIAN_ITERATIONS), stream(team.seed(plan.seed), "gaussian")
        length = team.lead(correlation_length, data, stream(plan.seed, "smooth"))
        gaussian = fit_gaussian(own, GAUSSIAN_ITERATIONS, generator=draw, progress=bar, total=team.total, length=length).to(plan.device)
    draw, x, largest = stream(team.seed(plan.seed), "first samples", device=plan.device), own_x(run, own, team), 0.0
    bar = listener.phase("start: first samples", len(own))
    parts = steps(0, len(own), plan.walk.batch)
    for span, batch in zip(parts, ahead(own.rows, parts, torch.device(plan.device))):
        if plan.start.kind == "gaussian":
            part = pathwise(gaussian, batch.observer, batch.obs, draw)
        else:
            part = first_samples(denoiser, batch, draw, by)
        x[span], largest = part, max(largest, float(part.abs().max()))
        bar(span.stop)
    metrics["bound"] = 2 * max(team.gather(largest))
    return run.whole(0, "x", x, team), Prior(denoiser, scale, data.shape, plan.walk.tau_last, plan.network), metrics


def unseen(data: Data, plan: Plan) -> Iterator[Observations]:
    """Batches of the observations that the start's training was not shown."""
    first = len(data) - held_out(len(data))
    return (data.rows(part).to(plan.device) for part in steps(first, len(data), plan.walk.batch))


def own_x(run: RunFolder, own: Data, team: Team) -> NewArray:
    """Where this process puts its first samples, of its own data."""
    return run.scratch(0, team.mark("x"), (len(own), *own.shape))


def start_from_mixture(
    data: Data, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, team: Team
) -> tuple[Array, Prior, dict[str, Any]]:  # fmt: skip
    """As `start_round`: a mixture fitted to the observations becomes the base of an untrained network; first samples are exact draws."""
    torch.manual_seed(stream_seed(plan.seed, "network"))
    found = team.lead(fit_mixture, data, stream(plan.seed, "mixture"), listener.phase("start: mixtures of Gaussians", STAGES))
    network = {**plan.network, "base": len(found.denoiser.weights)}
    denoiser = build_network(data.shape, **network)
    denoiser.base = found.denoiser
    denoiser.to(plan.device)
    own = those_of(data, team.rows(len(data)))
    draw, bar = stream(team.seed(plan.seed), "first samples", device=plan.device), listener.phase("start: first samples", len(own))
    draws = e_step(denoiser, own, None, plan.walk, draw, progress=bar, store=lambda name, shape: run.scratch(0, team.mark(name), shape))
    x = run.whole(0, "sample", draws.sample, team)
    by_number = lambda values: {str(J): value for J, value in values.items()}
    metrics = {"start": "mixture", "components": len(found.denoiser.weights)}
    metrics |= {"members": by_number(found.members), "components_held_out": by_number(found.held_out)}
    metrics["bound"] = 2 * max(float(x[part].abs().max()) for part in row_spans(x))
    return x, Prior(denoiser, scale, data.shape, plan.walk.tau_last, network), metrics


def start_from_prior(
    data: Data, scale: Scale, plan: Plan, run: RunFolder, listener: Listener, team: Team
) -> tuple[Array, Prior, dict[str, Any]]:  # fmt: skip
    """Samples x | obs (N, *S) under a prior trained elsewhere, that prior, and figures; data standardised with its scale."""
    prior = load_prior(Path(plan.init_prior), plan.device)
    standard, draws = prior._replace(scale=Scale(0.0, 1.0)), stream(team.seed(plan.seed), "first samples", device=plan.device)
    own = those_of(data, team.rows(len(data)))
    x, largest = own_x(run, own, team), 0.0
    for span in spans(len(own), math.prod(data.shape), len(own), BLOCK):
        phase = lambda name, total, first=span.start: listener.phase(f"start: {name}" + (f" from {first}" if first else ""), total)
        part = sample_posterior(standard, own.rows(span), plan.walk, 1, draws, phase).x[:, 0]
        x[span], largest = part, max(largest, float(part.abs().max()))
    metrics = {"start": "prior", "bound": 2 * max(team.gather(largest))}
    return run.whole(0, "x", x, team), prior._replace(scale=scale, tau_last=plan.walk.tau_last), metrics


def train_start(denoiser: MDAE, data: Data, plan: Plan, listener: Listener, checkpoint: Path, team: Team = ALONE) -> Trained:
    """Train a denoiser on recorrupted observations, half a batch of them with both signs, a tenth held out, at most HELD_OUT."""
    loss = Recorruption(near_data(data, torch.device(plan.device)), measured(data).complete)
    bar = listener.phase("start: self-supervised training", plan.start_steps)
    seed = stream_seed(plan.seed, "self-supervised")
    pairs, rate = max(1, plan.batch // 2), Optimiser(rate=plan.rate)
    how = (plan.start_steps, pairs, plan.rate, seed, held_out(len(data)), plan.device, bar, checkpoint, rate)
    return train(denoiser, loss, len(data), *how, team=team)


class Measurements(NamedTuple):
    """A batch of observations as measurements z (B, *S) of levels sigma_z (B or 1, *S or ones)."""

    z: Tensor
    sigma_z: Tensor


class Recorruption:
    """The start's loss: each observation recorrupted, with both signs of what was added (start).

    Args:
        data: Observations that are measurements of x.
        complete: Whether all entries of all data were observed.
    """

    def __init__(self, data: Data, complete: bool) -> None:
        self.data, self.complete = data, complete
        self.first = data.rows(slice(0, 1)).obs

    def read(self, index: Tensor) -> Measurements:
        """The observations at indices (B,), where they lie."""
        batch = self.data.rows(beside(index, self.first))
        return Measurements(*batch.observer.as_measurement(batch.obs))

    def __call__(self, denoiser: MDAE, batch: Measurements, generator: torch.Generator) -> Tensor:
        """The loss of a batch on the generator's device, shape ()."""
        z, sigma = batch.z, batch.sigma_z.expand(batch.z.shape)
        return self_supervised_loss(denoiser, antithetic(recorrupt(z, sigma, generator, complete=self.complete), z))


def first_steps(plan: Plan) -> int:
    """Steps of the first M-step: plan.start_steps where the start trained no network, or none of the many maps of levels; where later ones are
    short, since observations take turns, two of them, for the levels below the observations' noise that the network has not met."""
    if plan.start.kind == "gaussian" or plan.maps:
        return plan.start_steps
    return 2 * plan.steps if plan.refresh else plan.steps


def held_out(count: int) -> int:
    """Observations that the start's training is not shown, the last ones."""
    return max(1, min(count // 10, HELD_OUT))


def level_maps(data: Data) -> Array | None:
    """Levels (N, *S) of observations that are measurements of x, where these differ between entries or data, else None."""
    found = measured(data)
    if found is None or found.uniform:
        return None

    def levels(index: Index) -> Tensor:
        part = data.rows(index)
        return part.observer.as_measurement(part.obs)[1].expand(len(part), *data.shape)

    return Rows((len(data), *data.shape), levels)
