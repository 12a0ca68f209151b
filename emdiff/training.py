r"""Training a denoiser: stochastic gradients on a loss over indices, an exponential moving average, an end by length or by held-out loss.

A loss is a function (denoiser, index, generator) -> scalar: it draws its own measurements of the data that index names, on their device,
so clean data, pairs and recorrupted observations are all trained by the same loop. Everything random comes from one generator seeded per
training, so a training that is started again gives the same weights on the same machine.

The moving average forgets over a fifth of the training, min(decay, (1 + i)/(10 + i)) at step i, and is fresh in every training. Where the length is
known beforehand the rate falls to 0: what is left of the noise of the gradients would enter every sample of the next E-step, and the
prior's variance would creep up from iteration to iteration (docs/method.md).

A training that is done in parts hands its memory from one part to the next: weights, average, the optimiser's state, the number of steps taken.
Length,
rate and average are then those of the whole.

This is the one file that imports Lightning.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]

WARMUP = 50
"""Steps over which the learning rate rises from 0."""


class Optimiser(NamedTuple):
    """How weights are moved.

    Attributes:
        name: "adam" or "sgd".
        rate: Learning rate.
        momentum: Of sgd.
        anneal: Let the rate fall linearly to 0.
        clip: Largest norm of the gradient.
    """

    name: str = "adam"
    rate: float = 1e-3
    momentum: float = 0.9
    anneal: bool = True
    clip: float = 1.0


class Memory(NamedTuple):
    """The state of a training between two parts of it.

    Attributes:
        step: Steps taken.
        weights: Of the denoiser in training; keys as in its state_dict.
        average: Of the moving average, likewise.
        slots: The optimiser's tensors, as PARAMETER/NAME.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    slots: dict[str, Tensor]


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
        denoiser: The moving average of the weights.
        steps: Steps taken.
        loss: Mean loss of the last tenth of the steps.
        held_out: Best held-out loss, or None.
        memory: What the next part of a training in parts continues from.
    """

    denoiser: nn.Module
    steps: int
    loss: float
    held_out: float | None
    memory: Memory | None = None


class Indices(IterableDataset):
    """Batches of indices without end: each epoch visits every index once, in an order of its own."""

    def __init__(self, index: Tensor, batch: int, generator: torch.Generator) -> None:
        self.index, self.batch, self.generator = index, min(batch, len(index)), generator

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            order = self.index[torch.randperm(len(self.index), generator=self.generator)]
            yield from order[: len(order) // self.batch * self.batch].split(self.batch)


class Learner(pl.LightningModule):
    """The denoiser in training, its loss and its moving average."""

    def __init__(self, denoiser: nn.Module, loss: Loss, optimiser: Optimiser, steps: int, seed: int, memory: Memory | None = None) -> None:
        super().__init__()
        self.denoiser, self.average = denoiser.requires_grad_(True), copy.deepcopy(denoiser)
        self.loss_function, self.optimiser, self.steps, self.seed, self.memory = loss, optimiser, steps, seed, memory
        self.first = 0
        if memory is not None:
            self.denoiser.load_state_dict(memory.weights)
            self.average.load_state_dict(memory.average)
            self.first = memory.step
        self.losses: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Seed the draws on the device that trains."""
        self.draws = torch.Generator(self.device).manual_seed(self.seed)

    def training_step(self, index: Tensor, step: int) -> Tensor:
        """The loss of a batch of indices (B,), shape ()."""
        loss = self.loss_function(self.denoiser, index, self.draws)
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        """Move the average; buffers, such as the singular vectors of a spectral normalisation, are taken as they are."""
        i = self.first + len(self.losses)
        weight = 1 - min(1 - 5 / max(self.steps, 10), (1 + i) / (10 + i))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), weight)
            for mine, theirs in zip(self.average.buffers(), self.denoiser.buffers()):
                mine.copy_(theirs)

    def configure_optimizers(self):
        """Adam or SGD; the rate rises over WARMUP steps, and falls linearly to 0 if it is annealed."""
        how, parameters = self.optimiser, list(self.denoiser.parameters())
        optimizer = (
            torch.optim.Adam(parameters, lr=how.rate) if how.name == "adam" else torch.optim.SGD(parameters, lr=how.rate, momentum=how.momentum)
        )
        if self.memory is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in self.memory.slots.items():
                place, name = key.split("/")
                state.setdefault(int(place), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        fall = lambda i: 1 - i / self.steps if how.anneal else 1.0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (self.first + i + 1) / WARMUP) * fall(self.first + i))
        self.moved = optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def remember(self) -> Memory:
        """What the next part continues from, on the CPU."""
        host = lambda state: {name: value.detach().cpu().clone() for name, value in state.items()}
        slots = {f"{i}/{name}": value for i, slot in self.moved.state_dict()["state"].items() for name, value in slot.items() if value is not None}
        return Memory(self.first + len(self.losses), host(self.denoiser.state_dict()), host(self.average.state_dict()), host(slots))


class HeldOut(pl.Callback):
    """Ends a training when the average's loss on held-out data has not improved for `patience` checks, and keeps the best."""

    def __init__(self, index: Tensor, every: int, patience: int, repeats: int = 4) -> None:
        self.index, self.every, self.patience, self.repeats = index, every, patience, repeats
        self.best, self.best_step, self.weights = float("inf"), 0, None

    def on_train_batch_end(self, trainer, module: Learner, outputs, batch, batch_idx) -> None:
        """Check every `every` steps, with the same draws each time."""
        step = len(module.losses)
        if step % self.every:
            return
        same = torch.Generator(module.device).manual_seed(0)
        index = self.index.to(module.device)
        with torch.no_grad():
            parts = [module.loss_function(module.average, part, same) for _ in range(self.repeats) for part in index.split(512)]
        loss = float(torch.stack(parts).mean())
        if loss < self.best:
            self.best, self.best_step, self.weights = loss, step, copy.deepcopy(module.average.state_dict())
        trainer.should_stop = step - self.best_step >= self.patience * self.every


class Reporter(pl.Callback):
    """Calls progress(step, loss) after every step."""

    def __init__(self, progress: Callable[[int, float], None], every: int = 20) -> None:
        self.progress, self.every = progress, every

    def on_train_batch_end(self, trainer, module: Learner, outputs, batch, batch_idx) -> None:
        """Report every few steps: reading the loss waits for the device."""
        if len(module.losses) % self.every == 0:
            self.progress(len(module.losses), float(module.losses[-1]))


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
    optimiser: Optimiser | None = None,
    memory: Memory | None = None,
    total: int | None = None,
) -> Trained:
    """Train a copy of a denoiser.

    Args:
        denoiser: Where to start from; not changed.
        loss: (denoiser, index (B,), generator) -> scalar.
        count: Number of data N; indices are 0..N-1.
        steps: Most steps.
        batch: Data per step.
        rate: Learning rate of Adam.
        seed: Seeds order and draws.
        held_out: Data set aside, the last ones; their loss ends the training and chooses its weights. 0 trains for all steps.
        device: "cpu" or "cuda".
        progress: Called with the step and its loss.
        optimiser: Replaces `rate`; Adam with a rate that falls to 0, unless held-out data end the training, if None.
        memory: What an earlier part of this training left; None at its beginning.
        total: Steps of all parts; `steps` if None.

    Returns:
        Trained; its denoiser is the moving average, on `device`, in eval mode.

    Raises:
        FloatingPointError: if the loss stops being finite.
    """
    index = torch.arange(count - held_out)
    optimiser = optimiser or Optimiser(rate=rate, anneal=not held_out)
    torch.manual_seed(seed)  # for what a network draws itself, such as the latent variables of MUVB
    learner = Learner(copy.deepcopy(denoiser), loss, optimiser, total or steps, seed, memory)
    callbacks: list[pl.Callback] = [Reporter(progress)]
    if held_out:
        callbacks.append(HeldOut(torch.arange(count - held_out, count), every=100, patience=4))
    loader = DataLoader(Indices(index, batch, torch.Generator().manual_seed(seed ^ 1)), batch_size=None)
    _trainer(steps, device, callbacks, optimiser.clip).fit(learner, loader)
    losses = torch.stack(learner.losses)
    if not bool(losses.isfinite().all()):
        raise FloatingPointError(f"the training loss became {float(losses[~losses.isfinite()][0])} at rate {optimiser.rate:g}; lower the rate")
    if held_out and callbacks[1].weights is not None:
        learner.average.load_state_dict(callbacks[1].weights)
    tail = float(losses[-max(1, len(losses) // 10) :].mean())
    best = callbacks[1].best if held_out else None
    memory = learner.remember()
    return Trained(learner.average.to(device).eval().requires_grad_(False), len(losses), tail, best, memory)


def _trainer(steps: int, device: str, callbacks: list[pl.Callback], clip: float) -> pl.Trainer:
    """A silent trainer: emdiff reports progress and writes its own files."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
