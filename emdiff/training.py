r"""Training a denoiser: stochastic gradients on a loss over indices, an exponential moving average, an end by length or by held-out loss.

A loss is a function (denoiser, index, generator) -> scalar: it draws its own measurements of the data that index names, on their device,
so clean data, pairs and recorrupted observations are all trained by the same loop. Everything random comes from one generator seeded per
training, so a training that is started again gives the same weights on the same machine.

The moving average forgets over a fifth of the training, min(decay, (1 + i)/(10 + i)) at step i, and is fresh in every training. In an
M-step the rate falls to 0: what is left of the noise of the gradients would enter every sample of the next E-step, and the
prior's variance would creep up from iteration to iteration (docs/method.md).

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


class Trained(NamedTuple):
    """What a training ends with.

    Attributes:
        denoiser: The moving average of the weights.
        steps: Steps taken.
        loss: Mean loss of the last tenth of the steps.
        held_out: Best held-out loss, or None.
    """

    denoiser: nn.Module
    steps: int
    loss: float
    held_out: float | None


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

    def __init__(self, denoiser: nn.Module, loss: Loss, rate: float, steps: int, anneal: bool, seed: int) -> None:
        super().__init__()
        self.denoiser, self.average = denoiser.requires_grad_(True), copy.deepcopy(denoiser)
        self.loss_function, self.rate, self.steps, self.anneal, self.seed = loss, rate, steps, anneal, seed
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
        """Move the average."""
        i = len(self.losses)
        weight = 1 - min(1 - 5 / max(self.steps, 10), (1 + i) / (10 + i))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), weight)

    def configure_optimizers(self):
        """Adam; the rate rises over WARMUP steps, and falls linearly to 0 if `anneal`."""
        optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=self.rate)
        fall = lambda i: 1 - i / self.steps if self.anneal else 1.0
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP) * fall(i))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class HeldOut(pl.Callback):
    """Ends a training when the average's loss on held-out data has not improved for `patience` checks, and keeps the best."""

    def __init__(self, index: Tensor, every: int, patience: int, looks: int = 2048) -> None:
        self.index, self.every, self.patience = index, every, patience
        self.repeats = min(4, max(1, looks // len(index)))
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
    anneal: bool = True,
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
        anneal: Let the rate fall to 0 over `steps`.

    Returns:
        Trained; its denoiser is the moving average, on `device`, in eval mode.

    Raises:
        FloatingPointError: if the loss stops being finite.
    """
    index = torch.arange(count - held_out)
    learner = Learner(copy.deepcopy(denoiser), loss, rate, steps, anneal=anneal, seed=seed)
    callbacks: list[pl.Callback] = [Reporter(progress)]
    if held_out:
        callbacks.append(HeldOut(torch.arange(count - held_out, count), every=100, patience=4))
    loader = DataLoader(Indices(index, batch, torch.Generator().manual_seed(seed ^ 1)), batch_size=None)
    _trainer(steps, device, callbacks).fit(learner, loader)
    losses = torch.stack(learner.losses)
    if not bool(losses.isfinite().all()):
        raise FloatingPointError(f"the training loss became {float(losses[~losses.isfinite()][0])} at rate {rate:g}; lower the rate")
    if held_out and callbacks[1].weights is not None:
        learner.average.load_state_dict(callbacks[1].weights)
    tail = float(losses[-max(1, len(losses) // 10) :].mean())
    best = callbacks[1].best if held_out else None
    return Trained(learner.average.to(device).eval().requires_grad_(False), len(losses), tail, best)


def _trainer(steps: int, device: str, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A silent trainer: emdiff reports progress and writes its own files."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    return pl.Trainer(
        max_steps=steps,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
