r"""Batches read ahead: the same ones, in order, no more of them than allowed, on time in both senses; fits that read ahead are fits that do not."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from exact import normal
from torch import Tensor

from emdiff import ahead as module
from emdiff.ahead import DEPTH, ahead, mapped
from emdiff.cli import main
from emdiff.data import Observations
from emdiff.em import Draws
from emdiff.errors import UsageError
from emdiff.observations import write_observations
from emdiff.pairs import PairLoss
from observers import Identity, Mask

CPU = torch.device("cpu")


class Two(NamedTuple):
    x: Tensor
    more: Tensor | None


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Read by threads on a CPU too, as if it were a GPU on which nothing lies; the names of the threads that read."""
    names: list[str] = []
    plain = module._threaded

    def threaded(read, keys, device) -> Iterator:
        return plain(lambda key: (names.append(threading.current_thread().name), read(key))[1], keys, device)

    monkeypatch.setattr(module, "goes_on", lambda device: True)
    monkeypatch.setattr(module, "is_far", lambda batch, device: True)
    monkeypatch.setattr(module, "_threaded", threaded)
    return names


def settled(counts: list[int]) -> int:
    """The length of a list when a thread has stopped to add to it."""
    length = -1
    while length != len(counts):
        length = len(counts)
        time.sleep(0.05)
    return length


def test_batches_come_in_order_and_a_few_are_read_while_one_is_in_use(threads: list[str]) -> None:
    keys: list[int] = []
    batches = ahead(lambda i: (keys.append(i), torch.tensor(i))[1], iter(range(10)), CPU)
    assert not keys
    for i in range(10):
        assert int(next(batches)) == i
        assert settled(keys) == (min(10, i + 1 + DEPTH) if i else 1)  # the first is read by itself, and tells where the others lie
    assert next(batches, None) is None and keys == list(range(10)) and set(threads) == {"ahead_0"}


def test_reading_and_use_go_on_at_once(threads: list[str]) -> None:
    """A use that lasts until the next batch has been read would never end if reading waited for it."""
    read = [threading.Event() for _ in range(6)]
    for i, batch in enumerate(ahead(lambda i: (read[i].set(), torch.tensor(i))[1], range(6), CPU)):
        assert int(batch) == i
        assert i == 0 or i == 5 or read[i + 1].wait(10)


def test_what_reading_raises_is_raised_when_the_batch_is_due_and_no_thread_stays(threads: list[str]) -> None:
    def read(i: int) -> Tensor:
        if i == 3:
            raise UsageError("row 3 is gone")
        return torch.tensor(i)

    batches = ahead(read, range(10), CPU)
    assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UsageError, match="row 3 is gone"):
        next(batches)
    batches = ahead(torch.tensor, range(10), CPU)
    assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.mark.parametrize("gpu", [False, True])
def test_nothing_is_read_ahead_on_a_cpu_or_of_what_is_there(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    keys: list[int] = []
    monkeypatch.setattr(module, "goes_on", lambda device: gpu)
    for i, batch in enumerate(ahead(lambda i: (keys.append(i), torch.tensor(i))[1], range(4), CPU)):
        assert int(batch) == i and settled(keys) == i + 1


def test_every_tensor_of_a_batch_is_changed() -> None:
    twice = lambda t: 2 * t  # noqa: E731
    one = torch.ones(2, 3)
    assert mapped(Two(one, None), twice).more is None and torch.equal(mapped(Two(one, one), twice).more, 2 * one)
    found = mapped((Observations(one, Mask((3,), torch.full((2, 3), 0.5), one)), one, 7), twice)
    assert torch.equal(found[0].obs, 2 * one) and torch.equal(found[0].observer.mask, 2 * one) and float(found[0].observer.std().max()) == 1.0
    assert torch.equal(found[1], 2 * one) and found[2] == 7


@pytest.mark.parametrize("kind", ["noise", "mask", "unet"])
def test_a_fit_that_reads_ahead_is_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: list[str], kind: str) -> None:
    """Start, E-steps with chains and M-steps, bit for bit."""
    shape = (8, 8) if kind == "unet" else (3,)
    x, g = normal(120, *shape).float(), torch.Generator().manual_seed(2)
    seen = torch.rand(x.shape, generator=g) < 0.7
    made = Mask(shape, torch.tensor(0.3), seen) if kind == "mask" else Identity(shape, torch.tensor(0.5))
    write_observations(tmp_path / "obs.npz", Observations(made.simulate(x, g), made))
    short = ["--train.steps", "4", "--train.start-steps", "6", "--train.batch", "16", "--walk.levels", "3", "--walk.batch", "32", "--wandb", "off"]
    guidance = ["--guidance", "cg" if kind == "noise" else "auto", "--start", "self-supervised", "--iters", "2", "--device", "cpu"]
    for out in ("ahead", "plain"):
        main(["fit", "--observations", str(tmp_path / "obs.npz"), "--out", str(tmp_path / out), *guidance, *short])
        assert (out == "ahead") == bool(threads)
        threads.clear()
        monkeypatch.setattr(module, "goes_on", lambda device: False)
    for name in ("round_002/samples.npy", "round_002/prior.safetensors"):
        assert (tmp_path / "ahead" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_training_on_clean_data_that_reads_ahead_is_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: list[str]) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    short = ["--train.steps", "8", "--train.batch", "16", "--train.rounds", "2", "--pictures", "0", "--wandb", "off", "--device", "cpu"]
    for out in ("ahead", "plain"):
        main(["train", "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / out), *short])
        assert (out == "ahead") == bool(threads)
        threads.clear()
        monkeypatch.setattr(module, "goes_on", lambda device: False)
    assert (tmp_path / "ahead/prior.safetensors").read_bytes() == (tmp_path / "plain/prior.safetensors").read_bytes()


def test_carried_levels_are_those_of_other_data_of_the_batch() -> None:
    """Every map of the batch is used once, none by the datum that it is of; the loss takes them as it takes drawn ones."""
    count, x = 8, normal(8, 2).float()
    sigma_z = torch.stack([torch.linspace(1, 2, count), torch.full((count,), math.inf)], 1)
    loss = PairLoss(Draws(x, x, 0.0), 0.1, sigma_z, carried=True)
    index = torch.tensor([3, 1, 6, 0])
    batch = loss.read(index)
    assert torch.equal(batch.x, x[index]) and torch.equal(batch.sigma_z.sort(0).values, sigma_z[index].sort(0).values)
    assert not (batch.sigma_z[:, 0] == sigma_z[index, 0]).any()
    wide = loss.read(torch.arange(count).repeat(500))
    tau = loss.inputs(wide, torch.Generator().manual_seed(0))[2]
    maps = tau[:, 0] != tau[:, 1]
    assert maps.float().mean().item() == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / len(tau)))
    level = (tau[maps, 0].double() ** -2 - tau[maps, 1].double() ** -2).rsqrt()  # an infinite level adds nothing, so the other entry's is tau's own
    torch.testing.assert_close(level, wide.sigma_z[maps, 0].double(), rtol=1e-3, atol=1e-3)
    assert PairLoss(Draws(x, x, 0.0), 0.1, carried=True).read(index).sigma_z is None
