r"""What the figures that need no truth say of a fit: a verdict in words, and the iteration to keep.

Every rule compares a figure with what it would be if the fit were right, and names the remedy. The iteration to keep has the least

    score_k = |log chi2_k| / 0.02  +  log(max(agreement_k, 1)) / 0.1,

both terms measured in what is still unremarkable for them: chi2 within 2 %, agreement within 10 % of that between two halves of the observations.
Of iterations whose scores differ by less than 1 the last is kept.
Neither term alone decides: a collapsed prior can have chi2 near 1, a prior that is too broad agrees after the noise is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PATIENCE = 3
"""Iterations without a better score after which `--stop auto` ends a fit."""


class Verdict(NamedTuple):
    """Whether to believe a fit.

    Attributes:
        level: "good", "warn" or "bad".
        text: One sentence.
        reasons: One per finding, each with the figure and a remedy.
    """

    level: str
    text: str
    reasons: list[str]


def score(metrics: Mapping[str, Any]) -> float:
    """score_k of a round's figures; infinite where one is missing or not finite."""
    chi2, agreement = metrics.get("chi2", math.nan), metrics.get("observation_agreement", math.nan)
    if not (0 < chi2 < math.inf and 0 < agreement < math.inf):
        return math.inf
    return abs(math.log(chi2)) / 0.02 + math.log(max(agreement, 1.0)) / 0.1


def scores(history: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """score_k of each prior k that has one: chi2 is of the samples drawn with it, which are those of round k + 1, the agreement of round k."""
    after = {row["iter"]: row.get("chi2", math.nan) for row in history}
    found = {row["iter"]: score({**row, "chi2": after.get(row["iter"] + 1, math.nan)}) for row in history if row["iter"] > 0}
    return {k: value for k, value in found.items() if math.isfinite(value)}


def best_iteration(history: Sequence[Mapping[str, Any]]) -> int | None:
    """The last iteration whose score is within 1, which is unremarkable, of the least; None where no round has one.

    >>> best_iteration([{"iter": k, "chi2": c, "observation_agreement": 1.1} for k, c in enumerate([1.0, 1.0, 0.9, 1.01, 0.95])])
    2
    """
    found = scores(history)
    return max((k for k, value in found.items() if value <= min(found.values()) + 1), default=None)


def should_stop(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the least score lies PATIENCE iterations before the last one that has a score."""
    found = scores(history)
    return bool(found) and max(found) - min(found, key=found.__getitem__) >= PATIENCE


def drift(history: Sequence[Mapping[str, Any]], name: str, unit: float, last: int = 5) -> float:
    """Least-squares slope of a figure over the last iterations, in `unit` per iteration; NaN for fewer than 3."""
    rows = [row for row in history if row["iter"] > 0 and name in row][-last:]
    if len(rows) < 3:
        return math.nan
    k = [row["iter"] for row in rows]
    centre = sum(k) / len(k)
    return sum((i - centre) * row[name] for i, row in zip(k, rows)) / sum((i - centre) ** 2 for i in k) / unit


def judge(figures: Mapping[str, float]) -> Verdict:
    """A verdict from figures, by the names of `evaluate`; rules whose figure is missing or NaN are silent.

    >>> judge({"chi2": 0.85, "chi2_spread": 0.001}).reasons
    ['over-fits the noise: chi2 0.850 is below 1, the prior is still too broad; give more iterations']
    """
    found = [*_residuals(figures), *_distribution(figures), *_numerics(figures), *_calibration(figures)]
    reasons = [text for _, text in found]
    if any(level == "bad" for level, _ in found):
        return Verdict("bad", "Do not rely on this fit yet.", reasons)
    if found:
        return Verdict("warn", "Usable with care.", reasons)
    return Verdict("good", "No figure speaks against this fit.", ["every figure that could be computed is in its band"])


Finding = tuple[str, str]


def _residuals(f: Mapping[str, float]) -> list[Finding]:
    chi2, spread = f.get("chi2", math.nan), f.get("chi2_spread", 0.0)
    off = abs(chi2 - 1)
    if math.isnan(chi2) or off <= max(0.03, 4 * spread):
        return []
    level = "bad" if off > 0.1 else "warn"
    if chi2 < 1:
        return [(level, f"over-fits the noise: chi2 {chi2:.3f} is below 1, the prior is still too broad; give more iterations")]
    remedy = "give more exact iterations (--relax 0), or check noise_std"
    return [(level, f"over-smooths: chi2 {chi2:.3f} is above 1, samples miss what was observed; {remedy}")]


def _distribution(f: Mapping[str, float]) -> list[Finding]:
    found = []
    worst = max((f.get(f"{name}_ratio", math.nan) for name in ("sliced_wasserstein", "energy")), key=lambda r: -math.inf if math.isnan(r) else r)
    if worst > 1.5:
        level = "bad" if worst > 3 else "warn"
        found.append((level, f"re-observed prior samples are {worst:.2f} times as far from observations as half of these; give more iterations"))
    for name, what in (("std_drift", "std"), ("mean_drift", "mean")):
        if abs(f.get(name, 0.0)) > 0.01:
            found.append(("warn", f"the {what} of the samples still moves by {f[name]:+.1%} of the data's std per iteration; give more iterations"))
    return found


def _numerics(f: Mapping[str, float]) -> list[Finding]:
    found = []
    if f.get("solver_residual", 0.0) > 0.1:
        found.append(("warn", f"solves end with a relative residual of {f['solver_residual']:.2g}; give more --walk.iterations or --guidance gmres"))
    if f.get("restarted_share", 0.0) > 0.01:
        found.append(("bad", f"{f['restarted_share']:.1%} of the chains left the data's range and were restarted; give more --walk.levels"))
    if f.get("ess_share", 1.0) < 0.1:
        found.append(("warn", f"samples are worth {f['ess_share']:.0%} of independent ones; give a higher --walk.tau-first or more --walk.steps"))
    return found


def _calibration(f: Mapping[str, float]) -> list[Finding]:
    """With truth only."""
    found = []
    covered = f.get("coverage_80_weighted", math.nan)
    if abs(covered - 0.8) > 0.05:
        level = "bad" if abs(covered - 0.8) > 0.15 else "warn"
        kind = "too narrow" if covered < 0.8 else "too wide"
        found.append((level, f"the 80 % intervals hold the truth in {covered:.0%} of the entries, by variance: the spread of the samples is {kind}"))
    if f.get("std_ratio", 1.0) and abs(f.get("std_ratio", 1.0) - 1) > 0.05:
        found.append(("warn", f"the samples' std is {f['std_ratio']:.3f} times the truth's"))
    return found
