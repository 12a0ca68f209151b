r"""A compiled network gives what the plain one gives, and a compiler that fails costs one line."""

from __future__ import annotations

import functools

import pytest
import torch
from exact import C, Z, unet
from torch import Tensor

from emdiff.compiled import Compiled, compiled
from emdiff.mdae import MDAE
from emdiff.nn import UNet


def frozen() -> UNet:
    return unet().eval().requires_grad_(False)


def test_the_compiled_network_is_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for real, by dynamo; run by its eager backend, which needs no C++ compiler and no time."""
    monkeypatch.setattr(torch, "compile", functools.partial(_traced, compile=torch.compile))
    net, lines = frozen(), []
    denoiser = MDAE(net)
    fast = compiled(denoiser, "cpu", lines.append)
    with torch.no_grad():
        for rows in (6, 4):
            y, sigma = Z[:rows, None], torch.tensor([0.7])
            torch.testing.assert_close(fast.xhat(y, sigma), denoiser.xhat(y, sigma))
    assert not lines and fast.backbone.fast is not None and denoiser.backbone is net


def _traced(backbone, dynamic, mode, compile):
    return compile(backbone, dynamic=dynamic, backend="eager")


def test_smaller_batches_are_padded_and_larger_ones_and_gradients_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen = frozen(), []

    def record(z: Tensor, c: Tensor) -> Tensor:
        seen.append((len(z), len(c)))
        return net(z, c)

    monkeypatch.setattr(torch, "compile", lambda backbone, **options: record)
    fast = Compiled(net, "cpu", pytest.fail)
    for rows in (4, 2, 1, 6):
        torch.testing.assert_close(fast(Z[:rows], C[:rows]), net(Z[:rows], C[:rows]))
    torch.testing.assert_close(fast(Z[:3], C[:1]), net(Z[:3], C[:1]))
    assert seen == [(4, 4), (4, 4), (4, 1), (4, 1)]
    leaf = Z[:4].clone().requires_grad_(True)
    (got,) = torch.autograd.grad(fast(leaf, C[:4]).square().sum(), leaf)
    (expected,) = torch.autograd.grad(net(leaf, C[:4]).square().sum(), leaf)
    torch.testing.assert_close(got, expected)
    assert len(seen) == 4


@pytest.mark.parametrize("at", ["compilation", "the first call"])
def test_a_failing_compiler_costs_one_line_that_names_the_reason(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", fail if at == "compilation" else lambda backbone, **options: fail)
    net, lines = frozen(), []
    fast = Compiled(net, "cpu", lines.append)
    for _ in range(2):
        torch.testing.assert_close(fast(Z, C), net(Z, C))
    assert lines == ["--compile: torch.compile failed, going on without (RuntimeError: no C++ compiler)"]
