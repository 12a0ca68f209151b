r"""Over-relaxation: a biased M-step for a prior that spreads too much, and when to take it.

Exact EM is slow where the prior has too much variance: along a direction of true variance 0 an iteration multiplies s by
1 - (s/(s + n^2))^2. What is left of the error of a training is variance that the network adds, and the next E-step samples it. Re-noising
jumps of a level tau, as if they were complete samples, makes s about s^2 / (s + tau^2), which ends directions of s << tau^2 and costs the
others at most tau^2. It is biased, and a direction that it has killed comes back only by exact EM's slow growth: so an iteration
over-relaxes only where the observations object to the prior.

    spread:  the last samples' std exceeds that of the data, which the observations tell without EM. The walk stops at tau_relax, where noise hides
             what that ends, n > 2 tau_relax; with less noise that is not done.
    close:   with samples y of level tau of x | z, z a measurement of x of level sigma_z, E |z - y|^2 = sigma_z^2 + tau^2 at the fixed point of EM,
             whatever p(x). Where the samples are closer, the prior takes up noise. The walk goes to its end, and its jumps are re-noised.

Along a direction of true variance 0 in which the prior has s, the mean of (z - y)^2 / (n^2 + tau^2) is 1 - s n^4 / ((s + n^2)^2 (n^2 + tau^2)).
"""

from __future__ import annotations

from emdiff.data import Data, measured
from emdiff.em import Draws, Walk, walk_levels
from emdiff.metrics import chi2_spread, residual_chi2
from emdiff.noise import depends_on_signal
from emdiff.outline import Plan
from emdiff.scale import Scale

SPREAD = 1.005
"""An iteration over-relaxes if the last samples' std exceeds the data's own, estimated from the observations, by this factor."""

CLOSE = 0.98
"""... or if its draws are closer to the observations than this share of what they would be at the fixed point."""


def default_relax(noise: float, guidance: str, tau_relax: float) -> bool:
    """Whether iterations over-relax where they are left to themselves: where one of the two rules can be told."""
    return guidance == "fused" or noise > 2 * tau_relax


def spreads(k: int, plan: Plan, sample_std: float, scale: Scale) -> bool:
    """Whether round k over-relaxes at tau_relax: the samples of the round before, of std sample_std, spread more than the data do."""
    return k <= plan.relax and plan.walk.tau_relax > plan.walk.tau_last and sample_std > SPREAD * scale.std


def relaxed_walk(data: Data, walk: Walk) -> Walk:
    """The walk of an iteration that over-relaxes at tau_relax, with as many levels as the exact walk has above it and one at it."""
    above = sum(tau > walk.tau_relax for tau in walk_levels(data, walk))
    return walk._replace(tau_last=walk.tau_relax, levels=max(2, above + 1))


def closes(k: int, plan: Plan, data: Data, chi2: float) -> bool:
    """Whether round k re-noises the jumps of its draws: their chi2 (`followed`) is below what noise, if it is known, and chance explain."""
    if k > plan.relax or plan.level is not None or chi2 >= CLOSE or depends_on_signal(data):
        return False
    return chi2 < 1 - 4 * chi2_spread(data)[1]


def followed(data: Data, draws: Draws) -> float | None:
    """The residual chi2 of the draws' measurements, over data of which something was seen and whose chains were not kept; 1 for none. None where
    draws are complete samples, or observations no measurements of x."""
    if not draws.tau or draws.sample is not None or measured(data.rows(slice(0, 1))) is None:
        return None
    chi2 = residual_chi2(data, draws.y, draws.tau)
    counts = (chi2 > 0) if draws.kept is None else (chi2 > 0) & ~draws.kept.to(chi2.device)
    return float(chi2[counts].double().mean()) if bool(counts.any()) else 1.0


def over_relaxed(draws: Draws) -> Draws:
    """Jumps taken for complete samples, to be re-noised: the biased M-step."""
    return draws._replace(y=draws.x, tau=0.0)
