"""Trainings in parts, of networks with buffers and draws of their own, that are stopped, diverge, or find their files damaged."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_train import SMALL, here, refused, weights  # noqa: F401
from test_training import Line, slope_loss

from emdiff import interrupt
from emdiff.checkpoint import grouped, save_tensors
from emdiff.cli import main
from emdiff.errors import FitFailed, UsageError
from emdiff.interrupt import Stopped
from emdiff.memory import Memory, Optimiser, load_memory, save_memory
from emdiff.models import build_model
from emdiff.objectives import OneSet
from emdiff.prior import load_prior
from emdiff.training import RETREAT, train


class Rows:
    """Two-dimensional data, as losses see them."""

    def read(self, index: torch.Tensor) -> torch.Tensor:
        """x of datum i is (sin i, cos i)."""
        return torch.stack([index.float().sin(), index.float().cos()], 1)

    def batch(self, stored: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return stored


def until_done(monkeypatch: pytest.MonkeyPatch, work, every: int):
    """Call `work` again and again, stopped after every so many looks at the signals, until it ends."""
    for lives in range(1, 100):
        looks = iter(range(10**6))
        with monkeypatch.context() as patch:
            patch.setattr(interrupt, "asked", lambda calls=looks: signal.SIGTERM if next(calls) >= every else 0)
            try:
                return work(), lives
            except Stopped:
                continue
    raise AssertionError("never done")


@pytest.mark.parametrize("name", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ["mdae", "muvb"])
def test_a_stopped_second_part_goes_on_to_the_same_bits(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers of a spectral normalisation, the average, momenta and the draws of MUVB's latent variables are all in the state."""
    torch.manual_seed(0)
    net = {"kind": "mlp", "width": 6} | ({"latent": 3} if kind == "muvb" else {"blocks": 1})
    denoiser = build_model((2,), kind, net, [0.5, 0.7], None, spectral=True)
    how = {"loss": OneSet(Rows(), torch.tensor([0.5, 0.7])), "count": 50, "batch": 10, "total": 110, "optimiser": Optimiser(name, 0.01)}
    first = train(denoiser, steps=50, seed=1, **how).memory
    whole = train(denoiser, steps=60, seed=2, memory=first, **how)
    path = tmp_path / "training.safetensors"
    again, lives = until_done(monkeypatch, lambda: train(denoiser, steps=60, seed=2, memory=first, checkpoint=path, **how), 17)
    assert lives == 4 and again.steps == whole.steps == 60 and again.loss == whole.loss
    for a, b in zip(again.memory[1:4], whole.memory[1:4]):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any("_u" in key for key in whole.memory.weights)


def test_a_state_is_taken_up_only_by_its_own_part(tmp_path: Path) -> None:
    """Another optimiser, length of the whole, or place in it: begun anew, to the bits of a training that found no state."""
    how = {"count": 80, "steps": 30, "batch": 16, "seed": 3, "total": 90}
    memory = train(Line(), slope_loss, **how).memory
    base = {**how, "memory": memory, "optimiser": Optimiser(rate=0.02)}
    for change in ({"optimiser": Optimiser(rate=0.02, clip=0.5)}, {"total": 100}, {"memory": memory._replace(step=20)}):
        train(Line(), slope_loss, **base, checkpoint=tmp_path / "t.safetensors")
        alone = train(Line(), slope_loss, **(base | change))
        found = train(Line(), slope_loss, **(base | change), checkpoint=tmp_path / "t.safetensors")
        assert torch.equal(alone.denoiser.a, found.denoiser.a)


def test_a_rate_that_was_lowered_stays_so_in_the_next_part() -> None:
    """One divergence in the first part: the second begins at rate / RETREAT, as its first, warmed-up step of SGD shows."""
    broken = iter([True])

    def once(net, index, generator):
        if net.a > 0.8 and next(broken, False):
            return net.a * float("inf")
        return (net.a - 1).square()

    how = {"count": 8, "batch": 8, "total": 300}
    said: list[str] = []
    sgd = Optimiser("sgd", 0.08, momentum=0.0, anneal=False, clip=100.0)
    first = train(Line(), once, steps=200, optimiser=sgd, say=said.append, **how)
    assert first.retreats == first.memory.retreats == 1 and "0.08 -> 0.02" in said[0] and 0 < first.memory.risen < 200
    memory = first.memory._replace(weights={"a": torch.zeros(())}, slots={})
    second = train(Line(), lambda net, i, g: (net.a - 1).square(), steps=1, optimiser=sgd, memory=memory, **how)
    assert second.retreats == 1 and abs(float(second.memory.weights["a"]) - 2 * 0.08 / RETREAT) < 1e-6
    with pytest.raises(FitFailed, match="3 times"):
        train(Line(), lambda net, i, g: net.a * float("nan"), steps=5, optimiser=sgd, memory=memory._replace(retreats=3), **how)


def test_tensors_that_share_memory_or_are_strided_are_written_whole(tmp_path: Path) -> None:
    a = torch.arange(24.0).reshape(1, 2, 3, 4)
    tensors = {"a": a, "same": a, "part": a[0, 1], "strided": a.clone().to(memory_format=torch.channels_last), "none": torch.zeros(0)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"of": "it"})
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"of": "it"} and set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def test_tensors_for_a_file_are_not_copied_in_memory() -> None:
    a = torch.zeros(3)
    assert grouped(weights={"a": a})["weights:a"].data_ptr() == a.data_ptr()


def test_a_disk_that_fills_up_leaves_the_tensors_that_were_there(tmp_path: Path) -> None:
    path, (soft, hard) = tmp_path / "t.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_tensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(UsageError, match=r"t.safetensors: cannot be written \(.*large.*\); check the folder and its free space"):
            save_tensors(path, {"a": torch.ones(5000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_memory_is_read_back_or_refused(tmp_path: Path) -> None:
    path, like = tmp_path / "memory.safetensors", {"a": torch.ones(2)}
    memory = Memory(7, like, {"a": torch.zeros(2)}, {"0/exp_avg": torch.ones(2)}, 2, 5)
    save_memory(path, memory)
    found = load_memory(path, like)
    assert (found.step, found.retreats, found.risen) == (7, 2, 5) and torch.equal(found.slots["0/exp_avg"], torch.ones(2))
    for other in ({"a": torch.ones(3)}, {"b": torch.ones(2)}):
        with pytest.raises(UsageError, match="not the state of this training"):
            load_memory(path, other)
    content = path.read_bytes()
    for damaged in (content[:50], b"", content.replace(b'\\"step\\": 7', b'\\"step\\":-7'), None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(UsageError, match="memory.safetensors"):
            load_memory(path, like)


def test_a_training_stopped_within_its_rounds_ends_at_the_same_weights(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The same command, stopped at every few steps, ends with 143 each time, keeps no lock, and comes to the same prior."""
    longer = [*SMALL, "--train.steps", "80"]
    main(["train", "--data", "clean.npz", "--out", "whole", *longer])
    monkeypatch.setattr(interrupt, "EVERY", 0.0)

    def life() -> None:
        try:
            main(["train", "--data", "clean.npz", "--out", "parts", *longer])
        except SystemExit as end:
            assert end.code == 143 and not Path("parts/lock").exists()
            raise Stopped(signal.SIGTERM) from end

    _, lives = until_done(monkeypatch, life, 25)
    assert lives > 2
    a, b = weights("whole/prior.safetensors"), weights("parts/prior.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a) and not list(Path("parts").rglob("training.safetensors"))


def test_a_damaged_memory_in_a_run_is_refused(capsys) -> None:
    main(["train", "--data", "clean.npz", "--out", "t", *SMALL])
    memory = next(Path("t").rglob("memory.safetensors"))
    memory.write_bytes(memory.read_bytes()[:-4] + b"\0\1\2\3")
    assert "SHA-256" in refused(capsys, "train", "--data", "clean.npz", "--out", "t", *SMALL)


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "muvb", "net": {"kind": "mlp", "width": 9000, "latent": 90_000_000}},
        {"kind": "mem", "net": {"kind": "mlp", "width": 9999, "blocks": 10}},
        {"kind": "mdae", "net": {"kind": "mlp", "width": 8}, "levels": [1.0] * 6000},
        {"kind": "mdae", "net": {"kind": "mlp", "width": 8}, "levels": [float("nan")]},
        {"kind": "mdae", "net": [[[[[[["mlp"]]]]]]]},
        {"kind": "mlp", "width": 8, "blocks": 1, "base": 10_000},
    ],
)
def test_priors_that_declare_what_they_do_not_hold_are_refused(network, tmp_path: Path) -> None:
    """Before anything is allocated for the networks of `emdiff train` or a base."""
    path = tmp_path / "p.safetensors"
    about = {"network": network, "shape": [3], "scale": [0.0, 1.0], "tau_last": 0.1}
    save_file({"a": torch.zeros(1)}, path, {"emdiff": json.dumps(about)})
    with pytest.raises(UsageError, match="not a prior"):
        load_prior(path)


def test_data_by_name_without_torchvision_say_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "emdiff[datasets]" in refused(capsys, "train", "--data", "mnist", "--root", ".", "--out", "t")
