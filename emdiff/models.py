r"""The parametrisations of Multimeasurement Generative Models (Saremi & Srivastava 2022) by name, from plain values that a prior's file can hold.

| kind | what | Sec. |
|---|---|---|
| mdae | multidenoising autoencoder, nu is the network's output | 4.1 |
| mem | MEM2, the energy of nu; with M = 1 DEEN, neural empirical Bayes | 4.2 |
| muvb | the free energy of a latent variable model; with M = 1 and without metaencoder UVB | 4.3, App. C |

Each in two views: pooled (levels None), any number of measurements of any levels; channels, the M measurements of one set of levels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from emdiff.denoise import Denoiser
from emdiff.mdae import MDAE, ChannelMDAE
from emdiff.mem import MEM, ImageMeta, VectorMeta
from emdiff.muvb import MUVB, ImageDecoder, ImageEncoder, VectorDecoder, VectorEncoder
from emdiff.nn import MLP, UNet
from emdiff.paper_nets import Encoder, U2Net, spectrally_normalised

KINDS = ("mdae", "mem", "muvb")
NETS = ("unet", "mlp", "u2net", "resnet")


def build_model(
    shape: tuple[int, ...],
    kind: str,
    net: dict[str, Any],
    levels: list[float] | None = None,
    metaencoder: dict[str, Any] | None = None,
    spectral: bool = False,
    spread: float = 1.0,
) -> Denoiser:
    """An untrained denoiser of standardised data.

    Args:
        shape: S.
        kind: One of KINDS.
        net: {"kind": one of NETS, and arguments of that network}. For muvb "resnet" or "mlp" with "latent", else any but "resnet".
        levels: sigma_1..sigma_M in units of the data's std, for the channel view; None for the pooled one.
        metaencoder: Arguments of the metaencoder, {} for the defaults, or None for no metaencoder.
        spectral: Normalise the weights of all layers spectrally.
        spread: Of the pooled MDAE or MUVB.

    Raises:
        ValueError: for unknown kinds or a network that does not go with the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown parametrisation {kind!r}; choose from {', '.join(KINDS)}")
    pooled, sigma = levels is None, None if levels is None else torch.tensor(levels)
    seen = (1 if levels is None else len(levels), *shape)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in net.items() if k != "kind"}
    scalar = None if metaencoder is None else build_metaencoder(seen, net["kind"], metaencoder)
    if kind == "muvb":
        model: Denoiser = build_muvb(seen, net["kind"], scalar, sigma, spread=spread, **options)
    else:
        backbone = build_backbone(shape if pooled else seen, net["kind"], pooled, options)
        inner = MDAE(backbone, spread=spread) if pooled else ChannelMDAE(backbone, sigma)
        model = inner if kind == "mdae" else MEM(inner, scalar, sigma)
    return spectrally_normalised(model) if spectral else model


def build_backbone(seen: tuple[int, ...], kind: str, pooled: bool, options: dict[str, Any]) -> nn.Module:
    """F(z, c) on inputs of shape (B, *seen).

    Raises:
        ValueError: for an unknown network, or one that takes images where data are none.
    """
    if kind == "mlp":
        return MLP(seen, **options)
    if kind not in ("unet", "u2net"):
        raise ValueError(f"network {kind!r} does not go with mdae and mem; choose unet, u2net or mlp")
    if not is_image_shape(seen if pooled else seen[1:]):
        raise ValueError(f"network {kind!r} takes images (H, W) or (C, H, W), not data of shape {tuple(seen)}; choose mlp")
    if kind == "u2net":
        return U2Net(seen, levels=pooled, **options)
    return UNet(seen if pooled else (math.prod(seen[:-2]), *seen[-2:]), **options)


def build_metaencoder(seen: tuple[int, ...], kind: str, options: dict[str, Any]) -> nn.Module:
    """h(z, nu, c): the encoder of Table 3 for images, an MLP for vectors."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if kind == "mlp":
        return VectorMeta(math.prod(seen), **options)
    return ImageMeta(Encoder(2 * math.prod(seen[:-2]) + 2, seen[-2:], 1, **options))


def build_muvb(
    seen: tuple[int, ...],
    kind: str,
    metaencoder: nn.Module | None,
    levels: Tensor | None,
    latent: int = 2048,
    draws: int = 4,
    spread: float = 1.0,
    **options: Any,
) -> MUVB:
    """Encoder and decoder of one kind around `latent` variables.

    Raises:
        ValueError: for another network than "resnet" and "mlp".
    """
    make = lambda encoder, decoder: MUVB(encoder, decoder, latent, metaencoder, levels, draws, spread=spread)
    if kind == "mlp":
        return make(VectorEncoder(math.prod(seen), latent, **options), VectorDecoder(seen, latent, **options))
    if kind != "resnet" or not is_image_shape(seen[1:]):
        raise ValueError(f"network {kind!r} does not go with muvb on data of shape {seen[1:]}; choose resnet for images, else mlp")
    return make(ImageEncoder(seen, latent, **options), ImageDecoder(seen, latent, **options))


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """(H, W), or (C, H, W) with at most 16 channels."""
    return len(shape) in (2, 3) and min(shape[-2:]) >= 4 and (len(shape) == 2 or shape[0] <= 16)


def fixed_levels(denoiser: Denoiser) -> Tensor | None:
    """The levels (M,) that a denoiser of the channel view was made for; None where it takes any."""
    return denoiser.sigma if isinstance(denoiser, ChannelMDAE) else getattr(denoiser, "levels", None)
