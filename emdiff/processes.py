r"""Several processes that fit one prior: who they are, which rows are whose, and what they tell each other.

Every process runs the same fit. What is costly is shared: rows of the E-step by contiguous parts, each batch of a training by turns, its gradients
averaged (training). What is cheap, or has to be one, is done by the first process while the others wait (`Team.lead`, `Team.once`): it alone holds
the lock, writes the run folder and tells the user. The folder is how arrays get from one process to the others, so all machines have to see it; no
file is ever written by two processes.

A process that dies takes the others with it: whoever waits for it ends with `Lost`, and whoever started them (launch, torchrun, srun) ends the rest.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emdiff import interrupt
from emdiff.errors import Lost, UsageError
from emdiff.launch import MEET, follow_parent
from emdiff.streams import stream_seed

T = TypeVar("T")

FOREVER = timedelta(days=365)
"""How long a process waits for another: its death is noticed by other means, and its work may take days."""


class Team:
    """The processes of a fit, as one of them sees them; alone where nothing else is said.

    Args:
        rank: This process, 0..size - 1.
        size: Number of processes.
        local: This process among those of its machine.
        local_size: Their number, the same on every machine.
        group: What they talk through.

    >>> Team(1, 3).part(10), Team(1, 3).mark("walk"), Team().mark("walk"), Team().mean(torch.ones(()))
    (slice(3, 6, None), 'walk-1-of-3', 'walk', tensor(1.))
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, local_size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self.local, self.local_size, self.group = rank, size, local, local_size, group
        self.first, self.alone = rank == 0, size == 1

    def part(self, count: int, rank: int | None = None) -> slice:
        """The rows, of `count`, that are this process's, or another's."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def rows(self, count: int, among: Tensor | None = None) -> Tensor | None:
        """Indices of this process's part of `count` rows, or of those `among` (n,) them; None where that is all of them."""
        return among if self.alone else torch.arange(count)[self.part(count)] if among is None else among[self.part(len(among))]

    def mark(self, name: str, rank: int | None = None) -> str:
        """The name of what each process has of its own."""
        return name if self.alone else f"{name}-{self.rank if rank is None else rank}-of-{self.size}"

    def seed(self, seed: int) -> int:
        """A seed for draws that differ between processes; the first one's is the seed itself."""
        return seed if self.first else stream_seed(seed, "process", self.rank)

    def wait(self) -> None:
        """Until all are here; ends before that where a signal asks this process to end."""
        if not self.alone:
            self._reduced(torch.zeros(1), dist.ReduceOp.SUM, interrupt.check)

    def lead(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` returns in the first process, in all of them; the others only wait for it."""
        if self.alone:
            return work(*arguments)
        box = [work(*arguments)] if self.first else [None]
        self.wait()
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]  # type: ignore[return-value]

    def once(self, work: Callable[..., object], *arguments: Any) -> None:
        """Let the first process do it, the others wait."""
        if self.first:
            work(*arguments)
        self.wait()

    def after_first(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by the first process before the others, for what leaves something behind that they then find."""
        done = work() if self.first else None
        self.wait()
        return work() if done is None else done

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return number if self.alone else int(self._reduced(torch.tensor([number]), dist.ReduceOp.MAX)[0])

    def total(self, value: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape, on this one's device."""
        return value if self.alone else self._reduced(value.cpu().clone(), dist.ReduceOp.SUM).to(value.device)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of all processes' tensors of one shape; on a GPU nobody waits for it."""
        if self.alone:
            return value
        if value.device.type == "cpu":
            return self._reduced(value.clone(), dist.ReduceOp.SUM) / self.size
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def collected(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes, those of the others under NAME@RANK."""
        found = enumerate(self.gather(tensors))
        return {name if not rank else f"{name}@{rank}": value for rank, own in found for name, value in own.items()}

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`collected` tensors with this process's in place of the first one's."""
        mine = {name.rpartition("@")[0]: value for name, value in tensors.items() if name.endswith(f"@{self.rank}")}
        return {name: value for name, value in tensors.items() if "@" not in name} | mine

    def _reduced(self, value: Tensor, how: Any, meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """Reduce a tensor in place. Waits in short sleeps, since signals are heard between lines of Python alone."""
        work, pause = dist.all_reduce(value, how, self.group, async_op=True), 2e-5
        while not work.is_completed():
            meanwhile()
            time.sleep(pause)
            pause = min(1.2 * pause, 0.02)
        work.wait()  # raises what went wrong
        return value


ALONE = Team()


def place() -> Team | None:
    """Where the environment puts this process, in torchrun's variables; None where it says nothing of others.

    Raises:
        UsageError: It is not a place in a team of equal machines.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    said = {name: os.environ.get(name) for name in names}
    if said["RANK"] is None or said["WORLD_SIZE"] is None:
        return None
    try:
        rank, size, local, here = (int(said[name]) for name in names)  # type: ignore[arg-type]
        if not (0 <= rank < size and 0 <= local < here <= size and size % here == 0):
            raise ValueError
    except (TypeError, ValueError):
        text = " ".join(f"{name}={value}" for name, value in said.items())
        remedy = "start them with --devices, torchrun or scripts/slurm.sh"
        raise UsageError(f"{text}: is no place among processes, the same number on each machine; {remedy}") from None
    return Team(rank, size, local, here)


def check_devices(device: str, count: int, name: str = "--devices") -> None:
    """Refuse more processes on this machine than it has GPUs, where they are to use these.

    Raises:
        UsageError: naming both numbers.
    """
    if device == "cuda" and count > torch.cuda.device_count():
        raise UsageError(f"{name} is {count} and torch sees {torch.cuda.device_count()} GPUs here; give at most that, or --device cpu")


@contextlib.contextmanager
def joined(device: str, wanted: int = 1) -> Iterator[Team]:
    """Meet the other processes of the fit, if there are any; at the end, part.

    Args:
        device: "cpu" (they talk through gloo, and divide the processor's threads where OMP_NUM_THREADS does not say how many each has) or "cuda"
            (NCCL, one GPU each).
        wanted: --devices, for a complaint.

    Raises:
        Lost: Another process is gone.
        UsageError: The environment, or the machine, does not allow it.
    """
    team = place() or ALONE
    if wanted not in (1, team.local_size):
        raise UsageError(f"--devices is {wanted}, and {team.local_size} processes were started on this machine; leave --devices out")
    if team.alone:
        yield team
        return
    check_devices(device, team.local_size, "the number of processes on this machine")
    follow_parent()
    if not team.first:
        sys.stdout = open(os.devnull, "w")  # one of them speaks; complaints go to standard error
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // team.local_size))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        if device == "cuda":
            torch.cuda.set_device(team.local)
        meet = f"file://{os.environ[MEET]}" if MEET in os.environ else "env://"
        dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=meet, rank=team.rank, world_size=team.size)
        team.group = dist.new_group(backend="gloo", timeout=FOREVER)
        yield team
        dist.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        interrupt.check()
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        told = MEET in os.environ and not team.first  # by the process that started this one, or by the one that ended
        raise Lost("" if told else f"process {team.rank + 1} of {team.size} lost another one ({reason})") from error
