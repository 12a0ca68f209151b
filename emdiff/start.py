r"""The start of EM: what the observations say of p(x) before any iteration.

self-supervised, where every observation is a measurement z of x with levels sigma_z (infinite where an entry was not observed). Each entry is
recorrupted with a factor a of its own (Recorrupted-to-recorrupted, Pang et al. 2021):

    input  z + a w,  level sigma_z sqrt(1 + a^2);      target  z - w / a,      w ~ N(0, sigma_z^2)

Input and target have independent noise, so the least-squares estimator is E[x | input], as if the clean x had been the target. a = infinity
hides an entry from the input and leaves z itself as the target: splitting (Noise2Void, Krull et al. 2019; SSDU, Yaman et al. 2020) is the same
objective.

For small a, inputs near the observations themselves, the target's w / a is large. Its effect on the gradient is (d xhat / d theta)(z + a w) w / a,
and -w undoes all of it but what is even in a: so each w is used with both signs (antithetic), after which the gradient's noise stays bounded as
a -> 0. The limit of the mean of both losses, less |w / a|^2, is Stein's unbiased estimate |xhat(z) - z|^2 + 2 sigma_z^2 div xhat(z) with one probe
of the divergence (SURE, Stein 1981; Ramani, Blu & Unser 2008). Weights are 1/(sigma_z^2 (1 + min(1, 1/a^2)) + 1/2), the inverse variance of the part
of the target that is left. The learning rate falls to 0; the weights are those that predict held-out observations best.

First samples deviate from that estimator as x does (first_samples).

mixture, for vectors: exact samples of a mixture of Gaussians given obs, which then is the base that learning departs from (components).

gaussian, for any observer: exact samples of N(mean, S) given obs (gaussian).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data
from emdiff.denoise import Denoiser
from emdiff.gaussian import DENSE


class Choice(NamedTuple):
    """A start and why it was taken.

    Attributes:
        kind: "mixture", "gaussian" or "self-supervised".
        reason: One clause for the user.
    """

    kind: str
    reason: str


class Recorrupted(NamedTuple):
    """A batch of the self-supervised objective, in the terms of `mdae.MDAE.loss`.

    Attributes:
        y: Input (B, 1, *S).
        sigma: Its levels (B, 1, *S or ones), infinite where hidden.
        target: (B, *S).
        weight: (B, *S or ones), 0 where nothing was observed.

    `recorrupt` leaves every datum once, `antithetic` twice.
    """

    y: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor


def choose_start(data: Data, wanted: str = "auto") -> Choice:
    """Decide between the starts.

    Args:
        data: The observations.
        wanted: "auto", "mixture", "gaussian" or "self-supervised".

    Returns:
        The choice, with its reason.

    Raises:
        ValueError: if self-supervision is wanted where it has no objective, or a mixture of data that are no short vectors.
    """
    if wanted == "mixture" and not is_vector(data.shape):
        raise ValueError(f"--start mixture is for vectors of at most {DENSE} entries, not for shape {data.shape}; use --start gaussian or auto")
    if wanted == "auto" and is_vector(data.shape):
        reason = f"vectors of at most {DENSE} entries: a mixture of Gaussians by maximum likelihood, from which the network departs"
        return Choice("mixture", reason)
    possible, reason = _self_supervision(data)
    if wanted == "self-supervised" and not possible:
        raise ValueError(f"--start self-supervised has no objective here: {reason}; use --start gaussian or auto")
    if wanted != "auto":
        return Choice(wanted, "as asked")
    return Choice("self-supervised" if possible else "gaussian", reason)


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether data of shape S are vectors of few entries, not images."""
    return math.prod(shape) <= DENSE and (len(shape) == 1 or min(shape[-2:]) < 8)


def _self_supervision(data: Data) -> tuple[bool, str]:
    """Whether E[x | z] can be learned from other parts of the observations, and why."""
    some = data.rows(slice(0, 64))
    direct = some.observer.as_measurement(some.obs)
    if direct is None:
        return False, f"observer {some.observer.name} mixes the entries of x, so no part of an observation predicts another"
    observed = direct[1].isfinite()
    if bool(observed.all()):
        return True, "every entry is observed with noise: recorrupted observations predict each other"
    if observed.shape[0] == 1 or bool((observed == observed[:1]).all()):
        return False, "the same entries are missing from every datum, so nothing tells of them"
    return True, "each datum misses other entries: hidden parts of the observations are predicted from the rest"


def recorrupt(
    z: Tensor, sigma_z: Tensor, generator: torch.Generator | None = None, a_range: tuple[float, float] = (0.05, 2.0), complete: bool | None = None
) -> Recorrupted:
    """Draw inputs and targets of the self-supervised objective.

    Args:
        z: Observations as measurements (B, *S), finite.
        sigma_z: Their levels (B or 1, *S or ones), infinite where not observed.
        generator: Source of randomness.
        a_range: Range of the factor a, drawn log-uniformly per datum. Where entries are missing, a share of the observed ones, uniform in
            [0, 1] per datum, is hidden as well.
        complete: Whether all entries of all data were observed, where that is known: a GPU is not asked then.

    Returns:
        Recorrupted(y, sigma, target, weight).
    """
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=z.dtype, device=z.device)  # noqa: E731
    ones = [1] * (z.ndim - 1)
    observed = sigma_z.isfinite()
    a = a_range[0] * (a_range[1] / a_range[0]) ** draw(len(z), *ones)
    if not (bool(observed.all()) if complete is None else complete):
        a = torch.where(draw(*z.shape) < draw(len(z), *ones), math.inf, a)
    s = torch.where(observed, sigma_z, 0.0)
    w = s * torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    hidden = a.isinf() | ~observed
    y = torch.where(hidden, 0.0, z + torch.where(hidden, 0.0, a) * w)
    sigma = torch.where(hidden, math.inf, s * torch.sqrt(1 + a.square()))
    weight = observed / (s.square() * (1 + a.pow(-2).clamp(max=1)) + 0.5)
    return Recorrupted(y[:, None], sigma[:, None], z - w / a, weight)


def antithetic(batch: Recorrupted, z: Tensor) -> Recorrupted:
    """A batch of the observations z (B, *S), and the same with all w of the other sign, 2 B rows.

    >>> both = antithetic(recorrupt(torch.zeros(1, 2), torch.ones(1, 2)), torch.zeros(1, 2))
    >>> torch.equal(both.y[0], -both.y[1]), torch.equal(both.target[0], -both.target[1]), len(both.weight)
    (True, True, 2)
    """
    y = torch.where(batch.sigma.isinf(), 0.0, 2 * z[:, None] - batch.y)
    twice = lambda one, other: torch.cat([one, other])  # noqa: E731
    return Recorrupted(
        twice(batch.y, y), twice(batch.sigma, batch.sigma), twice(batch.target, 2 * z - batch.target), twice(batch.weight, batch.weight)
    )


def self_supervised_loss(denoiser: Denoiser, batch: Recorrupted) -> Tensor:
    """The weighted mean squared error of a batch, shape ()."""
    error = batch.weight * (denoiser.xhat(batch.y, batch.sigma) - batch.target).square()
    return error.sum() / batch.weight.expand(error.shape).gt(0).sum().clamp(min=1)
