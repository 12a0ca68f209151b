r"""What looks after a training: its end by held-out data, its progress, divergence, states, and signals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from emdiff import interrupt
from emdiff.checkpoint import State, grouped, save_state
from emdiff.learner import Learner, batches_of

WINDOW = 20
"""Steps whose mean loss is looked at for divergence."""

FAR = 10.0
"""A window's mean loss this many times its running level, and above that of the first window, is divergence."""


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
        index, loss = self.index, module.loss_function
        if len(index) >= module.team.size:
            index = index[module.team.part(len(index))]
        with torch.no_grad():
            looks = batches_of(loss, index.split(512) * self.repeats, module.device)
            parts = [loss(module.average, look.batch, same) for look in looks]
        loss = float(module.team.mean(torch.stack(parts).mean()))
        if loss < self.best:
            self.best, self.best_step, self.weights = loss, step, copy.deepcopy(module.average.state_dict())
        trainer.should_stop = step - self.best_step >= self.patience * self.every


class Diverged(Exception):
    """The loss left its level; says how, and goes to the last good average."""


class Watch(pl.Callback):
    """Looks after a training: notices divergence, saves states, ends when asked to.

    Attributes:
        good: The average and the number of steps at the end of the last window that was not divergent.
        last: The loss of the last step that was looked at.
    """

    def __init__(self, learner: Learner, held_out: HeldOut | None, path: Path | None, of: str) -> None:
        self.held_out, self.path, self.of = held_out, path, of
        self.first, self.level, self.last, self.clock = None, None, math.nan, interrupt.Clock()
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
        """Compare the last window with those before it; the host waits for the device once.

        Raises:
            Diverged: if it is not finite, or far above them.
        """
        done, average = len(module.losses), copy.deepcopy(module.average.state_dict())  # while the device still works
        losses = torch.stack(module.losses[(done - 1) // WINDOW * WINDOW :])
        finite = torch.stack(torch._foreach_norm(list(module.average.parameters()), math.inf)).isfinite().all()
        mean, self.last, finite = torch.stack([losses.mean(), losses[-1], finite.to(losses)]).tolist()
        if not math.isfinite(mean):
            raise Diverged(f"the training loss became {float(losses[~losses.isfinite()][0])}")
        if not finite:
            raise Diverged("the weights stopped being finite")
        if self.level is not None and self.first is not None and mean > self.first and mean - self.level > (FAR - 1) * abs(self.level):
            raise Diverged(f"the training loss rose to {mean:.4g} from {self.level:.4g}")
        self.first = mean if self.first is None else self.first
        self.level = mean if self.level is None else 0.9 * self.level + 0.1 * mean
        self.good = (done, average)

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


class Reporter(pl.Callback):
    """Calls progress(step, loss) when the watch has looked."""

    def __init__(self, progress: Callable[[int, float], None], watch: Watch) -> None:
        self.progress, self.watch = progress, watch

    def on_train_batch_start(self, trainer, module: Learner, batch, batch_idx) -> None:
        """Report what the watch has seen, behind it, which saves before work ends: reading the loss would wait for the device again."""
        if module.losses and len(module.losses) % WINDOW == 0:
            self.progress(len(module.losses), self.watch.last)

    def on_train_end(self, trainer, module: Learner) -> None:
        """Report the last step."""
        self.progress(len(module.losses), float(module.losses[-1]))
