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

First samples: xhat(z) + c V^(1/2) xi, V = sigma_z^2 d xhat / d z, by Lanczos, where every entry was observed. With E[x | z] for xhat, c would be 1.
A trained one errs by more than tr V and V by Lanczos has a larger trace, its negative eigenvalues counting as 0; EM takes many iterations to remove
what such samples have too much of. So c^2 is the estimator's mean squared error over the mean square of V^(1/2) xi, on observations that training
did not see. Stein's estimate of the error is |z - xhat|^2 - sigma_z^2 + 2 tr V per entry and needs no truth; with |V^(1/2) xi|^2 for tr V

    c^2 = 2 - (sigma_z^2 - |z - xhat|^2) / |V^(1/2) xi|^2.

Where some entries were not observed, V of these has no such form. But estimates from less tell how estimates deviate: with z_S a random half of z's
observed entries, xhat(z_S) = E[xhat(z) | z_S], so

    D = xhat(z) - xhat(z_S)   has mean 0 given z_S and covariance V_S - V, which has the structure of x | z: strokes that are there or not.

x = xhat(z) +- c D with a random sign has mean xhat(z) given z; c makes the mean of its square that of an entry's posterior variance, both measured
without any truth: where entries were not observed v, the error of predicting hidden entries less their noise; where they were the mean of
sigma_z^2 - (z - xhat)^2, since E(z - x)^2 = sigma_z^2 for a sample x of x | z. White deviations of the same size tell unseen entries nothing of their
neighbours, and cost more than they give (docs/method.md).

mixture, for vectors: exact samples of a mixture of Gaussians given obs, which then is the base that learning departs from (components).

gaussian, for any observer: exact samples of N(mean, S) given obs (gaussian).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from emdiff.data import Data, Observations
from emdiff.denoise import Denoiser
from emdiff.gaussian import DENSE
from emdiff.linalg import lanczos_sqrt

LANCZOS = 2
"""Products for V^(1/2). More of them count more negative eigenvalues of a learned V as 0: on 10,000 noisy digits the mean square of V^(1/2) xi
was the trace of V with 2 and 4 % above it with 4."""

SPREAD = (0.25, 1.5)
"""Range of c^2."""


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


def recorrupt(z: Tensor, sigma_z: Tensor, generator: torch.Generator | None = None, a_range: tuple[float, float] = (0.05, 2.0)) -> Recorrupted:
    """Draw inputs and targets of the self-supervised objective.

    Args:
        z: Observations as measurements (B, *S), finite.
        sigma_z: Their levels (B or 1, *S or ones), infinite where not observed.
        generator: Source of randomness.
        a_range: Range of the factor a, drawn log-uniformly per datum. Where entries are missing, a share of the observed ones, uniform in
            [0, 1] per datum, is hidden as well.

    Returns:
        Recorrupted(y, sigma, target, weight).
    """
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=z.dtype, device=z.device)  # noqa: E731
    ones = [1] * (z.ndim - 1)
    observed = sigma_z.isfinite()
    a = a_range[0] * (a_range[1] / a_range[0]) ** draw(len(z), *ones)
    if not bool(observed.all()):
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


def hidden_variance(denoiser: Denoiser, data: Observations, generator: torch.Generator | None = None, share: float = 0.05) -> float:
    """The variance of an entry given the others, v: the mean of (z - xhat)^2 - sigma_z^2 over a share of the observed entries that xhat is not shown.

    Args:
        denoiser: Trained on recorrupted observations, these not among them.
        data: Observations, each a measurement of x.
        generator: Source of randomness.
        share: Of the observed entries that are hidden at once.
    """
    z, sigma_z = data.observer.as_measurement(data.obs)
    sigma_z = sigma_z.expand(z.shape)
    hide = sigma_z.isfinite() & (_uniform(z, generator) < share)
    with torch.no_grad():
        excess = (z - _without(denoiser, z, sigma_z, hide)).square() - sigma_z.square()
    return max(float(excess[hide].mean()), 0.0)


def spread(denoiser: Denoiser, parts: Iterable[Observations], generator: torch.Generator | None = None) -> float:
    """The factor c of first samples' deviations.

    Args:
        denoiser: Trained on recorrupted observations, these not among them.
        parts: Batches of observations, each a measurement of x.
        generator: Source of randomness.

    Returns:
        c, its square within SPREAD; 1 where some entries were not observed.
    """
    gap = square = 0.0
    for part in parts:
        z, sigma_z = part.observer.as_measurement(part.obs)
        if not bool(sigma_z.isfinite().all()):
            return 1.0
        with torch.no_grad():
            xhat = denoiser.xhat(z[:, None], sigma_z[:, None])
        gap += float((sigma_z.square() - (z - xhat).square()).sum())
        square += float((first_samples(denoiser, part, generator) - xhat).square().sum())
    low, high = SPREAD
    return min(max(2 - gap / max(square, 1e-12), low), high) ** 0.5


def first_samples(denoiser: Denoiser, data: Observations, generator: torch.Generator | None = None, v: float = 0.0, c: float = 1.0) -> Tensor:
    """Samples of x | obs from the self-supervised estimator.

    Args:
        denoiser: Trained on recorrupted observations.
        data: A batch of observations, each a measurement of x.
        generator: Source of randomness.
        v: Variance of an entry given the others (`hidden_variance`), used where entries are missing.
        c: Factor of the deviations (`spread`), used where none are.

    Returns:
        Samples (B, *S).
    """
    z, sigma_z = data.observer.as_measurement(data.obs)
    if not bool(sigma_z.isfinite().all()):
        return _deviated(denoiser, z, sigma_z.expand(z.shape), v, generator)
    xhat, V = denoiser.moments(z[:, None], sigma_z[:, None])
    return xhat + c * lanczos_sqrt(V, torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device), LANCZOS)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _without(denoiser: Denoiser, z: Tensor, sigma_z: Tensor, hide: Tensor) -> Tensor:
    """The estimate from z (B, *S) without the entries to hide, bool (B, *S)."""
    sigma = torch.where(hide, math.inf, sigma_z)
    return denoiser.xhat(torch.where(sigma.isinf(), 0.0, z)[:, None], sigma[:, None])


@torch.no_grad()
def _deviated(denoiser: Denoiser, z: Tensor, sigma_z: Tensor, v: float, generator: torch.Generator | None) -> Tensor:
    """xhat(z) +- c D, shape (B, *S); no deviation where v is 0."""
    xhat, seen = denoiser.xhat(z[:, None], sigma_z[:, None]), sigma_z.isfinite()
    if v == 0:
        return xhat
    D = xhat - _without(denoiser, z, sigma_z, seen & (_uniform(z, generator) < 0.5))
    at_seen = (sigma_z.square() - (z - xhat).square())[seen].mean().clamp(min=0)
    c = lambda wanted, part: (wanted / D[part].square().mean().clamp(min=1e-12)).sqrt()  # noqa: E731
    D = torch.where(seen, c(at_seen, seen), c(v, ~seen)) * D
    sign = torch.where(_uniform(z.flatten(1)[:, 0], generator) < 0.5, -1.0, 1.0).reshape(-1, *[1] * (z.ndim - 1))
    return xhat + sign * D
