r"""Series, images of odd sizes, volumes, channels, and any unit: networks of the right dimension, and fits from end to end."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import normal, uniform
from torch import Tensor

from emdiff import plan
from emdiff.cli import main
from emdiff.mdae import MDAE
from emdiff.nn import UNet, fold, unfold
from emdiff.prior import build_network, choose_network

SHAPES = {(1, 65): 1, (3, 70): 1, (9, 11): 2, (2, 9, 8): 2, (1, 9, 8, 10): 3, (2, 8, 9, 8): 3}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def network(shape: tuple[int, ...], **options) -> MDAE:
    """A small U-Net of the right dimension with random weights."""
    net = UNet(shape, widths=(4, 6), patch=2, embed=4, dims=SHAPES[shape], **options).double()
    for i, p in enumerate(net.parameters()):
        p.data = normal(*p.shape, seed=i) / math.sqrt(max(p[0].numel(), 1))
    return MDAE(net)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 3, 8, 4), (2, 3, 4, 8, 6)], ids=str)
def test_unfold_is_the_inverse_of_fold_and_blocks_stay_together(shape: tuple[int, ...]) -> None:
    h = normal(*shape)
    folded = fold(h, 2)
    assert torch.equal(unfold(folded, 2), h) and folded.shape[2:] == tuple(n // 2 for n in shape[2:])
    corner = h[(0, 0, *[slice(0, 2)] * (len(shape) - 2))].flatten()
    assert torch.equal(folded[(0, slice(0, 2 ** (len(shape) - 2)), *[0] * (len(shape) - 2))], corner)


@shapes
def test_blocks_are_modulated_by_the_mean_of_a_map_s_features(shape: tuple[int, ...]) -> None:
    """A network that does not see the map itself cannot tell it from the same levels in other places, but from a map of another mean."""
    net, z = network(shape).backbone, normal(2, *shape)
    c = 3 * uniform(2, *([1] * (len(shape) - SHAPES[shape])), *shape[-SHAPES[shape] :])
    torch.testing.assert_close(net(z, c.flip(-1)), net(z, c))
    assert (net(z, 2 * c) - net(z, c)).abs().max() > 1e-3
    assert (network(shape, maps=True).backbone(z, c.flip(-1)) - network(shape, maps=True).backbone(z, c)).abs().max() > 1e-3


@shapes
@pytest.mark.parametrize("maps", [False, True])
def test_gains_are_those_of_an_entry_s_own_level(shape: tuple[int, ...], maps: bool) -> None:
    """With a head of biases alone, F = f + g z has a closed form: f and g are affine in the features of the entry's own level."""
    net = network(shape, maps=maps, gain=True).backbone
    weights = torch.tensor([[0.3, -0.5, 2.0], [-1.1, 0.7, -0.2]], dtype=torch.float64)[:, : 1 + 2 * maps]
    net.head.weight.data.zero_()
    net.head.bias.data = weights.reshape(2, -1, 1).expand(-1, -1, len(net.head.bias) // weights.numel()).flatten().clone()
    z, space = normal(3, *shape), shape[-SHAPES[shape] :]
    c = 3 * uniform(3, *([1] * (len(shape) - len(space))), *(space if maps else [1] * len(space)))
    levels = torch.stack([torch.ones_like(c), (1 - torch.exp(-2 * c)).sqrt(), c / 3])
    f, g = torch.einsum("jk,k...->j...", weights, levels[: 1 + 2 * maps])
    torch.testing.assert_close(net(z, c), f + g * z)


@shapes
@pytest.mark.parametrize("maps", [False, True])
def test_each_datum_is_treated_alone_and_levels_may_be_maps(shape: tuple[int, ...], maps: bool) -> None:
    net = network(shape, maps=maps)
    y, sigma = normal(3, 1, *shape), 0.3 + uniform(3, 1, *shape)
    whole = net.xhat(y, sigma)
    assert whole.shape == (3, *shape)
    torch.testing.assert_close(net.xhat(y[1:2], sigma[1:2]), whole[1:2])
    level = torch.full((1,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(net.xhat(y, level), net.xhat(y, level.reshape(1, 1, *[1] * len(shape)).expand(3, 1, *shape)))
    assert (net.xhat(y, level) - whole).abs().max() > 1e-3, "levels matter"


@shapes
def test_every_entry_reaches_its_neighbours_along_every_axis_of_space(shape: tuple[int, ...]) -> None:
    net, dims = network(shape), SHAPES[shape]
    y = normal(1, 1, *shape).requires_grad_(True)
    middle = (0, *[n // 2 for n in shape])
    (gradient,) = torch.autograd.grad(net.xhat(y, torch.ones(1, dtype=torch.float64))[middle], y)
    for axis in range(len(shape) - dims, len(shape)):
        for step in (-1, 1):
            at = [0, *middle]
            at[axis + 2] += step
            assert gradient[tuple(at)] != 0


def test_a_series_of_one_row_is_seen_as_an_image_of_one_row_would_be() -> None:
    """A 1-D convolution is the middle row of a 2-D one on an image of height 1, padded with zeros."""
    line, plane = UNet((1, 16), (4, 6), 1, dims=1).double(), UNet((1, 1, 16), (4, 6), 1).double()
    weights = {key: normal(*value.shape, seed=i) / 3 for i, (key, value) in enumerate(line.state_dict().items())}
    line.load_state_dict(weights)
    wide = {}
    for key, value in plane.state_dict().items():
        w = weights[key]
        wide[key] = torch.zeros_like(value)
        if value.ndim == 1:
            wide[key] = w
        else:
            wide[key][:, :, value.shape[2] // 2] = w
    plane.load_state_dict(wide)
    z, c = normal(2, 1, 16), torch.ones(2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(line(z, c), plane(z[:, None], c[:, None])[:, 0])


@pytest.mark.parametrize("shape, kind, dims", [
    ((17, 23), "unet", 2), ((3, 17, 23), "unet", 2), ((1, 16, 16, 16), "unet", 3), ((1, 512), "unet", 1), ((4, 100), "unet", 1),
    ((5,), "mlp", None), ((100,), "mlp", None), ((2, 3), "mlp", None), ((2, 4, 4, 4), "mlp", None), ((30, 16, 16), "mlp", None),
])  # fmt: skip
def test_the_network_fits_the_data(shape: tuple[int, ...], kind: str, dims: int | None) -> None:
    chosen = choose_network(shape)
    assert chosen["kind"] == kind and (dims is None or chosen.get("dims", 2) == dims)
    assert build_network(shape, **chosen).xhat(torch.zeros(2, 1, *shape), torch.ones(1)).shape == (2, *shape)


def test_a_u_net_of_the_wrong_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a U-Net of 3 dimensions takes data with 3 or 4 axes, not \(5, 5\)"):
        UNet((5, 5), dims=3)


def smooth(count: int, shape: tuple[int, ...]) -> Tensor:
    """Random data that vary slowly along each axis."""
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    for axis in range(1, x.ndim):
        if x.shape[axis] > 4:
            x = (x + x.roll(1, axis) + x.roll(-1, axis)) / 3**0.5
    return x


@pytest.mark.parametrize("shape, unit, offset", [
    ((17, 23), 1e-9, -2e-9), ((1, 16, 16, 16), 1.0, 0.0), ((1, 512), 1e6, 5e6), ((3, 10, 9), torch.tensor([1e-3, 1.0, 50.0]).reshape(3, 1, 1), 7.0),
], ids=str)  # fmt: skip
def test_fits_of_every_shape_and_unit_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape, unit, offset) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "Plan", functools.partial(plan.Plan, prior_samples=8))
    x = (smooth(48, shape) * unit + offset).float()
    std = 0.5 * float(x.std()) if isinstance(unit, float) else 0.5e-3
    obs = x + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    np.savez("obs.npz", obs=obs.numpy(), observer="identity", noise_std=std, x=x.numpy())
    small = ["--train.steps", "30", "--train.start-steps", "30", "--train.batch", "16", "--walk.levels", "4", "--wandb", "off", "--device", "cpu"]
    main(["fit", "--observations", "obs.npz", "--iters", "2", "--out", "run", *small])
    row = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert 0.3 < row["chi2"] < 5 and row["error"] < 2 * float(x.var()) and row["restarted"] == 0, "30 steps learn little, in the right unit"
    samples = np.load("run/round_002/samples.npy")
    assert samples.shape == x.shape and np.isfinite(samples).all()
    for c in range(shape[0] if len(shape) == 3 and shape[0] == 3 else 1):
        part = (slice(None), c) if len(shape) == 3 and shape[0] == 3 else slice(None)
        assert 0.2 < samples[part].std() / float(x[part].std()) < 1.5 and abs(samples[part].mean() - float(x[part].mean())) < float(x[part].std())
