r"""What an evaluation says, as charts and pictures: RUN/evaluation/metrics.json and arrays.npz, of which any part may be missing.

Bands:
    ranks     n independent data over L + 1 bins: the share of a bin is Binomial(n, 1 / (L + 1)) / n; the band holds 95 % of it. Ranks of several
              entries per datum are counted together; the band is for entries that agree, so it is wide rather than narrow where they do not.
    TARP      n data, of which a share c lies in regions of level c: Binomial(n, c) / n, likewise.
    residuals standardised residuals have variance 1, so their sum over the n data that saw an entry, over n^(1/2), is a z-score; the band is two.

Sources: Validating Bayesian inference algorithms with simulation-based calibration (Talts et al. 2018); Sampling-based accuracy testing of
posterior estimators for general inference (Lemos et al. 2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binom

from emdiff.archive import array_names, load_array, open_archive
from emdiff.charts import Chart, number, padded
from emdiff.errors import UsageError
from emdiff.reading import read_json
from emdiff.strips import RESIDUAL, SPREAD, Strip, as_images, shown_range, strip

Arrays = dict[str, np.ndarray]

PER_BLOCK = 8
"""Data side by side."""

POINTS = 30
"""Longest vector whose entries are drawn as dots as well."""


class Evaluation(NamedTuple):
    """What was found: metrics as they are, arrays by name, and what could not be read."""

    metrics: dict[str, Any]
    arrays: Arrays
    notes: list[str]


class Row(NamedTuple):
    """A labelled picture: residuals of all data, or one row of a block of reconstructions."""

    label: str
    picture: Strip


class Block(NamedTuple):
    """Reconstructions of a few data: rows of pictures, or one chart for each where data are vectors."""

    title: str
    rows: list[Row]
    charts: list[Chart]


def read_evaluation(run: Path) -> Evaluation | None:
    """The evaluation of a run, or None where there is none; files that cannot be read are named in the notes."""
    folder, notes = run / "evaluation", []
    metrics: Any = {}
    arrays: Arrays = {}
    if not (folder / "metrics.json").is_file() and not (folder / "arrays.npz").is_file():
        return None
    try:
        metrics = read_json(folder / "metrics.json")
    except UsageError as error:
        notes.append(f"{folder / 'metrics.json'} cannot be read ({error}); run `emdiff evaluate` again")
    try:
        with open_archive(folder / "arrays.npz", (".npz",)) as file:
            arrays = {name: load_array(folder / "arrays.npz", file, name) for name in array_names(file)}
    except UsageError as error:
        notes.append(f"{folder / 'arrays.npz'} cannot be read ({error}); run `emdiff evaluate` again")
    return Evaluation(metrics, arrays, notes)


def figures(metrics: dict[str, Any], name: str = "figures") -> dict[str, float]:
    """The finite numbers of a part of the metrics."""
    part = metrics.get(name)
    return {str(k): v for k, v in part.items() if is_number(v)} if isinstance(part, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300  # which NaN is not


def calibration(evaluation: Evaluation) -> list[Chart]:
    """Charts of ranks, coverage, TARP and χ² per datum, as far as there are arrays."""
    found, arrays = figures(evaluation.metrics), evaluation.arrays
    coverage = [(float(name[9:]) / 100, found[name]) for name in ("coverage_50", "coverage_80", "coverage_95") if name in found]
    pairs = _pairs(arrays, "coverage_levels", "coverage") or coverage
    tarp, count = _pairs(arrays, "tarp_levels", "tarp_coverage"), evaluation.metrics.get("observations_count")
    charts = [
        rank_chart(_vector(arrays, "rank_counts"), count),
        diagonal_chart(
            "Coverage against nominal level", "nominal level of the interval", pairs, "On the diagonal: calibrated. Below: too sure. Above: too wide."
        ),
        diagonal_chart("TARP: expected coverage", "credibility level", tarp, "On the diagonal: calibrated.", count),
        chi2_chart(_vector(arrays, "chi2")),
    ]
    return [chart for chart in charts if chart is not None]


def rank_chart(counts: np.ndarray, data: Any = None) -> Chart | None:
    """Histogram of ranks of the truth among samples, counts (L + 1,), with the band of the uniform law for `data` independent data."""
    if len(counts) < 2 or counts.sum() <= 0:
        return None
    total, bins = int(counts.sum()), len(counts)
    independent = min(int(data), total) if is_number(data) and data >= 1 else total
    low, high = binom.ppf([0.025, 0.975], independent, 1 / bins) * total / independent
    note = f"Band: 95 % of each count for {independent} independent data and uniform ranks. A hump: too wide. A bowl: too sure."
    ends = (-0.5, bins - 0.5)
    chart = Chart("Ranks of the truth among samples", ends, (0.0, 1.1 * max(counts.max(), high)), "rank", note)
    chart.x_ticks = sorted({0.0, float(bins // 2), float(bins - 1)})
    for i, count in enumerate(counts):
        chart.bar(i - 0.5, i + 0.5, count, f"rank {i}: {int(count)}, expected {total / bins:.4g}")
    chart.line("law", [(ends[0], low), (ends[1], low), (ends[1], high), (ends[0], high)])
    return chart.line("target", [(x, total / bins) for x in ends])


def diagonal_chart(title: str, x_label: str, pairs: list[tuple[float, float]], note: str, count: Any = None) -> Chart | None:
    """Coverage over level, pairs (level, coverage); with a count of independent data, the band of a calibrated posterior."""
    if not pairs:
        return None
    chart = Chart(title, (0.0, 1.0), (0.0, 1.0), x_label, note)
    if is_number(count) and count >= 1:
        levels = np.linspace(0, 1, 41)
        chart.note += f" Band: 95 % of {int(count)} independent data."
        chart.band(levels, binom.ppf(0.025, int(count), levels) / int(count), binom.ppf(0.975, int(count), levels) / int(count))
    chart.line("diagonal", [(0, 0), (1, 1)]).line("line", pairs)
    if len(pairs) <= POINTS:
        for level, value in pairs:
            chart.dot(level, value, f"level {number(level)}: {number(value)} covered")
    return chart


def chi2_chart(chi2: np.ndarray, bins: int = 24) -> Chart | None:
    """Histogram of χ² per datum, (N,)."""
    if len(chi2) < 2:
        return None
    ends = padded([*np.percentile(chi2, [0.5, 99.5]), 1.0])
    counts, edges = np.histogram(np.clip(chi2, *ends), bins, ends)
    note = f"Mean {number(float(chi2.mean()))}, std {number(float(chi2.std()))}. The line is 1. Far right: data that the model cannot explain."
    chart = Chart("Residual χ² of each datum", ends, (0.0, 1.1 * counts.max()), "χ²", note)
    for a, b, count in zip(edges, edges[1:], counts):
        chart.bar(a, b, count, f"{number(float(a))} to {number(float(b))}: {count} data")
    return chart.line("target", [(1, 0), (1, 1.1 * counts.max())])


def residuals(arrays: Arrays) -> tuple[list[Row], Chart | None]:
    """Mean (as z-score) and root mean square over data of residuals (n, *O): two pictures, or a chart of the mean where O is no image."""
    residual = seen_residual(arrays)
    if residual is None:
        return [], None
    n = np.isfinite(residual).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(n > 0, np.nansum(residual, 0) / np.sqrt(n), np.nan)
        rms = np.where(n > 0, np.sqrt(np.nansum(residual**2, 0) / n), np.nan)
    if as_images(residual):
        return [
            Row(f"mean over {len(residual)} data, in its standard errors", strip(z[None], (-4.0, 4.0), RESIDUAL)),
            Row(f"root mean square over {len(residual)} data", strip(rms[None], (0.0, 2.0), RESIDUAL)),
        ], None
    flat = z.reshape(-1)
    seen = flat[np.isfinite(flat)]
    if not seen.size:
        return [], None
    last = max(len(flat) - 1, 1)
    chart = Chart("Mean residual by entry", (0.0, float(last)), padded([*seen, 3.0, -3.0]), "entry of the observation")
    chart.note = f"Mean over {len(residual)} data, in its standard errors; the band holds 95 % of the entries if the model is right."
    chart.band([0, last], [-2, -2], [2, 2]).line("target", [(0, 0), (last, 0)])
    return [], chart.line("line", [(i, v) for i, v in enumerate(flat) if np.isfinite(v)])


def seen_residual(arrays: Arrays) -> np.ndarray | None:
    """Standardised residuals (n, *O), NaN where nothing was observed, which is stored as 0 exactly."""
    residual = arrays.get("residual")
    if residual is None or not len(residual) or residual.ndim < 2:
        return None
    return np.where(residual == 0, np.nan, residual)


def reconstructions(arrays: Arrays) -> list[Block]:
    """Blocks of the first data and of those with the largest χ²: observation, truth, sample, mean, std and residual."""
    mean = arrays.get("mean")
    if mean is None or mean.ndim < 2 or not len(mean):
        return []
    chosen = {f"The first {min(PER_BLOCK, len(mean))} data": np.arange(min(PER_BLOCK, len(mean)))}
    chi2 = _vector(arrays, "chi2")[: len(mean)]
    if len(chi2) > PER_BLOCK:
        chosen[f"The {PER_BLOCK} with the largest χ² of the first {len(chi2)}"] = np.argsort(-chi2)[:PER_BLOCK]
    if as_images(mean):
        return [Block(title, image_rows(arrays, index), []) for title, index in chosen.items()]
    return [Block(title, [], [profile(arrays, int(i)) for i in index]) for title, index in chosen.items()]


def image_rows(arrays: Arrays, index: np.ndarray) -> list[Row]:
    """Rows of pictures of the data at `index`."""
    residual = seen_residual(arrays)
    arrays = arrays if residual is None else {**arrays, "residual": residual}
    grey = shown_range(arrays["truth" if as_images(arrays.get("truth")) else "mean"])
    std = arrays.get("std")
    spread = float(np.nanpercentile(std, 99.5)) if as_images(std) else 1.0
    scales = {
        "obs": ("observation", shown_range(arrays["obs"]) if as_images(arrays.get("obs")) else grey, None),
        "truth": ("truth", grey, None),
        "sample": ("one sample", grey, None),
        "mean": ("mean", grey, None),
        "std": ("std", (0.0, max(spread, 1e-12)), SPREAD),
        "residual": ("residual / noise", (-3.0, 3.0), RESIDUAL),
    }
    there = [name for name in scales if as_images(arrays.get(name)) and len(arrays[name]) > index.max()]
    return [Row(scales[name][0], strip(arrays[name][index], *scales[name][1:])) for name in there]


def profile(arrays: Arrays, i: int) -> Chart:
    """Mean with a band of two std over the entries of datum i, its truth and its observation where they have the same entries."""
    mean = arrays["mean"][i].reshape(-1)
    curves = {name: arrays[name][i].reshape(-1) for name in ("truth", "obs") if name in arrays and len(arrays[name]) > i}
    curves = {name: values for name, values in curves.items() if values.shape == mean.shape}
    std = arrays["std"][i].reshape(-1) if "std" in arrays and arrays["std"].shape == arrays["mean"].shape else np.zeros_like(mean)
    everything = np.concatenate([mean - 2 * std, mean + 2 * std, *curves.values()])
    ends = padded(everything[np.isfinite(everything)]) if np.isfinite(everything).any() else (0.0, 1.0)
    chart = Chart(f"datum {i}", padded([0.0, len(mean) - 1.0], 0.04), ends, "entry")
    chart.band(range(len(mean)), mean - 2 * std, mean + 2 * std)
    for name, values in {**curves, "mean": mean}.items():
        points = [(j, v) for j, v in enumerate(values) if np.isfinite(v)]
        chart.line(name, points)
        for j, v in points if len(values) <= POINTS else []:
            chart.dot(j, v, f"{name}, entry {j}: {number(float(v))}", f"dot {name}")
    return chart


def _vector(arrays: Arrays, name: str) -> np.ndarray:
    """The finite entries of an array, as (n,); empty where there is none."""
    values = np.asarray(arrays.get(name, ()), float).reshape(-1)
    return values[np.isfinite(values)]


def _pairs(arrays: Arrays, x: str, y: str) -> list[tuple[float, float]]:
    a, b = _vector(arrays, x), _vector(arrays, y)
    return [(float(u), float(v)) for u, v in zip(a, b)] if len(a) == len(b) else []
