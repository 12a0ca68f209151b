r"""A denoiser in training: its loss, moving average, optimiser and draws, and the order of the data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from emdiff.ahead import ahead
from emdiff.checkpoint import State, grouped
from emdiff.graphs import replayed
from emdiff.memory import Memory, Optimiser
from emdiff.processes import ALONE, Team
from emdiff.streams import stream_seed

Loss = Callable[[nn.Module, Any, torch.Generator], Tensor]
"""(denoiser, batch, generator) -> scalar: it draws its own measurements of the data in the batch, on their device. What a batch is it says itself,
by a method `read` from indices (B,) to what `ahead.ahead` takes; the batches of a loss without one are those indices."""

WARMUP = 50
"""Steps over which the learning rate rises from 0."""

RETREAT = 4.0
"""What the rate is divided by after a divergence."""


class Indices:
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


class Step(NamedTuple):
    """What a step is given: the number of its data, and the batch of its loss."""

    count: int
    batch: Any


def batches_of(loss: Loss, indices: Iterable[Tensor], device: torch.device) -> Iterator[Step]:
    """The batches of a loss at indices (B,), on a device, read ahead of their use where that spares a wait."""
    read = getattr(loss, "read", lambda index: index)
    return ahead(lambda index: Step(len(index), read(index)), indices, device)


class Feed(IterableDataset):
    """`batches_of` as Lightning takes them."""

    def __init__(self, loss: Loss, indices: Indices, device: torch.device) -> None:
        self.how = (loss, indices, device)

    def __iter__(self) -> Iterator[Step]:
        return batches_of(*self.how)


class Learner(pl.LightningModule):
    """The denoiser in training, its loss and its moving average; alone on a GPU, its network is replayed as CUDA graphs (graphs).

    Args:
        denoiser: Where to start from; trained itself.
        loss: As in `training.train`.
        optimiser: As in `training.train`; its rate is divided by RETREAT for each retreat.
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
        self.runner = (replayed(self.denoiser) if self.team.alone else self.denoiser,)  # a tuple hides it from the module, whose weights it shares

    def training_step(self, given: Step, step: int) -> Tensor:
        """The loss of a batch of B data, shape (): times B over its mean among processes, so that the mean of gradients is that of the data."""
        loss = self.loss_function(self.runner[0], given.batch, self.draws)
        if not self.team.alone:
            loss = loss * (given.count * self.team.size / self.batch)
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
        fused = {"fused": True} if self.device.type == "cuda" else {}
        adam = how.name == "adam"
        optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(parameters, lr=how.rate, **fused, **({} if adam else {"momentum": how.momentum}))
        for i, parameter in enumerate(parameters):
            mine = {key.partition("/")[2]: value for key, value in self.slots.items() if key.startswith(f"{i}/")}
            if mine:  # in the layout of the parameter, for the sake of the last bit
                moments = {k: torch.empty_like(parameter).copy_(v) for k, v in mine.items() if k != "step"}
                where = parameter.device if fused else "cpu"
                optimizer.state[parameter] = moments | ({"step": mine["step"].to(where, copy=True)} if "step" in mine else {})
        first = self.done()
        fall = lambda i: 1 - i / self.steps if how.anneal else 1.0
        rise = lambda i: min(1.0, (i - self.risen + 1) / WARMUP)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: rise(first + i) * fall(first + i))
        self.moved = optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def remember(self) -> Memory:
        """What the next part continues from, on the CPU."""
        host = lambda state: {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
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
