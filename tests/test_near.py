r"""Arrays that lie near, and work for the disk behind that of a GPU, on a CPU that takes itself for one: fits are the same bit for bit."""

from __future__ import annotations

import functools
import hashlib
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact import normal
from test_survive_train import until_done

from emdiff import commands_fit, near, plan
from emdiff.behind import Behind
from emdiff.cli import main
from emdiff.data import Observations
from emdiff.errors import UsageError
from emdiff.finished import SUMS
from emdiff.fit import current_data
from emdiff.interrupt import Stopped
from emdiff.near import Mirrored
from emdiff.observations import write_observations
from emdiff.rows import Rows
from emdiff.runs import Run
from emdiff.scale import Scale
from emdiff.written import NewArray
from observers import Identity, Mask

CPU = torch.device("cpu")
SHORT = ["--train.steps", "4", "--train.start-steps", "6", "--train.batch", "16", "--walk.levels", "3", "--walk.batch", "32", "--wandb", "off"]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU with room, that goes on while a thread writes; the names of what was made near."""
    made: list[str] = []
    monkeypatch.setattr(near, "has_room", lambda shape, device: True)
    monkeypatch.setattr(commands_fit, "goes_on", lambda device: True)
    plain = Mirrored.__init__

    def noted(self: Mirrored, file: NewArray, device: torch.device) -> None:
        made.append(file.path.stem)
        plain(self, file, device)

    monkeypatch.setattr(Mirrored, "__init__", noted)
    return made


def observe(path: Path, kind: str) -> None:
    shape = (8, 8) if kind == "image" else (3,)
    x, g = normal(90, *shape).float(), torch.Generator().manual_seed(2)
    x = x[:, :1].expand(x.shape) + 0.1 * x if kind == "unknown" else x
    noise = torch.tensor(0.5)
    made = Mask(shape, noise, torch.rand(x.shape, generator=g) < 0.7) if kind == "mask" else Identity(shape, noise)
    write_observations(path, Observations(made.simulate(x, g), made))


KINDS = {
    "vectors": ["--start", "self-supervised"],
    "mask": ["--start", "self-supervised"],
    "image": ["--start", "self-supervised", "--strata", "true"],
    "turns": ["--start", "self-supervised", "--train.refresh", "40"],
    "cg": ["--start", "gaussian", "--guidance", "cg"],
    "unknown": ["--start", "gaussian", "--noise-std", "auto"],
    "mixture": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_whose_arrays_lie_near_is_one_whose_arrays_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "Plan", functools.partial(plan.Plan, prior_samples=8))
    observe(tmp_path / "obs.npz", kind)
    command = ["fit", "--observations", "obs.npz", "--iters", "3", "--device", "cpu", *SHORT, *KINDS[kind]]
    main([*command, "--out", "plain"])
    made = request.getfixturevalue("roomy")
    main([*command, "--out", "near"])
    assert kind == "turns" or {"y", "x"} <= set(made)
    names = [path.relative_to("plain") for path in sorted(Path("plain").glob("*/*.npy")) + sorted(Path("plain").glob(f"*/{SUMS}"))]
    assert len(names) == 9
    for name in names:
        assert (Path("near") / name).read_bytes() == (Path("plain") / name).read_bytes(), name
    for k in range(4):  # sums made behind are those of the files
        for line in (Path("near") / (f"round_{k:03d}" if k else "start") / SUMS).read_text().splitlines():
            digest, _, name = line.partition("  ")
            file = Path("near") / (f"round_{k:03d}" if k else "start") / name
            assert not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() == digest


def test_a_fit_that_writes_behind_and_is_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:  # fmt: skip
    """Stopped again and again, within walks and trainings, while the thread writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "Plan", functools.partial(plan.Plan, prior_samples=8))
    observe(Path("obs.npz"), "image")
    command = ["fit", "--observations", "obs.npz", "--iters", "3", "--device", "cpu", *SHORT]
    command += ["--walk.batch", "20", "--train.steps", "40", *KINDS["image"]]
    main([*command, "--out", "whole"])
    request.getfixturevalue("roomy")

    def again() -> None:
        try:
            main([*command, "--out", "parts"])
        except SystemExit as end:
            raise Stopped(signal.SIGTERM) from end

    _, lives = until_done(monkeypatch, again, 7)
    assert lives > 5
    for name in ("samples.npy", "chains.npy", "prior.safetensors", SUMS):
        assert (Path("parts/round_003") / name).read_bytes() == (Path("whole/round_003") / name).read_bytes(), name
    assert not list(Path("parts").glob("*/.*.tmp")), "what an earlier life left unfinished"


@pytest.mark.parametrize("where", ["plain", "roomy"])
def test_samples_are_written_in_the_units_of_the_observations(tmp_path: Path, request: pytest.FixtureRequest, where: str) -> None:
    if where == "roomy":
        request.getfixturevalue(where)
    x, made = 30 + 5 * normal(90, 3).float(), Identity((3,), torch.tensor(0.5))
    write_observations(tmp_path / "obs.npz", Observations(made.simulate(x, torch.Generator().manual_seed(2)), made))
    command = ["fit", "--observations", str(tmp_path / "obs.npz"), "--iters", "2", "--device", "cpu", "--start", "self-supervised"]
    main([*command, *SHORT, "--out", str(tmp_path / "run")])
    for folder in ("start", "round_001", "round_002"):
        assert abs(np.load(tmp_path / "run" / folder / "samples.npy").mean() - 30) < 3, folder
    assert abs(np.load(tmp_path / "run" / "round_002" / "chains.npy").mean()) < 1


def test_each_round_takes_the_noise_that_the_one_before_it_left() -> None:
    data = Observations(normal(20, 3).float(), Identity((3,), torch.tensor(0.5)))
    known, unknown = (SimpleNamespace(level=level, device="cpu") for level in (None, 0.5))
    run = SimpleNamespace(figure=lambda k, name: 0.6 + 0.1 * k)
    found, current = [], None
    for k in range(4):
        current = current_data(k, data, current, Scale(0.0, 2.0), unknown, run)
        found.append([float(some.rows(slice(0, 1)).observer.std().flatten()[0]) for some in (current.given, current.near, current.standard)])
    assert np.allclose(found, [[n, n, n / 2] for n in (0.5, 0.6, 0.7, 0.8)])
    first = current_data(0, data, None, Scale(0.0, 2.0), known, run)
    second = current_data(1, data, first, Scale(0.0, 2.0), known, run)
    assert second is not first and second.started and current_data(2, data, second, Scale(0.0, 2.0), known, run) is second


def test_an_array_near_goes_on_with_what_its_file_holds(tmp_path: Path) -> None:
    first = NewArray(tmp_path / "y.npy", (4, 2), lasting=True)
    first[0:2] = torch.ones(2, 2)
    first.sync()
    again = Mirrored(NewArray(tmp_path / "y.npy", (4, 2), lasting=True), CPU)
    assert again.found and torch.equal(again[0:2], torch.ones(2, 2))
    again[2:4] = 2 * torch.ones(2, 2)
    there = again.commit()
    assert torch.equal(there, torch.tensor([1.0, 1, 2, 2])[:, None].expand(4, 2))
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "y.npy")), there)


def test_rows_that_are_chosen_from_an_array_near_are_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that steps of a training pick theirs by indices there."""
    monkeypatch.setattr(near, "room", lambda device: 10**6)
    x = torch.arange(6.0).reshape(3, 2)
    found = near.near(Rows((3, 2), x.__getitem__), CPU)
    assert isinstance(found, torch.Tensor) and torch.equal(found, x)
    assert near.near(x, CPU) is x


def test_work_behind_is_done_in_turn_in_a_thread_and_waited_for() -> None:
    begun, go, names = threading.Event(), threading.Event(), list[str]()
    later = Behind(True)
    later(lambda: (begun.set(), go.wait(10), names.append(threading.current_thread().name))[0])
    later(lambda: names.append("second"))
    assert begun.wait(10) and not names
    go.set()
    later.settle()
    assert names == ["behind_0", "second"] and not later.due
    later.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("behind")]


def test_what_work_behind_raises_is_raised_where_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: NewArray, start: int, rows: object) -> None:
        raise UsageError("no space")

    with Run(tmp_path / "run", {}, "of nothing", behind=True) as run:
        run.begin(1)
        monkeypatch.setattr(NewArray, "write", full)
        run.put(1, "samples", torch.ones(3, 2))
        with pytest.raises(UsageError, match="no space"):
            run.finish(1, {})
    assert not (tmp_path / "run" / "round_001" / "metrics.json").exists()
