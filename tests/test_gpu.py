r"""What only a GPU can show: it computes what the CPU computes, graphs replay what they captured, solves never wait for the host.

Run there by `pytest -m gpu`; elsewhere each of these skips.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emdiff import ahead, interrupt
from emdiff.cli import main
from emdiff.compiled import compiled
from emdiff.data import Observations
from emdiff.datasets import Dataset
from emdiff.em import Draws, Walk, e_step
from emdiff.files import sha256
from emdiff.guidance import PosteriorDenoiser
from emdiff.learner import Learner, Step
from emdiff.mdae import MDAE
from emdiff.near import near, near_data
from emdiff.nn import UNet
from emdiff.objectives import OneSet
from emdiff.pairs import PairLoss
from emdiff.precision import set_precision
from emdiff.prior import build_network, load_prior
from emdiff.rows import Rows
from emdiff.scale import Scale
from emdiff.train import Standardised
from emdiff.training import Trained, train
from observers import Blur, Identity, Mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: torch sees none")]

CUDA = torch.device("cuda")
QUIET = ["--wandb", "off", "--device", "cuda"]
SHORT = ["--train.steps", "30", "--train.start_steps", "60", "--train.batch", "64", "--walk.levels", "6", *QUIET]


def generator(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels whose sums have one order, where there are such: two trainings on the same batches then differ by nothing, or by a fault."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def images(count: int = 300) -> Tensor:
    """Smooth 8 x 8 images of variance 1."""
    x = torch.nn.functional.avg_pool2d(torch.randn(count, 1, 12, 12, generator=generator(1)), 5, stride=1)[:, 0]
    return x / x.std()


def network(maps: bool = False) -> MDAE:
    torch.manual_seed(0)
    return MDAE(UNet((8, 8), widths=(16, 32), patch=1, maps=maps, gain=True), spread=0.5)


def observed(kind: str, x: Tensor) -> Observations:
    seen = torch.rand(x.shape, generator=generator(2)) < 0.5
    kernel = torch.ones(1, 3, 3) / 9
    made = {
        "noise": lambda: Identity((8, 8), torch.tensor(0.7)),
        "mask": lambda: Mask((8, 8), torch.tensor(0.3), seen),
        "blur": lambda: Blur((8, 8), torch.tensor(0.2), kernel),
    }[kind]()
    return Observations(made.simulate(x, generator(4)), made)


def trained(monkeypatch: pytest.MonkeyPatch, graphs: bool, maps: bool = False, steps: int = 40) -> MDAE:
    if not graphs:
        monkeypatch.setattr("emdiff.learner.replayed", lambda denoiser: denoiser)
    x = images()
    levels = torch.where(torch.rand(x.shape, generator=generator(2)) < 0.5, 0.3, math.inf) if maps else None
    loss = PairLoss(Draws(x.to(CUDA), x.to(CUDA), 0.0), 0.1, None if levels is None else levels.to(CUDA))
    return train(network(maps), loss, len(x), steps, 64, 3e-3, device="cuda").denoiser


@pytest.mark.parametrize("maps", [False, True])
def test_training_by_graphs_is_training(monkeypatch: pytest.MonkeyPatch, maps: bool) -> None:
    """The same draws and the same kernels: weights after 40 steps agree as far as sums in another order let them."""
    lines: list[str] = []
    monkeypatch.setattr("emdiff.graphs.replayed.__defaults__", (lines.append,))
    fast = trained(monkeypatch, True, maps)
    plain = trained(monkeypatch, False, maps)
    assert not lines
    for a, b in zip(fast.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_the_papers_network_trains_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multidenoising autoencoder on a U2-Net, its measurements as channels: captured, and trained as without graphs."""
    lines: list[str] = []
    monkeypatch.setattr("emdiff.graphs.replayed.__defaults__", (lines.append,))
    x, sigma = images().to(CUDA), torch.full((4,), 2.0)
    loss = OneSet(Standardised(Dataset("images", len(x), (8, 8), x.cpu().numpy().__getitem__, ""), Scale(0.0, 1.0), device="cuda"), sigma)

    def after(steps: int) -> Trained:
        torch.manual_seed(0)
        net = {"kind": "u2net", "width": 0.125}
        made = build_network((8, 8), kind="mdae", net=net, levels=sigma.tolist(), metaencoder=None, spectral=False)
        return train(set_precision(made, "cuda"), loss, len(x), steps, 64, 3e-3, device="cuda")

    fast = after(100)
    monkeypatch.setattr("emdiff.learner.replayed", lambda denoiser: denoiser)
    plain = after(100)
    assert not lines and fast.denoiser.bf16
    assert fast.loss == pytest.approx(plain.loss, rel=0.05) and fast.loss < 0.5 * after(1).loss


def test_graphs_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured network is what training runs, at the batch that it was captured for."""
    seen, plain = [], Learner.training_step

    def step(self: Learner, given: Step, at: int) -> Tensor:
        loss = plain(self, given, at)
        seen.append(self.runner[0].backbone.fast is not None)
        return loss

    monkeypatch.setattr(Learner, "training_step", step)
    trained(monkeypatch, True, steps=3)
    assert seen == [True] * 3


@pytest.mark.parametrize("kind, guidance", [("noise", "fused"), ("mask", "fused"), ("blur", "cg"), ("blur", "gmres")])
def test_the_posterior_is_that_of_the_cpu(kind: str, guidance: str) -> None:
    """Moments of samples by a walk on either device, under one network in float32; draws differ, so to their scatter."""
    x = images(2000)
    data = observed(kind, x)
    loss = PairLoss(Draws(x, x, 0.0), 0.1, level_map(data) if kind == "mask" else None)
    denoiser = train(network(kind == "mask"), loss, len(x), 150, 64, 3e-3, device="cuda").denoiser.cpu()
    walk = Walk(guidance, math.inf if guidance == "fused" else 20.0, levels=12, batch=1000)
    chains = torch.zeros_like(x)
    here = e_step(denoiser, data, chains, walk, generator(5)).x
    there = e_step(denoiser.to(CUDA), data, chains, walk, generator(5, CUDA)).x
    assert there.device.type == "cpu"
    for figure in (lambda s: (s - x).square().mean(), lambda s: s.std(), lambda s: (s - x).mean(0).abs().max()):
        torch.testing.assert_close(figure(there), figure(here), rtol=0.03, atol=0.06)


def level_map(data: Observations) -> Tensor:
    return data.observer.as_measurement(data.obs)[1]


def test_a_solve_never_waits_for_the_host() -> None:
    """CUDA's own check of synchronising calls, over a guided step and all its products."""
    x = images(64)
    data = observed("blur", x).to(CUDA)
    denoiser = network().to(CUDA).eval().requires_grad_(False)
    posterior = PosteriorDenoiser(denoiser, data.observer, data.obs, "cg", 3, coarse=1.0)
    y, sigma = x.to(CUDA)[:, None], torch.tensor([0.5])
    posterior.xhat(y, sigma.to(CUDA))  # libraries are loaded here
    level = sigma.to(CUDA)
    torch.cuda.synchronize()
    posterior.coarse = math.inf
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = posterior.xhat(y, level)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(found.isfinite().all())


def test_compiled_walks_are_walks() -> None:
    """`--compile` replays a compiled network: the same estimates, up to rounding."""
    lines: list[str] = []
    denoiser = set_precision(network(), "cuda").to(CUDA).eval().requires_grad_(False)
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    fast = compiled(denoiser, "cuda", lines.append)
    y, level = images(96).to(CUDA)[:, None], torch.tensor([0.7], device=CUDA)
    with torch.no_grad():
        for rows in (96, 96, 40):
            torch.testing.assert_close(fast.xhat(y[:rows], level), denoiser.xhat(y[:rows], level), rtol=0.03, atol=0.03)
    assert not lines and fast.backbone.fast is not None


def test_near_is_what_was_far() -> None:
    x = torch.randn(5000, 3, 4, generator=generator())
    far = Rows((5000, 3, 4), x.__getitem__)
    assert near(far, CUDA).device.type == "cuda" and torch.equal(near(far, CUDA).cpu(), x)
    there = x.to(CUDA)
    assert near(there, CUDA) is there
    data = observed("mask", images())
    moved = near_data(data, CUDA)
    assert moved.obs.device.type == "cuda" and torch.equal(moved.rows(slice(3, 7)).obs.cpu(), data.obs[3:7])
    assert torch.equal(moved.observer.mask.cpu(), data.observer.mask)


def test_what_has_no_room_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emdiff.near.SHARE", 0.0)
    x, data = torch.randn(50, 3), observed("noise", images())
    assert near(x, CUDA) is x and near_data(data, CUDA) is data


def test_rows_read_ahead_come_by_pinned_memory_behind_the_work_in_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what has no room every batch but the first is pinned by a thread, and copying it makes no call that would wait for the GPU."""
    x = torch.arange(60.0).reshape(20, 3)
    pinned, plain = [], ahead.moved

    def moved(batch: Tensor, device: torch.device) -> Tensor:
        pinned.append(batch.is_pinned())
        torch.cuda.set_sync_debug_mode("error" if pinned[-1] else "default")
        try:
            return plain(batch, device)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ahead, "moved", moved)
    found = list(ahead.ahead(lambda i: x[i], torch.arange(20).split(4), CUDA))
    assert pinned == [False] + [True] * 4 and torch.equal(torch.cat(found).cpu(), x) and found[0].device.type == "cuda"
    pinned.clear()
    list(ahead.ahead(lambda i: x.to(CUDA)[i.to(CUDA)], torch.arange(20).split(4), CUDA))
    assert pinned == [False] * 5


def test_graphs_are_captured_while_a_thread_reads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It pins memory every few milliseconds, for a second, which CUDA refuses during a capture."""
    monkeypatch.setattr(ahead, "DEPTH", 200)
    x = images(400)
    slow = Rows(tuple(x.shape), lambda index: (time.sleep(0.005), x[index])[1])
    assert math.isfinite(train(network(), PairLoss(Draws(slow, slow, 0.0), 0.1), len(x), 40, 64, device="cuda").loss)
    assert "without CUDA graphs" not in capsys.readouterr().err


def test_rows_that_lie_near_are_picked_without_a_wait() -> None:
    x, index = images().to(CUDA), torch.arange(50)
    loss = PairLoss(Draws(x, x, 0.0), 0.1)
    loss.read(index)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = loss.read(index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.x, x[:50])


@pytest.mark.parametrize("maps", [False, True])
def test_training_on_rows_of_a_file_is_training_on_rows_that_lie_near(maps: bool) -> None:
    """Without maps, whose draws differ, to the sums' order; with them to what they teach."""
    x = images(400)
    levels = torch.where(torch.rand(x.shape, generator=generator(2)) < 0.5, 0.3, math.inf) if maps else None
    far = lambda a: Rows(tuple(a.shape), a.__getitem__)  # noqa: E731
    losses = (
        PairLoss(Draws(x.to(CUDA), x.to(CUDA), 0.0), 0.1, levels.to(CUDA) if maps else None),
        PairLoss(Draws(far(x), far(x), 0.0), 0.1, far(levels) if maps else None, carried=maps),
    )
    one, other = (train(network(maps), loss, len(x), 60, 64, 3e-3, device="cuda") for loss in losses)
    assert other.loss == pytest.approx(one.loss, rel=0.3 if maps else 0.02)
    if not maps:
        for a, b in zip(one.denoiser.parameters(), other.denoiser.parameters()):
            torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_training_on_clean_data_near_and_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_order: None) -> None:
    """`emdiff train` keeps bytes on the GPU, or reads them by row: the same denoiser. Its estimates are compared, not its weights, of which a few end
    elsewhere when gradients differ by what bfloat16 rounds: on a CPU estimates then differ by 2e-5 of their variance, after one wrong batch by
    1.2e-4."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", (40 * images() + 128).clamp(0, 255).byte().numpy())
    y, estimates = torch.randn(64, 1, 8, 8, generator=generator()), []
    for out, share in (("near", 0.25), ("far", 0.0)):
        monkeypatch.setattr("emdiff.near.SHARE", share)
        main(["train", "--data", "x.npy", "--out", out, "--train.steps", "40", "--train.batch", "32", "--train.rounds", "2", *QUIET])
        with torch.no_grad():
            estimates.append(load_prior(Path(out) / "prior.safetensors", "cpu").denoiser.xhat(y, torch.ones(1)))
    near_data, far_data = estimates
    assert (near_data - far_data).square().mean() < 6e-5 * near_data.var()


@pytest.mark.parametrize("kind", ["noise", "mask", "blur", "turns", "unknown"])
def test_fit_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The command from end to end; what it leaves is read on a CPU."""
    monkeypatch.chdir(tmp_path)
    x = images(400)
    data = observed({"turns": "noise", "unknown": "noise"}.get(kind, kind), x)
    more = {"turns": ["--train.refresh", "150"], "unknown": ["--noise-std", "auto"]}.get(kind, [])
    arrays = {name: value.numpy() for name, value in data.observer.arrays().items()}
    observer, noise = {"mask": ("mask", 0.3), "blur": ("blur", 0.2)}.get(kind, ("identity", 0.7))
    np.savez("obs.npz", obs=data.obs.numpy(), observer=observer, noise_std=np.float32(noise), shape=[8, 8], x=x.numpy(), **arrays)
    for iters in ("1", "2"):
        main(["fit", "--observations", "obs.npz", "--iters", iters, "--out", "run", *SHORT, *more])
    folder = Path("run/round_002")
    for line in (folder / "sha256.txt").read_text().splitlines():  # what was written, and summed, behind the training
        digest, _, name = line.partition("  ")
        assert sha256(folder / name) == digest and (name != "samples.npy" or np.load(folder / name).shape == (400, 8, 8))
    assert (folder / "chains.npy").is_file() and (folder / "samples.npy").is_file()
    main(["evaluate", "--run", "run", "--observations", "obs.npz", "--samples", "4", "--count", "50", "--device", "cuda"])
    main(["sample", "--run", "run", "--count", "8", "--out", "s.npz", "--device", "cpu"])
    prior = load_prior(Path("run/round_002/prior.safetensors"), "cpu")
    assert all(bool(p.isfinite().all()) for p in prior.denoiser.parameters())
    assert np.load("s.npz")["x"].shape == (8, 8, 8)


def test_an_interrupted_training_goes_on_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of weights, moments, draws and average on a GPU: stopped after 20 of 40 steps and taken up, the weights are those of 40 in one go."""
    x, signals = images(), list[int]()
    loss = PairLoss(Draws(x.to(CUDA), x.to(CUDA), 0.0), 0.1)
    monkeypatch.setattr(interrupt, "_signals", signals)
    how = {"count": len(x), "steps": 40, "batch": 64, "rate": 3e-3, "device": "cuda"}

    def stop(step: int, value: float) -> None:
        signals[:] = [signal.SIGTERM] if step == 20 else []

    whole = train(network(), loss, **how)
    with pytest.raises(interrupt.Stopped):
        train(network(), loss, **how, progress=stop, checkpoint=tmp_path / "state.safetensors")
    signals.clear()
    again = train(network(), loss, **how, checkpoint=tmp_path / "state.safetensors")
    for a, b in zip(again.denoiser.parameters(), whole.denoiser.parameters()):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)
