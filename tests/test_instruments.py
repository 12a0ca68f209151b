r"""Each operator is what it claims to be: against SciPy and NumPy, or in closed form; the contract itself is in test_observers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from exact import normal, uniform
from scipy import ndimage
from torch import Tensor

from emdiff import commands_observe
from emdiff.observations import read_observations
from observers import build
from observers.compressed import hadamard
from observers.instruments import blur, compose, compressed, downsample, fourier, mixed, multicoil, radon
from observers.noise_recipes import level
from observers.recipes import Recipe, mask, projection

ONE = torch.tensor(0.7, dtype=torch.float64)
SCIPY = {"circular": "wrap", "zero": "constant", "reflect": "mirror", "replicate": "nearest"}


@pytest.mark.parametrize("boundary", SCIPY)
@pytest.mark.parametrize("size", [(3, 3), (1, 5), (4, 2)])
def test_blur_is_the_convolution_of_scipy(boundary: str, size: tuple[int, int]) -> None:
    x, psf = normal(3, 6, 5), normal(3, *size, seed=1)
    got = build("blur", (6, 5), {"psf": psf, "boundary": boundary}, ONE).forward(x)
    for i in range(3):
        expected = ndimage.convolve(x[i].numpy(), psf[i].numpy(), mode=SCIPY[boundary])
        np.testing.assert_allclose(got[i].numpy(), expected, atol=1e-12)


def test_a_psf_of_sum_one_keeps_the_flux_and_a_point_becomes_the_psf() -> None:
    observer = blur(sigma=1.2, vary=0.3).draw((11, 11), 4, 0.1, torch.Generator().manual_seed(0)).to("cpu", torch.float64)
    x = torch.zeros(4, 11, 11, dtype=torch.float64)
    x[:, 5, 5] = 1
    seen = observer.forward(x)
    torch.testing.assert_close(seen.flatten(1).sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    k = observer.psf.shape[1] // 2
    torch.testing.assert_close(seen[:, 5 - k : 6 + k, 5 - k : 6 + k], observer.psf, rtol=0, atol=1e-12)
    spread = (seen.sum(1) * (torch.arange(11) - 5.0) ** 2).sum(1)
    assert spread.unique().numel() == 4 and (spread < 1.2**2 * 1.3**2).all()


def test_downsampling_averages_blocks_and_what_is_left_of_an_axis() -> None:
    x = normal(2, 3, 7, 4)
    got = build("downsample", (3, 7, 4), {"factor": 3}, ONE).forward(x)
    assert got.shape == (2, 3, 3, 2)
    torch.testing.assert_close(got[:, :, 1, 0], x[:, :, 3:6, 0:3].mean((2, 3)))
    torch.testing.assert_close(got[:, :, 2, 1], x[:, :, 6, 3])
    assert torch.equal(build("downsample", (7,), {"factor": 3, "way": "sample"}, ONE).forward(x[:, 0, :, 0]), x[:, 0, ::3, 0])
    drawn = downsample(factor=2, sigma=1.0).draw((8, 8), 3, 0.1, torch.Generator().manual_seed(0))
    assert drawn.name == "compose" and drawn.obs_shape == (4, 4)


def test_fourier_is_the_unitary_transform_of_numpy_centred_or_not() -> None:
    z = normal(2, 5, 4) + 1j * normal(2, 5, 4, seed=1)
    x, mask = torch.view_as_real(z).movedim(-1, 1), uniform(2, 5, 4) < 0.6
    plain = build("fourier", (2, 5, 4), {"mask": mask}, ONE).forward(x)
    expected = np.fft.fft2(z.numpy(), norm="ortho") * mask.numpy()
    np.testing.assert_allclose(plain.numpy(), np.stack([expected.real, expected.imag], 1), atol=1e-12)
    centred = build("fourier", (2, 5, 4), {"mask": mask, "centred": 1}, ONE).forward(x)
    axes = (-2, -1)
    expected = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(z.numpy(), axes=axes), norm="ortho"), axes=axes) * mask.numpy()
    np.testing.assert_allclose(centred.numpy(), np.stack([expected.real, expected.imag], 1), atol=1e-12)
    real = build("fourier", (5, 4), {"mask": mask}, ONE).forward(z.real)
    with_phase = build("fourier", (2, 5, 4), {"mask": mask}, ONE).forward(torch.stack([z.real, torch.zeros_like(z.real)], 1))
    torch.testing.assert_close(real, with_phase)


def test_multicoil_is_fourier_of_each_coils_image() -> None:
    z, s = normal(2, 4, 4) + 1j * normal(2, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2) + 1j * normal(2, 3, 4, 4, seed=3)
    pairs = lambda a, axis: torch.view_as_real(a).movedim(-1, axis)  # noqa: E731
    mask = uniform(2, 4, 4) < 0.6
    got = build("multicoil", (2, 4, 4), {"mask": mask, "sensitivities": pairs(s, 2)}, ONE).forward(pairs(z, 1))
    for c in range(3):
        coil = build("fourier", (2, 4, 4), {"mask": mask}, ONE).forward(pairs(s[:, c] * z, 1))
        torch.testing.assert_close(got[:, c], coil)
    drawn = multicoil(coils=5).draw((8, 8), 2, 0.1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.sensitivities.square().sum((1, 2)), torch.ones(1, 8, 8))


def test_projections_sum_to_the_image_and_are_those_of_a_gaussian() -> None:
    """A Gaussian of width w at (a, b) projects to a Gaussian of width w at a cos theta + b sin theta."""
    L, w, a, b = 33, 3.0, 4.0, -3.0
    i = torch.arange(L, dtype=torch.float64) - (L - 1) / 2
    image = torch.exp(-((i[None] - a) ** 2 + (-i[:, None] - b) ** 2) / (2 * w**2))[None]
    theta = torch.tensor([[0.0, 0.4, math.pi / 4, math.pi / 2, 2.0]], dtype=torch.float64)
    observer = build("radon", (L, L), {"angles": theta}, ONE)
    seen = observer.forward(image)
    torch.testing.assert_close(seen.sum(2), image.sum((1, 2))[:, None].expand(1, 5))
    s = torch.arange(observer.detectors, dtype=torch.float64) - (observer.detectors - 1) / 2
    centre = a * theta.cos() + b * theta.sin()
    exact = math.sqrt(2 * math.pi) * w * torch.exp(-((s - centre[..., None]) ** 2) / (2 * w**2))
    assert (seen - exact).abs().max() < 0.015 * exact.max(), "pixels and bins have a width"


def test_a_projection_at_angle_zero_sums_columns_and_at_a_right_angle_rows_from_the_bottom() -> None:
    x = normal(1, 4, 4)
    seen = build("radon", (4, 4), {"angles": torch.tensor([[0.0, math.pi / 2]], dtype=torch.float64), "detectors": 4}, ONE).forward(x)
    torch.testing.assert_close(seen[0, 0], x[0].sum(0))
    torch.testing.assert_close(seen[0, 1], x[0].sum(1).flip(0))


def test_the_hadamard_transform_is_orthonormal_and_the_sensing_matrix_has_orthogonal_rows() -> None:
    H = hadamard(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(H @ H.T, torch.eye(8, dtype=torch.float64))
    assert torch.equal(H, H.T) and (H.abs() - 8**-0.5).abs().max() < 1e-12
    P = matrices("hadamard", 8, 3, 5)
    torch.testing.assert_close(P @ P.mT, (8 / 3) * torch.eye(3, dtype=torch.float64).expand(5, 3, 3))


def matrices(kind: str, d: int, rows: int, count: int, first: int = 0) -> Tensor:
    observer = build("compressed", (d,), {"seeds": torch.arange(first, first + count), "rows": rows, "kind": kind}, ONE)
    return torch.stack([observer.forward(e.expand(count, d)) for e in torch.eye(d, dtype=torch.float64)], -1)


@pytest.mark.parametrize("kind", ["gaussian", "signs", "hadamard"])
def test_sensing_matrices_are_random_with_variance_one_over_m_and_the_same_from_their_seeds(kind: str) -> None:
    P = matrices(kind, 8, 4, 3000)
    assert torch.equal(P[10:20], matrices(kind, 8, 4, 10, first=10)), "a seed's matrix is the same in every batch"
    entries = P.flatten(1)
    assert entries.mean(0).abs().max() < 5 / math.sqrt(4 * 3000)
    assert (entries.square().mean(0) * 4 - 1).abs().max() < 5 * math.sqrt(2 / 3000)
    if kind != "hadamard":
        assert (torch.corrcoef(entries.T) - torch.eye(32, dtype=torch.float64)).abs().max() < 6 / math.sqrt(3000)
    if kind == "gaussian":
        assert (4 * entries.square()).square().mean() == pytest.approx(3, abs=0.1)


SPECIAL: list[Recipe] = [
    blur(),
    blur(vary=0.5),
    downsample(),
    fourier(),
    fourier(shared=True),
    multicoil(),
    radon(),
    radon(shared=True),
    compressed(),
]


@pytest.mark.parametrize("recipe", SPECIAL, ids=str)
def test_recipes_draw_the_same_again_from_the_same_seed(recipe: Recipe) -> None:
    first, again = (recipe.draw((16, 16), 6, 0.7, torch.Generator().manual_seed(3)) for _ in range(2))
    x = torch.randn(6, 16, 16, generator=torch.Generator().manual_seed(0))
    assert first.name == type(recipe).__name__ and torch.equal(first.forward(x), again.forward(x))
    assert first.simulate(x, torch.Generator().manual_seed(1)).dtype == torch.float32
    per_datum = not getattr(recipe, "shared", False) and str(recipe) not in (str(blur()), str(downsample()))
    assert first.count == (6 if per_datum else None)


def test_acceleration_is_the_share_of_columns_and_the_centre_is_always_sampled() -> None:
    mask = fourier(acceleration=4, centre=0.125).draw((16, 16), 200, 0.1, torch.Generator().manual_seed(0)).mask
    assert (mask.float().mean((1, 2)) == 0.25).all() and bool(mask[:, :, 7:9].all())
    assert (mask == mask[:, :1]).all() and (mask.float().mean(0)[0, [0, 3, 12]] > 0.05).all()


def test_what_data_share_is_drawn_once_where_observations_are_made_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_observe, "BLOCK", 4 * 4 * 12)
    np.savez(tmp_path / "clean.npz", x=normal(10, 12).float().numpy())
    recipe = compose(projection(rows=6, shared=True), mask(keep=0.5))
    commands_observe.observe_command(tmp_path / "clean.npz", recipe, level(), 1e-4, None, tmp_path / "obs.npz", 0)
    read = read_observations(tmp_path / "obs.npz")
    seen = read.observer.observed()
    assert seen.shape[0] == 10 and len(read.observer.arrays()["0.matrix"]) == 1
    expected = read.observer.forward(normal(10, 12).float())
    torch.testing.assert_close(read.obs[seen], expected[seen], atol=1e-3, rtol=0)


def test_of_mixed_instruments_each_datum_is_seen_by_one() -> None:
    """Three in one file: what each datum's observation holds is that of its instrument alone."""
    recipe = mixed(mask(keep=0.5), mixed(downsample(factor=2), projection(rows=3)), share=1 / 3)
    A = recipe.draw((4, 4), 600, 0.1, torch.Generator().manual_seed(0)).to("cpu", torch.float64)
    x, sizes = normal(600, 4, 4), (16, 4, 3)
    shown = torch.stack([part.any(1) for part in A.parts[1].mask.split([16, 7], dim=1)], 1)
    assert A.obs_shape == (sum(sizes),) and (shown.sum(1) == 1).all() and shown[:, 0].double().mean() == pytest.approx(1 / 3, abs=0.07)
    first, rest = A.parts[0].parts
    expected = torch.cat([first.forward(x).flatten(1) * shown[:, :1], rest.forward(x) * shown[:, 1:]], dim=1)
    torch.testing.assert_close(A.forward(x), expected)
    w = normal(600, 23, seed=4)
    torch.testing.assert_close((A.forward(x) * w).sum(1), (x * A.adjoint(w)).sum((1, 2)))


def test_recipes_refuse_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="mixed: share is 1, expected a fraction above 0 and below 1"):
        mixed(share=1)
    with pytest.raises(ValueError, match="blur: sigma is 0, expected 0.2 to 100"):
        blur(sigma=0)
    with pytest.raises(ValueError, match="blur: size is 4, expected an odd number"):
        blur(size=4)
    with pytest.raises(ValueError, match="compressed: ratio is 2, expected 1e-06 to 1"):
        compressed(ratio=2)
    with pytest.raises(ValueError, match=r"'fourier' takes x of shape .* not \(3, 8, 8\)"):
        fourier().draw((3, 8, 8), 2, 0.1, torch.Generator())


@pytest.mark.parametrize("name, shape, parameters, message", [
    ("blur", (4, 4), {"psf": torch.ones(1, 3, 3), "boundary": "wrap"}, "boundary is 'wrap', expected one of: circular, zero"),
    ("blur", (4,), {"psf": torch.ones(1, 3, 3)}, r"psf has shape \(1, 3, 3\)"),
    ("blur", (3, 3), {"psf": torch.ones(1, 9, 3)}, "psf has 9 entries where x has 3"),
    ("downsample", (4, 4), {"factor": 1}, "factor is 1"),
    ("fourier", (2, 4, 4), {"mask": torch.full((1, 4, 4), 0.5)}, "mask holds 0.5"),
    ("radon", (4,), {"angles": torch.ones(1, 3)}, r"not \(4,\)"),
    ("compressed", (4,), {"seeds": torch.ones(1), "rows": 5}, "rows is 5, expected 1 to 4"),
    ("compose", (4,), {}, "needs parts 0, 1"),
    ("compose", (4,), {"0.mask": torch.ones(1, 4)}, "'0.observer'"),
    ("stack", (4,), {"0.observer": "identity", "mask": torch.ones(1, 4)}, "no parameter 'mask'"),
])  # fmt: skip
def test_bad_parameters_are_refused_with_their_value(name: str, shape: tuple[int, ...], parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, shape, parameters, ONE)
