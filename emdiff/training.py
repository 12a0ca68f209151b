r"""Training a denoiser: stochastic gradients on a loss over indices, an exponential moving average, an end by length or by held-out loss.

A loss is a function (denoiser, index, generator) -> scalar: it draws its own measurements of the data that index names, on their device,
so clean data, pairs and recorrupted observations are all trained by the same loop. Everything random comes from one generator seeded per
training, so a training that is started again gives the same weights on the same machine.

The moving average forgets over a fifth of the training, min(decay, (1 + i)/(10 + i)) at step i, and is fresh in every training. In an
M-step the rate falls to 0: what is left of the noise of the gradients would enter every sample of the next E-step, and the
prior's variance would creep up from iteration to iteration (docs/method.md).

A training that is done in parts hands its memory from one part to the next: weights, average, the optimiser's state, the number of steps
taken. Length, rate and average are then those of the whole.

A training that is stopped leaves a state (checkpoint) from which it goes on as if nothing had happened: weights, average, the optimiser's moments,
the generators, the losses. One whose loss diverges goes back to the last good average, with a rate RETREAT times lower, at most TRIES times.

This is the one file that imports Lightning.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from emdiff import interrupt
from emdiff.checkpoint import State, grouped, load_state, save_state
from emdiff.errors import FitFailed
from emdiff.memory import Memory, Optimiser
from emdiff.processes import ALONE, Team
from emdiff.streams import stream_seed

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]

WARMUP = 50
"""Steps over which the learning rate rises from 0."""

WINDOW = 20
"""Steps whose mean loss is looked at for divergence."""

FAR = 10.0
"""A window's mean loss this many times its running level, and above that of the first window, is divergence."""

RETREAT, TRIES = 4.0, 3
"""What the rate is divided by after a divergence, and how often that is tried."""


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


class Indices(IterableDataset):
    """Batches of indices without end: each epoch visits every index once, in an order of its own; the first `skip` batches are left out. Each
    process of a team has the same batches, and gives its part of each."""

    def __init__(self, index: Tensor, batch: int, generator: torch.Generator, skip: int = 0, team: Team = ALONE) -> None:
        self.index, self.batch, self.generator, self.skip, self.team = index, min(batch, len(index)), generator, skip, team

    def __iter__(self) -> Iterator[Tensor]:
        return (batch[self.team.part(len(batch))] for batch in itertools.islice(self._batches(), self.skip, None))

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = self.index[torch.randperm(len(self.index), generator=self.generator)]
            yield from order[: len(order) // self.batch * self.batch].split(self.batch)


class Learner(pl.LightningModule):
    """The denoiser in training, its loss and its moving average.

    Args:
        denoiser: Where to start from; trained itself.
        loss: As in `train`.
        optimiser: As in `train`; its rate is divided by RETREAT for each retreat.
        steps: Steps of all parts.
        seed: Seeds the draws.
        memory: What an earlier part left.
        resumed: The state within this part that it goes on from.
        team: The processes that train it together.
        batch: Data per step, of all of them.
    """

    def __init__(
        self, denoiser: nn.Module, loss: Loss, optimiser: Optimiser, steps: int, seed: int, memory: Memory | None = None,
        resumed: State | None = None, team: Team = ALONE, batch: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.denoiser, self.average = denoiser.requires_grad_(True), copy.deepcopy(denoiser).requires_grad_(False)
        self.team, self.batch = team, batch
        self.loss_function, self.steps, self.seed, self.resumed = loss, steps, seed, resumed
        self.first, self.retreats, self.risen, self.slots = 0, 0, 0, dict[str, Tensor]()
        self.losses: list[Tensor] = []
        if memory is not None:
            self._take(memory.weights, memory.average, memory.slots)
            self.first, self.retreats, self.risen = memory.step, memory.retreats, memory.risen
        if resumed is not None:
            self._take(*map(resumed.group, ("weights", "average", "slots")))
            self.losses, self.risen, self.retreats = list(resumed.tensors["losses"]), resumed.numbers["risen"], resumed.numbers["retreats"]
        self.optimiser = optimiser._replace(rate=optimiser.rate / RETREAT**self.retreats)

    def _take(self, weights: dict[str, Tensor], average: dict[str, Tensor], slots: dict[str, Tensor]) -> None:
        """Go on from these."""
        self.denoiser.load_state_dict(weights)
        self.average.load_state_dict(average)
        self.slots = slots

    def done(self) -> int:
        """Steps taken in all parts."""
        return self.first + len(self.losses)

    def on_fit_start(self) -> None:
        """Seed the draws on the device that trains, and those of networks that draw themselves, such as MUVB its latent variables: by another
        seed, since latent variables that equal the noise of the measurements teach something else."""
        seed = self.team.seed(self.seed)
        self.draws = torch.Generator(self.device).manual_seed(seed)
        torch.manual_seed(stream_seed(seed, "draws of the network"))
        if self.resumed is not None:
            self.draws.set_state(self.resumed.tensors["draws"])
            torch.set_rng_state(self.resumed.tensors["global"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self.resumed.tensors["global_cuda"], self.device)
        self.losses = [loss.to(self.device) for loss in self.losses]

    def training_step(self, index: Tensor, step: int) -> Tensor:
        """The loss of a batch of indices (B,), shape (): times B over its mean among processes, so that the mean of gradients is that of the data."""
        loss = self.loss_function(self.denoiser, index, self.draws)
        if not self.team.alone:
            loss = loss * (len(index) * self.team.size / self.batch)
        self.losses.append(self.team.mean(loss.detach()))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        """Move the average; buffers, such as the singular vectors of a spectral normalisation, are taken as they are."""
        i = self.done()
        weight = 1 - min(1 - 5 / max(self.steps, 10), (1 + i) / (10 + i))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), weight)
            for mine, theirs in zip(self.average.buffers(), self.denoiser.buffers()):
                mine.copy_(theirs)

    def configure_optimizers(self):
        """Adam or SGD; the rate rises over WARMUP steps, from 0 again after a divergence, and falls linearly to 0 if it is annealed."""
        how, parameters = self.optimiser, list(self.denoiser.parameters())
        optimizer = (
            torch.optim.Adam(parameters, lr=how.rate) if how.name == "adam" else torch.optim.SGD(parameters, lr=how.rate, momentum=how.momentum)
        )
        for i, parameter in enumerate(parameters):
            mine = {key.partition("/")[2]: value for key, value in self.slots.items() if key.startswith(f"{i}/")}
            if mine:  # in the layout of the parameter, for the sake of the last bit
                optimizer.state[parameter] = {k: torch.empty_like(parameter).copy_(v) if k != "step" else v.clone() for k, v in mine.items()}
        first = self.done()
        fall = lambda i: 1 - i / self.steps if how.anneal else 1.0
        rise = lambda i: min(1.0, (i - self.risen + 1) / WARMUP)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rise(first + i) * fall(first + i))
        self.moved = optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def remember(self) -> Memory:
        """What the next part continues from, on the CPU."""
        host = lambda state: {name: value.detach().cpu().clone() for name, value in state.items()}
        return Memory(
            self.done(), host(self.denoiser.state_dict()), host(self.average.state_dict()), host(self._moments()), self.retreats, self.risen
        )  # fmt: skip

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors, as PARAMETER/NAME."""
        if not hasattr(self, "moved"):
            return self.slots
        slots = ((i, self.moved.state[p]) for i, p in enumerate(self.denoiser.parameters()) if p in self.moved.state)
        return {f"{i}/{name}": value for i, slot in slots for name, value in slot.items() if value is not None}

    def state(self, of: str) -> State:
        """All that the steps to come depend on."""
        tensors = grouped(weights=self.denoiser.state_dict(), average=self.average.state_dict(), slots=self._moments())
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        streams = {"draws": self.draws.get_state(), "global": torch.get_rng_state()}
        if self.device.type == "cuda":
            streams["global_cuda"] = torch.cuda.get_rng_state(self.device)
        tensors |= {"losses": losses} | self.team.collected(streams)
        return State(of, {"risen": self.risen, "retreats": self.retreats}, tensors)


class HeldOut(pl.Callback):
    """Ends a training when the average's loss on held-out data has not improved for `patience` checks, and keeps the best."""

    def __init__(self, index: Tensor, every: int, patience: int, looks: int = 2048) -> None:
        self.index, self.every, self.patience = index, every, patience
        self.repeats = min(4, max(1, looks // len(index)))
        self.best, self.best_step, self.weights = float("inf"), 0, None

    def remembered(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Numbers and tensors of its state."""
        return {"best": self.best, "best_step": self.best_step}, grouped(best=self.weights or {})

    def resume(self, state: State) -> None:
        """Take up a state."""
        self.best, self.best_step, self.weights = state.numbers["best"], state.numbers["best_step"], state.group("best") or None

    def on_train_batch_end(self, trainer, module: Learner, outputs, batch, batch_idx) -> None:
        """Check every `every` steps, with the same draws each time."""
        step = len(module.losses)
        if step % self.every:
            return
        same = torch.Generator(module.device).manual_seed(0)
        index = self.index.to(module.device)
        if len(index) >= module.team.size:
            index = index[module.team.part(len(index))]
        with torch.no_grad():
            parts = [module.loss_function(module.average, part, same) for _ in range(self.repeats) for part in index.split(512)]
        loss = float(module.team.mean(torch.stack(parts).mean()))
        if loss < self.best:
            self.best, self.best_step, self.weights = loss, step, copy.deepcopy(module.average.state_dict())
        trainer.should_stop = step - self.best_step >= self.patience * self.every


class Reporter(pl.Callback):
    """Calls progress(step, loss) after every step."""

    def __init__(self, progress: Callable[[int, float], None], every: int = 20) -> None:
        self.progress, self.every = progress, every

    def on_train_batch_start(self, trainer, module: Learner, batch, batch_idx) -> None:
        """Report every few steps, behind the watch, which saves before work ends: reading the loss waits for the device."""
        if module.losses and len(module.losses) % self.every == 0:
            self.progress(len(module.losses), float(module.losses[-1]))

    def on_train_end(self, trainer, module: Learner) -> None:
        """Report the last step."""
        self.progress(len(module.losses), float(module.losses[-1]))


class Diverged(Exception):
    """The loss left its level; says how, and goes to the last good average."""


class Watch(pl.Callback):
    """Looks after a training: notices divergence, saves states, ends when asked to.

    Attributes:
        good: The average and the number of steps at the end of the last window that was not divergent.
    """

    def __init__(self, learner: Learner, held_out: HeldOut | None, path: Path | None, of: str) -> None:
        self.held_out, self.path, self.of = held_out, path, of
        self.first, self.level, self.clock = None, None, interrupt.Clock()
        self.good = (len(learner.losses), copy.deepcopy(learner.average.state_dict()))

    def on_train_start(self, trainer, module) -> None:
        """Have the signals back, which Lightning takes."""
        interrupt.listen()

    def on_train_batch_start(self, trainer, module: Learner, batch, batch_idx) -> None:
        """Between steps, when the average has been moved too: look at the losses of each window; save when it is time."""
        done = len(module.losses)
        if done and done % WINDOW == 0:
            self.look(module)
        due = bool(done) and done % WINDOW == 0 and self.clock.due()
        wish = module.team.largest(interrupt.asked() or int(due))  # a signal that any process got; all save, and end, at one step
        if wish:
            self.save(module)
        if wish > 1:
            raise interrupt.Stopped(wish)

    def look(self, module: Learner) -> None:
        """Compare the last window with those before it.

        Raises:
            Diverged: if it is not finite, or far above them.
        """
        done = len(module.losses)
        losses = torch.stack(module.losses[(done - 1) // WINDOW * WINDOW :])
        mean = float(losses.mean())
        if not math.isfinite(mean):
            raise Diverged(f"the training loss became {float(losses[~losses.isfinite()][0])}")
        if not all(bool(p.isfinite().all()) for p in module.average.parameters()):
            raise Diverged("the weights stopped being finite")
        if self.level is not None and self.first is not None and mean > self.first and mean - self.level > (FAR - 1) * abs(self.level):
            raise Diverged(f"the training loss rose to {mean:.4g} from {self.level:.4g}")
        self.first = mean if self.first is None else self.first
        self.level = mean if self.level is None else 0.9 * self.level + 0.1 * mean
        self.good = (done, copy.deepcopy(module.average.state_dict()))

    def save(self, module: Learner) -> None:
        """Write the state, if there is a file for it; in a team, all have to be here."""
        if self.path is None:
            return
        state = module.state(self.of)
        if not module.team.first:
            return
        numbers, tensors = self.held_out.remembered() if self.held_out else ({}, {})
        numbers |= {"level": self.level, "first": self.first, "good": self.good[0]}
        save_state(self.path, State(self.of, state.numbers | numbers, state.tensors | tensors | grouped(good=self.good[1])))

    def resume(self, state: State) -> None:
        """Take up a state."""
        self.first, self.level, self.good = state.numbers["first"], state.numbers["level"], (state.numbers["good"], state.group("good"))


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
        loss: (denoiser, index (B,), generator) -> scalar.
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
            return _trained(learner, [*([end] if end else []), watch, Reporter(progress)], end, watch, count - held_out, steps, batch, device)
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
        loader = DataLoader(batches, batch_size=None, generator=torch.Generator())
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
