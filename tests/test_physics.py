r"""deepinv's linear physics as observers: equal to A and A_adjoint of deepinv, per datum, under the contract; others refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from emdiff.observations import read_observations, read_truth
from observers.contract import check

deepinv = pytest.importorskip("deepinv", reason="deepinv is an extra: pip install 'emdiff[deepinv]'")

from deepinv import physics as P  # noqa: E402

from observers.physics import wrap  # noqa: E402

N, H = 3, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int) -> Tensor:
    return (draw(*shape, seed=5) > 0).float()


seeded = lambda: torch.Generator().manual_seed(1)  # noqa: E731
kernel = lambda n: draw(n, 1, 3, 3, seed=2).abs()  # noqa: E731
coils = lambda n: torch.complex(draw(n, 2, H, H, seed=3), draw(n, 2, H, H, seed=4))  # noqa: E731
CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, Tensor]]] = {
    "Denoising": (lambda: P.Denoising(), (1, H, H), {}),
    "Inpainting": (lambda: P.Inpainting((1, H, H), mask=mask(1, 1, H, H)), (1, H, H), {"mask": mask(N, 1, H, H)}),
    "Demosaicing": (lambda: P.Demosaicing((3, H, H)), (3, H, H), {}),
    "Decolorize": (lambda: P.Decolorize(), (3, H, H), {}),
    "Blur, circular": (lambda: P.Blur(filter=kernel(1), padding="circular"), (1, H, H), {"filter": kernel(N)}),
    "Blur, valid": (lambda: P.Blur(filter=kernel(1), padding="valid"), (2, H, H), {"filter": kernel(N)}),
    "Blur, reflect": (lambda: P.Blur(filter=kernel(1), padding="reflect"), (1, H, H), {}),
    "BlurFFT": (lambda: P.BlurFFT((1, H, H), filter=kernel(1)), (1, H, H), {}),
    "Downsampling": (lambda: P.Downsampling((1, H, H), filter=kernel(1), factor=2), (1, H, H), {"filter": kernel(N)}),
    "Upsampling": (lambda: P.Upsampling((1, 2 * H, 2 * H), filter="bilinear", factor=2), (1, H, H), {}),
    "MRI": (lambda: P.MRI(mask=mask(1, 2, H, H), img_size=(2, H, H)), (2, H, H), {"mask": mask(N, 1, H, H).expand(-1, 2, -1, -1)}),
    "CompressedSensing": (lambda: P.CompressedSensing(m=20, img_size=(1, H, H), rng=seeded()), (1, H, H), {}),
    "SinglePixelCamera": (lambda: P.SinglePixelCamera(m=20, img_size=(1, 16, 16), rng=seeded()), (1, 16, 16), {}),
    "Tomography": (lambda: P.Tomography(angles=5, img_width=H, normalize=False), (1, H, H), {}),
    "HyperSpectralUnmixing": (lambda: P.HyperSpectralUnmixing(E=3, C=5, M=draw(3, 5, seed=6).abs()), (3, H, H), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrapped_physics_is_deepinvs_own_and_keeps_the_contract(case: str) -> None:
    make, shape, parameters = CASES[case]
    observer = wrap(make(), shape, tuple(parameters))(shape, torch.tensor(0.5), **parameters)
    reference, x, w = make(), draw(N, *shape), draw(N, *observer.obs_shape, seed=1)
    torch.testing.assert_close(observer.forward(x), reference.A(x, **parameters))
    torch.testing.assert_close(observer.adjoint(w), reference.A_adjoint(w, **parameters))
    for i in range(N):
        own = {key: value[i : i + 1] for key, value in parameters.items()}
        alone, index = make(), torch.tensor([i])
        torch.testing.assert_close(observer.rows(index).forward(x[index]), alone.A(x[index], **own), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(observer.forward(x)[index], alone.A(x[index], **own), rtol=1e-4, atol=1e-5)
    found = check(observer, N)
    assert found.ok, found.failures


def test_parameters_of_another_call_leave_nothing_behind() -> None:
    make, shape, parameters = CASES["Inpainting"]
    cls = wrap(make(), shape, ("mask",))
    first, second = (cls(shape, torch.tensor(0.5), mask=m) for m in (parameters["mask"], 1 - parameters["mask"]))
    x = draw(N, *shape)
    before = first.forward(x)
    second.forward(x)
    assert torch.equal(first.forward(x), before)


def test_what_is_not_linear_or_not_supported_is_refused_by_name() -> None:
    def unwritten(x: torch.Tensor, **_: object) -> torch.Tensor:
        raise NotImplementedError

    refused = [
        (
            P.PhaseRetrieval(P.Denoising()) if not hasattr(P, "RandomPhaseRetrieval") else P.RandomPhaseRetrieval(m=4, img_size=(1, 4, 4)),
            "not a LinearPhysics",
        ),
        (P.Haze(), "'Haze' is not a LinearPhysics"),
        (P.Pansharpen((3, H, H)), "'Pansharpen' makes something else than one real tensor"),
        (P.LinearPhysics(A=lambda x, **_: 2 * x, A_adjoint=lambda y, **_: 3 * y), "'LinearPhysics': its A_adjoint is not the adjoint"),
        (P.LinearPhysics(A=unwritten), "'LinearPhysics' cannot be used on x of shape .*: NotImplementedError"),
    ]
    for physics, message in refused:
        with pytest.raises(ValueError, match=message):
            wrap(physics, (3, H, H))
    with pytest.raises(ValueError, match="'Denoising' takes no tensor 'filter'"):
        wrap(P.Denoising(), (1, H, H), ("filter",))


def test_a_dataset_of_deepinv_is_read_as_observations(tmp_path: Path) -> None:
    from deepinv.datasets import generate_dataset

    physics = P.Inpainting((1, H, H), mask=0.5, noise_model=P.GaussianNoise(0.1))
    x = torch.utils.data.TensorDataset(draw(6, 1, H, H))
    masks = P.generator.BernoulliSplittingMaskGenerator((1, H, H), 0.5)
    made = generate_dataset(x, physics, str(tmp_path), physics_generator=masks, train_datapoints=6, batch_size=2, test_dataset=x, verbose=False)
    module = tmp_path / "seen.py"
    module.write_text(
        "import deepinv\nfrom observers.physics import wrap\n"
        f"Seen = wrap(deepinv.physics.Inpainting((1, {H}, {H}), mask=0.5), (1, {H}, {H}), ('mask',))\n"
    )
    read, truth = read_observations(made, f"{module}:Seen", noise_std=0.1), read_truth(made)
    with h5py.File(made) as file:
        np.testing.assert_array_equal(read.obs.numpy(), file["y_train"][:])
        np.testing.assert_array_equal(truth.numpy(), file["x_train"][:])
        seen = read.observer.forward(truth)
        np.testing.assert_allclose(seen.numpy(), file["x_train"][:] * file["mask_train"][:], atol=1e-6)
    assert len(read) == 6 and float((read.obs - seen).std()) < 0.11
