r"""Which batches a captured network runs, and what happens where it cannot be captured; that a GPU computes the same is in test_gpu."""

from __future__ import annotations

import pytest
import torch
from exact import C, Z, unet
from torch import Tensor

from emdiff import ahead
from emdiff.graphs import Replayed, replayed
from emdiff.mdae import MDAE


def captured(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Stand in for CUDA: the module with a `forward` that says what it was given."""
    seen: list[torch.Size] = []

    def capture(module, example):
        plain = module.forward

        def forward(z: Tensor, c: Tensor) -> Tensor:
            seen.append(z.shape)
            return plain(z, c)

        module.forward = forward
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    return seen


def test_the_graph_runs_training_batches_of_its_shape_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, net = captured(monkeypatch), unet()
    fast = Replayed(net, pytest.fail)
    with torch.no_grad():
        torch.testing.assert_close(fast(Z, C), net(Z, C))
    for rows, levels in ((4, 4), (4, 4), (3, 3), (4, 1)):
        torch.testing.assert_close(fast(Z[:rows], C[:levels]), net(Z[:rows], C[:levels]))
    leaf = Z[:4].clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(fast(leaf, C[:4]).sum(), leaf)
    assert seen == [(4, 8, 8)] * 2 and bool(slope.isfinite().all())


def test_gradients_reach_the_weights_that_the_optimiser_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, net = captured(monkeypatch), unet()
    Replayed(net, pytest.fail)(Z, C).square().sum().backward()
    got = [weight.grad.clone() for weight in net.parameters()]
    net.zero_grad()
    net(Z, C).square().sum().backward()
    assert len(seen) == 1, "the network's own forward is not replaced"
    for mine, weight in zip(got, net.parameters()):
        torch.testing.assert_close(mine, weight.grad)


def test_nothing_is_pinned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses to pin memory meanwhile, to every thread."""
    held: list[bool] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda module, example: (held.append(ahead.PINNING.locked()), module)[1])
    Replayed(unet(), pytest.fail)(Z, C)
    assert held == [True] and not ahead.PINNING.locked()
    monkeypatch.setattr(ahead, "goes_on", lambda device: True)
    monkeypatch.setattr(ahead, "moved", lambda batch, device: batch)
    monkeypatch.setattr(ahead, "pin", lambda tensor: (held.append(ahead.PINNING.locked()), tensor)[1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert len(list(ahead.ahead(lambda i: Z[i], range(3), torch.device("cuda")))) == 3
    assert held == [True] * 3 and not ahead.PINNING.locked()


def test_a_capture_that_fails_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module, example):
        raise RuntimeError("no such stream\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    net, lines = unet(), []
    fast = Replayed(net, lines.append)
    for _ in range(2):
        torch.testing.assert_close(fast(Z, C), net(Z, C))
    assert lines == ["training without CUDA graphs (RuntimeError: no such stream)"]


def test_on_a_cpu_training_is_as_it_was() -> None:
    denoiser = MDAE(unet())
    assert replayed(denoiser) is denoiser
