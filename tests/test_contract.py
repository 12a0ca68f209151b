r"""The contract suite itself: it passes what keeps the contract and finds what does not, from Python and from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emdiff.cli import main
from observers import REGISTRY, Observer
from observers.contract import check
from observers.find import find

GOOD = """
import torch
from observers import Observer

class Gain(Observer):
    array_names = ("gain",)
    obs_shape = property(lambda self: (self.shape[0] - 1,))

    def forward(self, x):
        return self.gain * x.diff(dim=1)

    def adjoint(self, w):
        zero = torch.zeros_like(w[:, :1])
        return -torch.cat([self.gain * w, zero], 1).diff(dim=1, prepend=zero)

    @classmethod
    def example(cls, shape, count, generator):
        return cls((9,), torch.tensor(0.5), gain=0.5 + torch.rand(count, 1, generator=generator))
"""


class Broken(Observer):
    """x, but for one fault."""

    name = "broken"
    fault = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "batch":
            return x - x.mean(0)
        if self.fault == "constant":
            return x + 1
        if self.fault == "square":
            return x**2
        if self.fault == "shape":
            return x[:, :1]
        if self.fault == "dtype":
            return x.half()
        if self.fault == "input":
            return x.mul_(2)
        if self.fault == "random":
            return x + torch.randn_like(x)
        if self.fault == "raises":
            raise KeyError("no such thing")
        return x

    def adjoint(self, w: Tensor) -> Tensor:
        return -w if self.fault == "adjoint" else w


FAULTS = {
    "adjoint": "not the adjoint",
    "batch": "depends on the other data",
    "constant": "not linear, or adds a constant",
    "square": "not linear",
    "shape": r"forward returns shape \(8, 1\), expected \(8, 3\)",
    "dtype": "forward returns torch.float16",
    "input": "forward changes its input",
    "random": "another result when it is called again",
    "raises": "KeyError: 'no such thing'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_breach_is_found_and_named(fault: str) -> None:
    observer = Broken((3,), torch.tensor(0.5))
    assert check(observer).ok
    observer.fault = fault
    found = check(observer)
    assert not found.ok and any(re.search(FAULTS[fault], line) for line in found.failures), found.failures


def test_parameters_that_rows_do_not_pick_are_found() -> None:
    class Stuck(Broken):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight[: len(x)] * x

        adjoint = forward

    observer = Stuck((3,), torch.tensor(0.5))
    observer.weight = torch.rand(8, 3, dtype=torch.float64)
    assert "does not pick its parameters" in check(observer).failures[-1]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["check-observer", *arguments, "--device", "cpu"])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_built_in_observers_pass_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["ok"] is True and last["observer"] == name and last["failures"] == []
    assert max(last["adjoint_error"], last["linearity_error"], last["batch_error"]) < 1e-9
    assert last["seconds_forward"] > 0 and last["seconds_adjoint"] > 0


def test_an_observer_of_a_file_or_module_is_checked_and_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gains.py").write_text(GOOD)
    Path("bad.py").write_text(GOOD.replace("return -torch.cat", "return torch.cat"))
    assert run("gains:Gain") == 0 and run("gains.py") == 0 and run(str(tmp_path / "gains.py") + ":Gain") == 0
    capsys.readouterr()
    assert run("bad.py:Gain") == 1
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["ok"] is False and last["adjoint_error"] > 0.1 and "not the adjoint" in last["failures"][0]
    x = np.cumsum(np.random.default_rng(0).normal(size=(60, 6)), 1).astype("float32")
    gain = np.linspace(0.5, 2, 60, dtype="float32")[:, None]
    np.savez("obs.npz", obs=gain * np.diff(x), gain=gain, noise_std=0.1, shape=[6])
    assert run("gains:Gain", "--observations", "obs.npz") == 0
    small = ["--train.steps", "5", "--train.start-steps", "5", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"]
    main(["fit", "--observations", "obs.npz", "--observer", "gains:Gain", "--iters", "2", "--out", "run", *small])
    out = capsys.readouterr().out
    assert "through gain" in out and "warning: the observations tell next to nothing of" in out


@pytest.mark.parametrize("name, words", [
    ("blurr", "unknown observer 'blurr', expected one of: blur, compose"),
    ("nowhere:Blur", "nowhere: cannot be imported"),
    ("nowhere.py", "there is no file nowhere.py"),
    ("gains:Loss", "has no observer 'Loss', it has Gain"),
    ("plain:Gain", "define the class method example"),
])  # fmt: skip
def test_what_cannot_be_checked_ends_with_status_two_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gains.py").write_text(GOOD)
    Path("plain.py").write_text(GOOD[: GOOD.index("    @classmethod")])
    assert run(name) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], lines


def test_names_in_files_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("open('ran', 'w')\n" + GOOD)
    np.savez("obs.npz", obs=np.ones((3, 2)), observer="evil:Gain", noise_std=0.1)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--observations", "obs.npz"])
    assert stop.value.code == 2 and "unknown observer 'evil:Gain'" in capsys.readouterr().err and not Path("ran").exists()


def test_an_observer_without_a_name_is_called_after_its_class(tmp_path: Path) -> None:
    (tmp_path / "gains.py").write_text(GOOD)
    assert find(str(tmp_path / "gains.py")).name == "gain"
