"""Deaths at every point of a fit, divergence, forks, locks, damaged files: the same command ends where an undisturbed run does, or says why."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from exact import covariance, observer
from safetensors import safe_open
from test_cli import SMALL, folder_state, here, vectors  # noqa: F401
from test_cli import refused as refused_alone
from test_training import Line, slope_loss

import emdiff.files
from emdiff import interrupt
from emdiff.cli import main
from emdiff.denoise import GaussianDenoiser
from emdiff.em import Walk, e_step
from emdiff.errors import FitFailed, UsageError
from emdiff.finished import latest_prior
from emdiff.interrupt import Stopped
from emdiff.lock import Lock, birth
from emdiff.observations import Observations
from emdiff.training import RETREAT, TRIES, train
from emdiff.watch import WINDOW
from emdiff.written import NewArray
from observers import Identity

FIT = ["fit", "--observations", "obs.npz", *SMALL]


def refused(capsys, *arguments: str) -> str:
    """The one line with which a command ends with status 2, whatever was shown before it."""
    capsys.readouterr()
    return refused_alone(capsys, *arguments)


class Killed(BaseException):
    """Stands for kill -9: nothing but what is on disk remains."""


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are saved whenever they can be."""
    monkeypatch.setattr(interrupt, "EVERY", 0.0)


def results(run: str) -> dict[str, bytes]:
    """What a run ends with: priors, samples, chains."""
    return {name: content for name, content in folder_state(run).items() if name.endswith((".safetensors", ".npy"))}


@pytest.mark.parametrize("start", ["gaussian", "mixture"])
def test_a_run_that_dies_at_random_writes_ends_as_an_undisturbed_one(start: str, often, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life ends just before or just after some rename, with the temporary file left behind as a real death leaves it."""
    vectors()
    command = [*FIT, "--iters", "2", "--start", start]
    main([*command, "--out", "whole"])
    draw, real, lives = random.Random(0), os.replace, 0
    left = [0]

    def replace(source: Path, target: Path) -> None:
        left[0] -= 1
        after = draw.random() < 0.5
        if left[0] == 0 and not after:
            source.with_name(".left.1.tmp").write_bytes(b"half-written")
            raise Killed
        real(source, target)
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(emdiff.files.os, "replace", replace)
    while True:
        lives, left[0] = lives + 1, draw.randrange(2, 18)  # a round takes up to 14 renames, from those of the start of a life to its own last
        try:
            main([*command, "--out", "run"])
            break
        except Killed:
            continue
    assert lives > 4 and results("run") == results("whole")
    assert not list(Path("run").rglob("*.tmp")) and not Path("run/lock").exists()
    assert [json.loads(line)["iter"] for line in Path("run/metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def killed(kind: int, out: str, ready: Callable[[int], bool]) -> subprocess.Popen:
    """A fit that gets a signal as soon as it is ready for it, as told from its process id."""
    environment = {**os.environ, "EMDIFF_CHECKPOINT_SECONDS": "0.1"}
    command = [sys.executable, "-m", "emdiff.cli", "fit", "--observations", "obs.npz", "--iters", "1", "--out", out, *SMALL, "--train.steps", "400"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        if process.poll() is not None or ready(process.pid):
            break
        time.sleep(0.02)
    process.send_signal(kind)
    return process


def test_real_signals_in_the_middle_of_a_training(capsys) -> None:
    """kill -9 leaves a lock that is taken over; SIGTERM ends with 143 within 10 seconds; the run ends as one that was left alone."""
    vectors()
    whole = [*FIT, "--iters", "1", "--train.steps", "400"]
    main([*whole, "--out", "whole"])
    process = killed(signal.SIGKILL, "run", lambda pid: Path("run/round_001/training.safetensors").exists())
    assert process.wait(30) == -9 and Path("run/lock").is_file() and not Path("run/round_001/metrics.json").exists()
    process = killed(signal.SIGTERM, "run", lambda pid: json.loads(Path("run/lock").read_text() or "{}").get("pid") == pid)
    sent = time.monotonic()
    assert process.wait(30) == 143 and time.monotonic() - sent < 10
    capsys.readouterr()
    main([*whole, "--out", "run"])
    assert results("run") == results("whole")


def test_a_stopped_training_goes_on_to_the_same_bits(often, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without held-out data, stopped at every few steps."""
    for held_out in (0, 16):
        how = {"count": 80, "steps": 230, "batch": 16, "rate": 0.05, "seed": 3, "held_out": held_out}
        whole, path = train(Line(), slope_loss, **how), tmp_path / f"{held_out}.safetensors"
        for _ in range(100):
            calls = iter(range(10**6))
            with monkeypatch.context() as patch:
                patch.setattr(interrupt, "asked", lambda calls=calls: signal.SIGTERM if next(calls) > 37 else 0)
                try:
                    again = train(Line(), slope_loss, **how, checkpoint=path)
                    break
                except Stopped:
                    continue
        assert torch.equal(again.denoiser.a, whole.denoiser.a) and again[1:4] == whole[1:4]


def stop() -> None:
    raise Stopped(signal.SIGTERM)


@pytest.mark.parametrize("observed", ["identity", "projection"])
def test_a_stopped_e_step_goes_on_to_the_same_bits(often, observed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every batch but the first: persistent chains with a solver, and walks that start anew with chains that escape."""
    made, prior = observer(observed, 50, (3,)), GaussianDenoiser.from_covariance(torch.zeros(3, dtype=torch.float64), covariance(3))
    data = Observations(made.simulate(prior.sample(50, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)), made)
    walk = Walk("fused" if observed == "identity" else "cg", tau_first=2.0, levels=4, batch=9)
    chains, bound = prior.sample(50, torch.Generator().manual_seed(3)), 1.5
    store = lambda name, shape: NewArray(tmp_path / f"{name}.npy", shape, lasting=True)  # noqa: E731

    def run(path: Path | None) -> list:
        draws = e_step(prior, data, chains, walk, torch.Generator().manual_seed(4), bound, store=store, checkpoint=path)
        return [a.commit()[:] if isinstance(a, NewArray) else a for a in draws]

    whole, path, lives = run(None), tmp_path / "walk.safetensors", 0
    assert whole[3] > 0 and bool(whole[4].any())
    while lives < 20:
        lives, calls = lives + 1, iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr("emdiff.unfinished.asked", lambda: True)
            patch.setattr("emdiff.unfinished.check", lambda calls=calls: next(calls) > 0 and stop())
            try:
                again = run(path)
                break
            except Stopped:
                continue
    assert lives == 6 and all(a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b) for a, b in zip(again, whole))
    assert all(torch.equal(a, b) for a, b in zip(run(path)[:2], whole[:2])), "a finished one is not walked again"


def test_a_signal_within_a_batch_loses_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars end the work at their next update, as soon as a signal came: by then the batch that it came in is saved."""
    data, sent = Observations(torch.zeros(40, 2), Identity((2,), torch.tensor(0.5))), []
    monkeypatch.setattr("emdiff.unfinished.asked", lambda: bool(sent))
    monkeypatch.setattr("emdiff.unfinished.check", lambda: sent and stop())

    def progress(done: int) -> None:
        if sent:
            stop()
        if done == 20:
            sent.append(signal.SIGTERM)

    store, path = lambda name, shape: NewArray(tmp_path / f"{name}.npy", shape, lasting=True), tmp_path / "walk.safetensors"  # noqa: E731
    prior, draw = GaussianDenoiser.from_covariance(torch.zeros(2), torch.eye(2)), torch.Generator().manual_seed(0)
    with pytest.raises(Stopped):
        e_step(prior, data, None, Walk(levels=2, batch=10), draw, progress=progress, store=store, checkpoint=path)
    assert int(safe_open(path, "pt").get_tensor("kept").shape[0]) == 30


def test_a_state_of_another_training_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train(Line(), slope_loss, 64, 40, batch=8, seed=1, checkpoint=path)
    assert torch.equal(
        train(Line(), slope_loss, 64, 40, batch=8, seed=2, checkpoint=path).denoiser.a, train(Line(), slope_loss, 64, 40, batch=8, seed=2).denoiser.a
    )
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="state.safetensors.*remove it"):
        train(Line(), slope_loss, 64, 40, batch=8, seed=2, checkpoint=path)


class Bursting:
    """The loss of a = 3, which is `value` from some step on as long as the rate is above a limit."""

    def __init__(self, step: int, value: float, times: int) -> None:
        self.left, self.value, self.times = step, value, times

    def __call__(self, net: Line, index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        self.left -= 1
        if self.left < 0 and self.times:
            self.times -= self.left % WINDOW == 0
            return net.a * 0 + self.value
        return slope_loss(net, index, generator)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_a_loss_that_diverges_goes_back_to_the_average_and_a_lower_rate(value: float) -> None:
    said: list[str] = []
    trained = train(Line(), Bursting(100, value, 2), 64, 600, batch=32, rate=0.4, say=said.append)
    assert trained.retreats == len(said) == 2 and trained.steps == 600 and abs(trained.denoiser.a.item() - 3) < 0.05
    assert "back to the average of step 100, rate 0.4 -> 0.1" in said[0] and f"rate 0.1 -> {0.1 / RETREAT:g}" in said[1]


def test_a_loss_that_keeps_diverging_ends_the_fit_with_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with pytest.raises(FitFailed, match=f"{TRIES} times before"):
        train(Line(), Bursting(50, float("nan"), 10**6), 64, 600, rate=0.4, say=said.append)
    assert len(said) == TRIES
    vectors()
    monkeypatch.setattr("emdiff.firsts.self_supervised_loss", lambda denoiser, batch: next(denoiser.parameters()).sum() * float("nan"))
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--iters", "1", "--start", "self-supervised", "--out", "run"])
    assert end.value.code == 3 and "--train.rate" in capsys.readouterr().err


def test_a_training_in_bfloat16_ends_near_one_in_float32() -> None:
    """The same draws and 60 steps of a small U-Net: estimates differ by less than 2 % of the data's spread."""
    from emdiff.em import Draws
    from emdiff.pairs import PairLoss
    from emdiff.prior import build_network
    from emdiff.streams import stream

    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    at = 2 + 4 * torch.rand(200, 2, generator=stream(0, "at"))
    data = torch.exp(-((y - at[:, 0, None, None]) ** 2 + (x - at[:, 1, None, None]) ** 2) / 4)
    data = (data - data.mean()) / data.std()
    found = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        net = build_network((8, 8), kind="unet", widths=[4, 8], patch=1)
        net.bf16 = bf16
        trained = train(net, PairLoss(Draws(data, data, 0.0), 0.1), 200, 60, batch=32, rate=5e-3).denoiser
        trained.bf16 = False
        noisy = data + 0.5 * torch.randn(data.shape, generator=stream(0, "noise"))
        found[bf16] = trained.xhat(noisy[:, None], torch.tensor([0.5]))
    error = (found[False] - data).square().mean().sqrt()
    assert 0 < (found[True] - found[False]).square().mean().sqrt() < 0.1 and error < 0.4


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(capsys) -> None:
    vectors()
    main([*FIT, "--iters", "1", "--out", "run"])
    lock, again = Path("run/lock"), [*FIT, "--iters", "2", "--out", "run"]
    held = Lock(Path("run"))
    capsys.readouterr()
    line = refused(capsys, *again)
    assert f"process {os.getpid()} on {socket.gethostname()}" in line and "last sign of life was" in line and "wait for it" in line
    owner = json.loads(lock.read_text())
    lock.write_text(json.dumps(owner | {"host": "another"}))
    assert "remove run/lock" in refused(capsys, *again)
    held.release()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for dead in ({"pid": ended.pid}, {"birth": owner["birth"] - 1}):
        lock.write_text(json.dumps(owner | dead))
        main(again)
        assert "taken over" in capsys.readouterr().out and not lock.exists()
    assert birth(os.getpid()) == owner["birth"] and birth(ended.pid) is None


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "began": 0.0, "birth": 1}))
    won: list[Lock] = []

    def attempt() -> None:
        with contextlib.suppress(UsageError):
            won.append(Lock(tmp_path, say=lambda line: None))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(won) == 1


def test_changes_are_named_and_a_fork_goes_on_under_them(capsys) -> None:
    vectors()
    main([*FIT, "--iters", "2", "--out", "run"])
    before = folder_state("run")
    other = ["--seed", "5", "--train.rate", "0.01"]
    capsys.readouterr()
    line = refused(capsys, *FIT, "--out", "run", *other)
    assert "seed = 0, now it is 5" in line and "train.rate = 0.002, now it is 0.01" in line and "--fork NEWDIR" in line
    fork = [*FIT, "--iters", "3", "--out", "run", *other, "--fork", "new"]
    main(fork)
    assert folder_state("run") == before
    about = json.loads(Path("new/about.json").read_text())
    assert (
        about["forked_after"] == 2
        and about["forked_changes"]["seed"] == ["0", "5"]
        and yaml.safe_load(Path("new/config.yaml").read_text())["seed"] == 5
    )
    assert Path("new/round_002/prior.safetensors").read_bytes() == before["round_002/prior.safetensors"]
    assert Path("new/round_003/metrics.json").is_file()
    main([*fork, "--iters", "4"])
    assert Path("new/round_004/metrics.json").is_file(), "the same command continues the fork"
    assert "is there already and is no fork" in refused(capsys, *FIT, "--out", "new", "--fork", "run")
    assert "--out" in refused(capsys, *FIT, "--fork", "third") and "finished round" in refused(capsys, *FIT, "--out", "no", "--fork", "third")
    vectors("few.npz", n=100)
    assert "(200, 3), these observations ask for (100, 3)" in refused(
        capsys, "fit", "--observations", "few.npz", *SMALL, "--out", "run", "--fork", "third"
    )


def test_a_changed_version_is_refused_and_a_setting_an_old_run_lacks_is_its_default(capsys) -> None:
    vectors()
    main([*FIT, "--iters", "1", "--out", "run"])
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    del config["relax"], config["walk"]["pool"], config["walk"]["gamma"]
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert "walk.gamma = 1.0 (it is older" in refused(capsys, *FIT, "--out", "run", "--walk.gamma", "2")
    main([*FIT, "--iters", "2", "--out", "run"])
    about = json.loads(Path("run/about.json").read_text())
    Path("run/about.json").write_text(json.dumps(about | {"emdiff": "0.0.1"}))
    assert f"emdiff version = 0.0.1, now it is {about['emdiff']}" in refused(capsys, *FIT, "--iters", "3", "--out", "run")
    Path("run/about.json").write_text(json.dumps(about | {"numpy": "1.0"}))
    capsys.readouterr()
    main([*FIT, "--iters", "3", "--out", "run"])
    assert "at numpy 1.0" in capsys.readouterr().out


def test_what_is_kept_of_old_rounds_can_be_bounded(monkeypatch) -> None:
    vectors()
    main([*FIT, "--iters", "2", "--out", "run"])
    main([*FIT, "--iters", "5", "--out", "run", "--keep", "2"])
    best = json.loads(Path("run/best.json").read_text())["iter"] if Path("run/best.json").exists() else 0
    held = {int(p.parent.name[-3:]) for p in Path("run").glob("round_*/prior.safetensors")}
    assert {4, 5} <= held and len(held) <= 3 and best in {0, *held}
    assert {int(p.parent.name[-3:]) for p in Path("run").glob("round_*/samples.npy")} == held
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 6 and len(list(Path("run").glob("round_*/metrics.json"))) == 5
    main([*FIT, "--iters", "6", "--out", "run"])
    assert latest_prior(Path("run")).parent.name == "round_006"


def test_files_that_changed_are_named(capsys) -> None:
    vectors()
    main([*FIT, "--iters", "1", "--out", "run"])
    done = subprocess.run(["sha256sum", "--check", "sha256.txt"], cwd="run/round_001", capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 3
    for name in ("samples.npy", "prior.safetensors"):
        path = Path("run/round_001", name)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"round_001/{name}: its SHA-256" in refused(capsys, *FIT, "--iters", "2", "--out", "run")
        if name == "prior.safetensors":
            with pytest.raises(UsageError, match="its SHA-256"):
                latest_prior(Path("run"))
        path.write_bytes(content)
    Path("run/round_001/samples.npy").rename("elsewhere.npy")
    Path("run/round_001/samples.npy").symlink_to(Path("elsewhere.npy").resolve())
    assert "samples.npy: is a symbolic link" in refused(capsys, *FIT, "--iters", "2", "--out", "run")


def test_a_full_disk_in_any_write_is_said_and_survived(often, capsys, monkeypatch) -> None:
    vectors()
    main([*FIT, "--iters", "1", "--out", "whole"])
    real, allowed = emdiff.files.to_disk, [0]

    def full(path: Path) -> None:
        allowed[0] -= 1
        if allowed[0] < 0:
            raise OSError(28, "No space left on device")
        real(path)

    for allowed[0] in (5, 9, 13):
        with monkeypatch.context() as patch:
            patch.setattr(emdiff.files, "to_disk", full)
            with pytest.raises(SystemExit) as end:
                main([*FIT, "--iters", "1", "--out", "run"])
        assert end.value.code == 2 and "No space left" in capsys.readouterr().err
    main([*FIT, "--iters", "1", "--out", "run"])
    assert results("run") == results("whole")
    assert np.load("run/round_001/samples.npy").shape == (200, 3)


def test_a_full_disk_under_standard_error_ends_with_2_too(tmp_path: Path) -> None:
    """The first progress bar cannot be written, and neither can the complaint."""
    room = "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); sys.stderr.write('x' * 99); sys.stderr.flush()"
    run = f"{room}; from emdiff.cli import main; main(sys.argv[1:])"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-c", run, "fit", "--observations", str(vectors(tmp_path / "obs.npz")), "--out", str(tmp_path / "run"), *SMALL]
        assert subprocess.run(command, stdout=log, stderr=log).returncode == 2


@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_signals_after_the_last_work_come_too_late(number: int) -> None:
    """The outcome stands, as the process ends with status 0; a process that goes on has its handlers back."""
    program = "import os, signal, sys\nfrom emdiff.interrupt import last_work, listening\nsignal.signal(int(sys.argv[1]), signal.SIG_DFL)\n"
    program += "if sys.argv[2] == 'last': last_work()\nwith listening(): pass\nos.kill(os.getpid(), int(sys.argv[1]))\n"
    ended = [subprocess.run([sys.executable, "-c", program, str(int(number)), how], capture_output=True).returncode for how in ("last", "first")]
    assert ended == [0, -number]
