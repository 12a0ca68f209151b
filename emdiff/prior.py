r"""A prior as users keep it: a denoiser, the scale of the data, and the levels it was trained for; saved as safetensors, never pickled.

Unconditional samples are the end of a walk that starts where nothing is known, y ~ N(0, tau_first^2) in standardised units, and accumulates
measurements down to tau_last.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import emdiff
from emdiff.accumulate import accumulate, levels
from emdiff.basewalk import descend, free
from emdiff.checkpoint import save_tensors
from emdiff.denoise import Denoiser
from emdiff.errors import UsageError, one_line
from emdiff.mdae import MDAE
from emdiff.mixture import MixtureDenoiser
from emdiff.models import KINDS, build_model, fixed_levels
from emdiff.nn import MLP, UNet
from emdiff.precision import set_precision
from emdiff.scale import Scale

NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP}

TAU_FIRST = 20.0
"""Coarsest level, in units of the data's std: the mean of a 28 x 28 image has been blurred beyond its own spread."""


LARGEST = 10_000
"""Most features, blocks and so on of a network that is read from a file; its square, entries of a datum or latent variables."""

FORMAT = 3
"""Of the files: in those before 2, which have no such number, maps of levels modulated a U-Net entry by entry; before 3 MUVB had other bounds."""

MOST_OPTIONS = 5000
"""Most plain values in the arguments of a network that is read from a file: one per level, of which there can be 4096, and some."""


class Prior(NamedTuple):
    """A learned p(x).

    Attributes:
        denoiser: Of standardised data.
        scale: The map to the user's units.
        shape: S.
        tau_last: Finest level it was trained for, in units of scale.std.
        network: What `build_network` made its backbone from.
    """

    denoiser: Denoiser
    scale: Scale
    shape: tuple[int, ...]
    tau_last: float
    network: dict[str, Any]


def choose_network(shape: tuple[int, ...], maps: bool = False, gain: bool = False) -> dict[str, Any]:
    """A network for data of this shape: a U-Net for images of at least 8 x 8, volumes of at least 8 x 8 x 8 and series of at least 64 entries, with
    at most 16 channels (series: fewer than 8), else an MLP. A volume has four axes, the first its channels; a vector has no order and gets an MLP.

    Args:
        shape: S.
        maps: Whether noise levels differ between the entries of a datum.
        gain: Whether guidance takes no products with V: those of a U-Net with gains were seen to make moment matching diverge (docs/method.md).

    Returns:
        Arguments for `build_network`; about 0.6 million parameters for a U-Net of images.
    """
    series = len(shape) == 2 and shape[0] < 8 and shape[1] >= 64
    dims = 1 if series else len(shape) - 1 if len(shape) > 2 else 2
    side = min(shape[-dims:]) if len(shape) in (2, 3, 4) else 0
    if side < 8 or (len(shape) > 2 and shape[0] > 16):
        return {"kind": "mlp", "width": 128, "blocks": 3}
    widths = ([16, 32, 64] if dims == 3 else [32, 64, 128]) + [128] * (side >= 64)
    return {"kind": "unet", "widths": widths, "patch": 2 if side >= 16 else 1, "maps": maps, "gain": gain} | ({} if dims == 2 else {"dims": dims})


def build_network(shape: tuple[int, ...], kind: str, base: int = 0, **options: Any) -> Denoiser:
    """An untrained pooled MDAE, or a parametrisation of `models`; bfloat16 is decided by `set_precision`.

    Args:
        shape: S.
        kind: "unet" or "mlp", or one of `models.KINDS`.
        base: Components of the base mixture of a pooled MDAE, to be filled by `with_base` or from a file; 0 for none.
        options: Arguments of `nn.UNet` or `nn.MLP`, or of `models.build_model`.

    Raises:
        ValueError: for another kind.
    """
    if kind in KINDS:
        return build_model(shape, kind, **options)
    if kind not in NETWORKS:
        raise ValueError(f"unknown network {kind!r}; choose from {', '.join([*NETWORKS, *KINDS])}")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    d = math.prod(shape)
    blank = MixtureDenoiser(torch.full((base,), 1 / base), torch.zeros(base, d), torch.eye(d).expand(base, d, d)) if base else None
    return MDAE(NETWORKS[kind](shape, **options), spread=0.2 if kind == "unet" else 1.0, base=blank)


def save_prior(path: Path, prior: Prior) -> None:
    """Write a prior to a temporary name, then rename it."""
    about = {
        "emdiff": emdiff.__version__,
        "format": FORMAT,
        "network": prior.network,
        "shape": list(prior.shape),
        "scale": list(prior.scale),
        "tau_last": prior.tau_last,
    }
    weights = {name: value.detach().cpu() for name, value in prior.denoiser.state_dict().items()}
    save_tensors(path, weights, {"emdiff": json.dumps(about)})


def load_prior(path: Path, device: str = "cpu") -> Prior:
    """Read a prior.

    Raises:
        UsageError: if the file is missing, is no prior, or was written for another network.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no prior here; give the run folder of a finished `emdiff fit`")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["emdiff"])
            shape, network, scale, tau_last = _checked(about)
            with torch.device("meta"):  # nothing is allocated for a network that is not in the file
                wanted = {name: tuple(value.shape) for name, value in build_network(shape, **network).state_dict().items()}
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != wanted:
                raise ValueError(f"its {len(found)} arrays are not those of its network {network}")
            weights = {name: file.get_tensor(name) for name in found}
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise ValueError("its weights are not finite")
        denoiser = build_network(shape, **network)
        denoiser.load_state_dict(weights)
    except (SafetensorError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"{path}: not a prior that emdiff {emdiff.__version__} can read ({one_line(error)})") from error
    set_precision(denoiser, device).to(device).eval().requires_grad_(False)
    return Prior(denoiser, scale, shape, tau_last, network)


def _checked(about: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any], Scale, float]:
    """Shape, network, scale and tau_last that a file declares, if a prior can have them.

    Raises:
        ValueError: naming what it cannot.
    """
    shape, network, scale, tau_last = tuple(about["shape"]), about["network"], Scale.of(about["scale"]), float(about["tau_last"])
    options = list(_options(network))
    if len(options) > MOST_OPTIONS or not all(_possible(*option) for option in options):
        raise ValueError(f"network {network}")
    since = 3 if network.get("kind") == "muvb" else 2 if network.get("maps") else 1
    if int(about.get("format", 1)) < since:
        raise ValueError("this version computes its network otherwise than the one that trained it; train it again")
    if not (1 <= len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) <= LARGEST**2):
        raise ValueError(f"shape {shape}")
    moments = [(scale.mean, scale.std), *scale.channels]
    coarsest = math.inf if network.get("levels") else TAU_FIRST
    if not all(math.isfinite(mean) and 0 < std < math.inf for mean, std in moments) or not 0 < tau_last < coarsest:
        raise ValueError(f"scale {tuple(scale)}, tau_last {tau_last}")
    if scale.channels and (len(scale.channels), scale.space) != (shape[0], len(shape) - 1):
        raise ValueError(f"shape {shape} and scales of {len(scale.channels)} channels over {scale.space} axes")
    return shape, network, scale, tau_last


def _options(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The plain values within a network's arguments, each with the name it stands under.

    Raises:
        ValueError: if they lie deeper than any network's.
    """
    if depth > 4:
        raise ValueError("network's options within one another")
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else [(name, v) for v in value]:
            yield from _options(inner, key, depth + 1)
    else:
        yield name, value


def _possible(name: str, value: Any) -> bool:
    """Whether an argument of a network can have this value."""
    if type(value) is int:
        return 0 <= value <= (LARGEST**2 if name == "latent" else LARGEST)
    return value is None or type(value) in (str, bool) or (type(value) is float and math.isfinite(value))


def check_any_level(prior: Prior, path: Path) -> Prior:
    """The prior, if it takes measurements of any levels, as every posterior walk needs.

    Raises:
        UsageError: for a prior of one set of levels.
    """
    levels = fixed_levels(prior.denoiser)
    if levels is not None:
        raise UsageError(
            f"{path}: this prior was trained for one set of levels, M = {len(levels)}, which `emdiff sample` walks; "
            "for posteriors train one without --model.sigma"
        )
    return prior


def sees_entries(prior: Prior) -> bool:
    """Whether its network sees a level at each entry. A U-Net without maps sees their mean over the datum."""
    net = prior.network.get("net", prior.network)
    return net["kind"] != "unet" or bool(net.get("maps"))


def has_gains(prior: Prior) -> bool:
    """Whether its network is a U-Net with gains, on whose products with V solves of several iterations were seen to diverge."""
    return bool(prior.network.get("gain"))


@torch.inference_mode()
def sample_prior(
    prior: Prior,
    count: int,
    generator: torch.Generator,
    count_levels: int = 64,
    steps: int = 0,
    batch: int = 500,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Draw x ~ p(x). Where the prior has a base and does not depart from it, draws are exact.

    Args:
        prior: The prior, on the generator's device.
        count: Number of samples.
        generator: Source of randomness.
        count_levels: Levels from TAU_FIRST to prior.tau_last.
        steps: Langevin steps at each level.
        batch: Samples at once.
        progress: Called with the number of samples done.

    Returns:
        Samples (count, *S) in the user's units, on the CPU.
    """
    done = []
    taus = levels(TAU_FIRST, prior.tau_last, count_levels)
    for i in range(0, count, batch):
        shape = (min(batch, count - i), *prior.shape)
        if isinstance(prior.denoiser, MDAE) and prior.denoiser.base is not None:
            end = descend(prior.denoiser.base, free(prior.denoiser), shape, taus, generator)
            done.append(prior.scale.restore(end.x).cpu())
            progress(i + shape[0])
            continue
        y = math.sqrt(1 + TAU_FIRST**2) * torch.randn(shape, generator=generator, device=generator.device)
        done.append(prior.scale.restore(accumulate(prior.denoiser, y, taus[0], taus[1:], generator, steps=steps).xhat).cpu())
        progress(i + shape[0])
    return torch.cat(done)
