r"""Training a denoiser: stochastic gradients on a loss over indices, an exponential moving average, an end by length or by held-out loss.

A loss is a function (denoiser, batch, generator) -> scalar (learner.Loss), so clean data, pairs and recorrupted observations are all trained by the
same loop. Everything random comes from one generator seeded per training, so a training that is started again gives the same weights on the same
machine.

The moving average forgets over a fifth of the training, min(decay, (1 + i)/(10 + i)) at step i, and is fresh in every training. In an
M-step the rate falls to 0: what is left of the noise of the gradients would enter every sample of the next E-step, and the
prior's variance would creep up from iteration to iteration (docs/method.md).

A training that is done in parts hands its memory from one part to the next: weights, average, the optimiser's state, the number of steps
taken. Length, rate and average are then those of the whole.

A training that is stopped leaves a state (checkpoint) from which it goes on as if nothing had happened: weights, average, the optimiser's moments,
the generators, the losses. One whose loss diverges goes back to the last good average, with a rate RETREAT times lower, at most TRIES times.

Lightning is imported here, by the learner, and by what watches it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from emdiff.checkpoint import State, grouped, load_state
from emdiff.errors import FitFailed
from emdiff.learner import RETREAT, Feed, Indices, Learner, Loss
from emdiff.memory import Memory, Optimiser
from emdiff.processes import ALONE, Team
from emdiff.watch import Diverged, HeldOut, Reporter, Watch

TRIES = 3
"""How often a lower rate is tried after a divergence."""


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
        denoiser: The moving average of the weights.
        steps: Steps taken.
        loss: Mean loss of the last tenth of the steps.
        held_out: Best held-out loss, or None.
        retreats: Times the loss diverged and the rate was lowered, in all parts.
        memory: What the next part of a training in parts continues from.
    """

    denoiser: nn.Module
    steps: int
    loss: float
    held_out: float | None
    retreats: int = 0
    memory: Memory | None = None


def train(
    denoiser: nn.Module,
    loss: Loss,
    count: int,
    steps: int,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
    held_out: int = 0,
    device: str = "cpu",
    progress: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: Path | None = None,
    optimiser: Optimiser | None = None,
    memory: Memory | None = None,
    total: int | None = None,
    say: Callable[[str], None] = print,
    team: Team = ALONE,
) -> Trained:
    """Train a copy of a denoiser.

    Args:
        denoiser: Where to start from; not changed.
        loss: (denoiser, batch, generator) -> scalar; `learner.Loss` says what a batch is.
        count: Number of data N; indices are 0..N-1.
        steps: Most steps, of this part.
        batch: Data per step.
        rate: Learning rate of Adam.
        seed: Seeds order and draws.
        held_out: Data set aside, the last ones; their loss ends the training and chooses its weights. 0 trains for all steps.
        device: "cpu" or "cuda".
        progress: Called with the step and its loss.
        checkpoint: File for the state of this training, from which it goes on if it is there; None saves nothing.
        optimiser: Replaces `rate`; Adam with a rate that falls to 0, unless held-out data end the training, if None.
        memory: What an earlier part of this training left; None at its beginning.
        total: Steps of all parts; `steps` if None.
        say: Told in one line of each divergence.
        team: The processes that train it together, all with the same arguments: each takes its part of every batch, with draws of its own, and
            gradients are averaged.

    Returns:
        Trained; its denoiser is the moving average, on `device`, in eval mode; the same in all processes.

    Raises:
        FitFailed: if the loss diverges once more after TRIES lower rates, or if processes end with different weights.
    """
    optimiser = optimiser or Optimiser(rate=rate, anneal=not held_out)
    of = f"{count} {steps} {batch} {tuple(optimiser)} {seed} {held_out} {total or steps} {memory.step if memory else 0}"
    of = team.mark(of, 0)
    state = team.lead(load_state, checkpoint, of)
    while True:
        state = state and state._replace(tensors=team.own(state.tensors))
        learner = Learner(copy.deepcopy(denoiser), loss, optimiser, total or steps, seed, memory, state, team, min(batch, count - held_out))
        end = HeldOut(torch.arange(count - held_out, count), every=max(100, (total or steps) // 16), patience=4) if held_out else None
        watch = Watch(learner, end, checkpoint, of)
        for part in (watch, end) if state else ():
            if part is not None:
                part.resume(state)
        try:
            return _trained(learner, [*([end] if end else []), watch, Reporter(progress, watch)], end, watch, count - held_out, steps, batch, device)
        except Diverged as error:
            state = _retreated(learner, watch, error, of, say)


def _trained(
    learner: Learner, callbacks: list[pl.Callback], end: HeldOut | None, watch: Watch, count: int, steps: int, batch: int, device: str
) -> Trained:  # fmt: skip
    """Run a training to its end."""
    left = steps - len(learner.losses)
    if left and not (end and len(learner.losses) - end.best_step >= end.patience * end.every):
        order = torch.Generator().manual_seed(learner.seed ^ 1)
        batches = Indices(torch.arange(count), batch, order, len(learner.losses), learner.team)
        feed = Feed(learner.loss_function, batches, torch.device(device))
        loader = DataLoader(feed, batch_size=None, generator=torch.Generator())
        _trainer(left, device, callbacks, learner.optimiser.clip, learner.team).fit(learner, loader)
        watch.look(learner)
        watch.save(learner)
    _check_equal(learner)
    losses, memory = torch.stack(learner.losses), learner.remember()
    if end and end.weights is not None:
        learner.average.load_state_dict(end.weights)
    tail = float(losses[-max(1, len(losses) // 10) :].mean())
    denoiser = learner.average.to(device).eval().requires_grad_(False)
    return Trained(denoiser, len(losses), tail, end.best if end else None, learner.retreats, memory)


def _retreated(learner: Learner, watch: Watch, error: Diverged, of: str, say: Callable[[str], None]) -> State:
    """The state after a divergence: the last good average as weights, a lower rate, fresh moments and draws."""
    step, average = watch.good
    rate = learner.optimiser.rate
    if learner.retreats >= TRIES:
        raise FitFailed(f"{error} at step {learner.done()}, rate {rate:g}, and did so {TRIES} times before at higher rates; lower --train.rate")
    begun = learner.first + step
    say(f"note: {error} at step {learner.done()}; back to the average of step {begun}, rate {rate:g} -> {rate / RETREAT:g}")
    seed = learner.team.seed(learner.seed + learner.retreats + 1)
    numbers, best = watch.held_out.remembered() if watch.held_out else ({}, {})
    tensors = grouped(weights=average, average=average, good=average) | best | {"losses": torch.stack(learner.losses).cpu()[:step]}
    fresh = lambda device: torch.Generator(device).manual_seed(seed).get_state()
    tensors |= {"draws": fresh(learner.draws.device), "global": fresh("cpu")}
    if learner.draws.device.type == "cuda":
        tensors["global_cuda"] = fresh(learner.draws.device)
    return State(of, {"risen": begun, "level": watch.level, "first": watch.first, "retreats": learner.retreats + 1, "good": step} | numbers, tensors)


def _check_equal(learner: Learner) -> None:
    """Refuse weights that differ between processes."""
    if learner.team.alone:
        return
    digest = hashlib.sha256()
    for value in [*learner.denoiser.state_dict().values(), *learner.average.state_dict().values()]:
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if len(set(learner.team.gather(digest.hexdigest()))) > 1:
        raise FitFailed("the processes ended a training with different weights: use machines of one kind, with the same versions of all programs")


class Members(LightningEnvironment):
    """A team in Lightning's terms; it has met before Lightning is asked."""

    creates_processes_externally = True

    def __init__(self, team: Team) -> None:
        super().__init__()
        self.team = team

    def world_size(self) -> int:
        """Processes."""
        return self.team.size

    def global_rank(self) -> int:
        """This one."""
        return self.team.rank

    def local_rank(self) -> int:
        """This one among those of its machine."""
        return self.team.local

    def node_rank(self) -> int:
        """Its machine."""
        return self.team.rank // self.team.local_size

    def teardown(self) -> None:
        """The team stays together."""


def _trainer(steps: int, device: str, callbacks: list[pl.Callback], clip: float, team: Team) -> pl.Trainer:
    """A silent trainer: emdiff reports progress and writes its own files. In a team, gradients are averaged by DDP."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    together: dict[str, Any] = {"devices": 1}
    if not team.alone:
        # static_graph, since an energy has a constant that no score depends on
        strategy = DDPStrategy(cluster_environment=Members(team), static_graph=True, broadcast_buffers=False)
        together = {"devices": team.local_size, "num_nodes": team.size // team.local_size, "strategy": strategy, "use_distributed_sampler": False}
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        callbacks=callbacks,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **together,
    )
