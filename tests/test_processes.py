"""Several processes fit one prior: the same figures as one, the same weights in all, one end for all, and a relaunch that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import folder_state, here, refused, vectors  # noqa: F401

from emdiff.cli import main
from emdiff.em import Walk
from emdiff.errors import UsageError
from emdiff.folder import RunFolder
from emdiff.launch import launch
from emdiff.outline import Plan
from emdiff.plan import check_shares
from emdiff.processes import ALONE, Team, check_devices, joined, place
from emdiff.start import Choice

FIT = ["fit", "--observations", "obs.npz", "--iters", "2", "--start", "gaussian", "--walk.levels", "6", "--walk.batch", "50", "--wandb", "off",
       "--device", "cpu", "--train.steps", "300", "--train.start-steps", "100"]  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import json, signal, sys
from pathlib import Path
import torch
from emdiff import interrupt
from emdiff.denoise import Denoiser
from emdiff.gaussian import fit_gaussian
from emdiff.observations import Observations
from emdiff.processes import joined
from emdiff.training import train
from observers import Mask

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.ones(2))

def slope(net, index, generator):
    x = torch.randn(len(index), generator=generator)
    return (net.a * x - (3 + 0.01 * index) * x).square().mean()

class Bursting:  # in the second process alone, for a window of steps
    def __init__(self, rank):
        self.left = 50 if rank else 10**6

    def __call__(self, net, index, generator):
        self.left -= 1
        return net.a * float("nan") if -8 < self.left < 0 else slope(net, index, generator)

def slow(net, index, generator):
    return (net.a - index.float()).square().mean()

all_threads = torch.get_num_threads()
with joined("cpu") as team:
    found = {"rank": team.rank, "gathered": team.gather(team.rank), "led": team.lead(lambda: f"by {team.rank}"), "largest": team.largest(team.rank)}
    found["threads"] = [all_threads, torch.get_num_threads()]
    x = torch.randn(41, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = (torch.rand(41, 3, generator=torch.Generator().manual_seed(1)) < 0.7).double()
    data = Observations(mask * x, Mask((3,), torch.tensor(0.5, dtype=torch.float64), mask))
    own = data.rows(team.part(41))
    one, all_ = fit_gaussian(data, 5), fit_gaussian(own, 5, total=team.total)
    found["gaussian"] = float((one.covariance() - all_.covariance()).abs().max())
    exact = train(Line(), slow, 40, 1, batch=13, rate=0.1, team=team, seed=4).loss
    found["loss of 13"] = [exact, train(Line(), slow, 40, 1, batch=13, rate=0.1, seed=4).loss]
    how = dict(count=64, steps=120, batch=9, rate=0.1, seed=5, team=team)
    whole = train(Line(), slope, **how)
    path = Path(sys.argv[1])
    for _ in range(3):  # the second process alone is asked to end, twice
        calls = iter(range(10**6))
        interrupt.asked = lambda: signal.SIGTERM if team.rank == 1 and _ < 2 and next(calls) > 31 else 0
        try:
            again = train(Line(), slope, **how, checkpoint=path)
        except interrupt.Stopped as stop:
            found.setdefault("stopped", []).append(stop.status)
            team.wait()
    said = []
    burst = train(Line(), Bursting(team.rank), 64, 240, batch=9, rate=0.8, seed=6, team=team, say=said.append)
    found["burst"] = [float(burst.denoiser.a), burst.retreats, said]
    held = train(Line(), slope, 64, 300, batch=8, rate=0.1, seed=5, held_out=16, team=team)
    found |= {"whole": float(whole.denoiser.a), "again": float(again.denoiser.a), "held out": [float(held.denoiser.a), held.held_out, held.steps]}
    Path(f"{sys.argv[1]}.{team.rank}").write_text(json.dumps(found))
"""


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """A program on this checkout, one thread per process, states saved often."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    surroundings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "EMDIFF_CHECKPOINT_SECONDS": "0.1", **environment}
    surroundings = {name: value for name, value in surroundings.items() if value}
    return subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fit(out: str, *more: str) -> subprocess.Popen[str]:
    return start(sys.executable, "-m", "emdiff.cli", *FIT, "--out", out, "--devices", "2", *more)


def children(pid: int) -> dict[str, int]:
    """Process ids of a launcher's processes, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        place = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{child}/environ").read_text().split("\0"))
        found[place.get("RANK", "")] = int(child)
    return found


def when(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, or the process is not."""
    while process.poll() is None and not ready():
        time.sleep(0.01)


def results(run: str) -> dict[str, bytes]:
    """What a run ends with: priors, samples, chains."""
    return {name: content for name, content in folder_state(run).items() if name.endswith((".safetensors", ".npy"))}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with observations and a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    before = Path.cwd()
    os.chdir(folder)
    try:
        vectors(n=600)
        process = fit("run")
        _, errors = process.communicate(timeout=900)
    finally:
        os.chdir(before)
    assert process.returncode == 0, errors
    return folder


def test_collectives_trainings_and_a_shared_gaussian(tmp_path: Path) -> None:
    """Two processes, which divide the threads: a Gaussian fitted to shares is that of all; a batch of 13 has the loss that one process has; a
    training that is stopped in one process stops in both at one step and goes on to the same bits; a loss that is not finite in one sends both back.
    """
    (tmp_path / "worker.py").write_text(WORKER)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "EMDIFF_MEET": str(tmp_path / "meet"), "OMP_NUM_THREADS": ""}
    workers = [start(sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "out"), RANK=r, LOCAL_RANK=r, **place) for r in ("0", "1")]
    assert [worker.communicate(timeout=900)[1] and worker.returncode for worker in workers] in ([0, 0], ["", ""]), [w.returncode for w in workers]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert first.pop("rank") == 0 and second.pop("rank") == 1 and first == second, "weights too are equal, to the last bit"
    assert first["gathered"] == [0, 1] and first["led"] == "by 0" and first["largest"] == 1
    assert first["threads"][1] == max(1, first["threads"][0] // 2)
    a, retreats, said = first["burst"]
    assert a == pytest.approx(3.3, abs=0.3) and retreats == len(said) == 1 and "nan" in said[0]
    assert first["gaussian"] < 1e-9 and first["loss of 13"][0] == pytest.approx(first["loss of 13"][1], rel=1e-6)
    assert first["stopped"] == [143, 143] and first["again"] == first["whole"] == pytest.approx(3.3, abs=0.2)
    assert first["held out"][0] == pytest.approx(3.3, abs=0.3) and first["held out"][1] > 0


CHILD = """
import os, signal, sys, time
from emdiff.launch import follow_parent
rank, how = os.environ["RANK"], sys.argv[1 + int(os.environ["RANK"])]
signal.signal(signal.SIGTERM, lambda *_: None if how == "deaf" else os._exit(143))
follow_parent()
open(f"here.{rank}", "w").write(str(os.getpid()))
if how == "waits" or how == "deaf":
    time.sleep(60)
while not all(os.path.exists(f"here.{r}") for r in range(int(os.environ["WORLD_SIZE"]))):
    time.sleep(0.01)
os.kill(os.getpid(), 9) if how == "killed" else os._exit(int(how))
"""


@pytest.mark.parametrize(
    "ends, status, said",
    [("00", 0, ""), ("03", 3, ""), ("42", 2, ""), ("0k", 137, "process 2 of 2"), ("w1", 1, "process 2 of 2"), ("d3", 3, ""), ("w4", 4, "")],
)
def test_the_launcher_ends_all_with_the_status_of_the_one_that_failed(
    ends: str, status: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """w waits, d is deaf to SIGTERM, k is killed; a number is how it ends. One that only lost another one (4) is not the one that failed."""
    monkeypatch.setattr("emdiff.launch.PATIENCE", 0.5)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "child.py").write_text(CHILD)
    ways = [{"w": "waits", "d": "deaf", "k": "killed"}.get(end, end) for end in ends]
    assert launch(2, [sys.executable, str(tmp_path / "child.py"), *ways]) == status
    errors = capfd.readouterr().err
    assert errors.count("emdiff:") == bool(said) and said in errors
    assert not [rank for rank in "01" if Path(f"/proc/{Path(f'here.{rank}').read_text()}").exists()]


def test_processes_end_when_the_launcher_is_killed_and_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    program = f"import sys; from emdiff.launch import launch; sys.exit(launch(2, [sys.executable, {str(tmp_path / 'child.py')!r}, 'waits', 'waits']))"
    for number, status in ((signal.SIGKILL, -9), (signal.SIGTERM, 143)):
        process = start(sys.executable, "-c", program)
        when(lambda: all(Path(f"here.{rank}").is_file() and Path(f"here.{rank}").read_text() for rank in "01"), process)
        theirs = [Path("/proc", Path(f"here.{rank}").read_text()) for rank in "01"]
        process.send_signal(number)
        assert process.wait(900) == status
        for proc in theirs:
            while proc.exists() and "Z" not in (proc / "stat").read_text().rpartition(")")[2]:
                time.sleep(0.01)
        for rank in "01":
            Path(f"here.{rank}").unlink()


def test_two_processes_end_with_the_figures_of_one(two: Path) -> None:
    """Other draws, the same law: over 600 data the figures' own noise is .02 to .03; readers find what they find in any run."""
    vectors(n=600)
    main([*FIT, "--out", "one"])
    alone, together = (json.loads((path / "round_002/metrics.json").read_text()) for path in (Path("one"), two / "run"))
    for name, slack in {"chi2": 0.1, "error": 0.03, "sample_std": 0.06, "sample_mean": 0.1, "prior_std": 0.15}.items():
        assert together[name] == pytest.approx(alone[name], abs=slack), name
    assert {str(p.relative_to("one")) for p in Path("one").rglob("*")} == {str(p.relative_to(two / "run")) for p in (two / "run").rglob("*")}
    assert np.load(two / "run/round_002/samples.npy").shape == (600, 3) and not np.array_equal(
        np.load(two / "run/round_002/samples.npy"), np.load("one/round_002/samples.npy")
    )
    assert json.loads((two / "run/about.json").read_text())["processes"] == 2


def test_one_process_that_dies_ends_all_and_the_same_command_goes_on(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of the second process in a training, SIGTERM to all in the next life; the third, by torchrun, ends with the bits of an undisturbed run.
    Then one process adds a round."""
    vectors(n=600)
    process = fit("run")
    when(lambda: Path("run/round_001/training.safetensors").exists(), process)
    ranks = children(process.pid)
    os.kill(ranks["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 137 and "process 2 of 2" in errors and "SIGKILL" in errors and "the same command continues" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    process = fit("run")
    when(lambda: Path("run/round_002").exists(), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 143 and "the same command continues" in errors
    assert not (Path("run/round_002") / "metrics.json").exists()
    elastic = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", "--", sys.executable, "-m", "emdiff.cli"]
    process = start(sys.executable, *elastic, *FIT, "--out", "run")
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert results("run") == results(str(two / "run"))
    assert not list(Path("run").rglob("*-of-2*")) and not list(Path("run").rglob("*.tmp")) and not Path("run/lock").exists()
    main([*FIT, "--out", "run", "--iters", "3"])
    assert "this run was at processes 2, now 1" in capsys.readouterr().out
    assert json.loads(Path("run/round_003/metrics.json").read_text())["chi2"] == pytest.approx(1, abs=0.15)


def test_what_cannot_be_shared_is_refused_before_any_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    vectors(n=200)
    assert "--devices is 0" in refused(capsys, *FIT, "--devices", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    words = refused(capsys, *FIT[:-4], "--device", "cuda", "--devices", "2")
    assert "--devices is 2" in words and "1 GPUs" in words and "--device cpu" in words
    check_devices("cpu", 64)
    for environment in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match="WORLD_SIZE"):
            place()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="--devices is 3"), joined("cpu", 3):
        pass


def test_every_row_and_every_state_belongs_to_one_process(tmp_path: Path) -> None:
    """Parts of the processes cover all rows in order; parts on disk are one array; states of all are each one's own again."""
    teams = [Team(rank, 4) for rank in range(4)]
    among = torch.randperm(11)
    assert torch.equal(torch.cat([team.rows(11) for team in teams]), torch.arange(11)) and ALONE.rows(11) is None
    assert torch.equal(torch.cat([team.rows(11, among) for team in teams]), among) and ALONE.rows(11, among) is among
    assert len({team.seed(7) for team in teams}) == 4 and teams[0].seed(7) == 7 and len({team.mark("y") for team in teams}) == 4
    stored = {"draws": torch.zeros(1), "draws@1": torch.ones(1), "draws@11": torch.full((1,), 11.0), "weights:a": torch.ones(2)}
    assert [float(Team(rank, 12).own(stored)["draws"]) for rank in (0, 1, 11)] == [0.0, 1.0, 11.0]
    whole = torch.rand(11, 2)
    for team in teams:
        team.wait = lambda: None  # type: ignore[method-assign]
        part = RunFolder(tmp_path).scratch(1, team.mark("y"), (len(team.rows(11)), 2))
        part[:] = whole[team.part(11)]
        if team.rank < 3:
            part.commit()
    with pytest.raises(UsageError, match="share"):
        RunFolder(tmp_path).whole(1, "x", RunFolder(tmp_path).scratch(1, teams[0].mark("x"), (2, 2)), teams[0])
    assert torch.equal(RunFolder(tmp_path).whole(1, "y", part, teams[3])[torch.arange(10, -1, -1)], whole.flip(0))


def test_less_work_than_processes_is_refused() -> None:
    plan = Plan(1, Choice("gaussian", ""), Walk(), {}, batch=4)
    check_shares(plan, 5, 4)
    with pytest.raises(UsageError, match="--train.batch is 4, which 5"):
        check_shares(plan, 5, 5)
    halved = plan._replace(start=Choice("self-supervised", ""))  # a batch of 4 holds 2 observations twice
    check_shares(halved, 5, 2)
    with pytest.raises(UsageError, match="--train.batch is 4, which 3 processes cannot share; start at most 2"):
        check_shares(halved, 5, 3)
    with pytest.raises(UsageError, match="observations is 3, which 4"):
        check_shares(plan, 3, 4)
