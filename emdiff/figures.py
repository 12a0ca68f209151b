"""Pictures: grids of samples, rows of reconstructions, figures over iterations. The one file that imports matplotlib.

Images are shown on a fixed grey scale (colour for three channels) whose ends are stated under the picture; other data as curves or points.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from einops import rearrange  # noqa: E402
from torch import Tensor  # noqa: E402

from emdiff.files import write_atomically  # noqa: E402

SHOWN = ("chi2", "sample_std", "observation_agreement", "error")
"""Figures drawn over iterations, where a round has them, with the value that is good."""

GOOD = {"chi2": 1.0, "observation_agreement": 1.0}

LABELS = {
    "chi2": "residual χ² (1 is calibrated)",
    "sample_std": "std of posterior samples",
    "observation_agreement": "re-observed prior samples: distance / floor",
    "error": "error of one sample (truth known)",
}


def is_image(shape: Sequence[int]) -> bool:
    """Whether data of this shape are shown as images."""
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


GAP = 96
"""Grey of the lines between images."""


def tile(x: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, H, W) or (n, C, H, W) in rows of `columns`, with lines of NaN between them, as one (R (H + 1), columns (W + 1)[, 3]) array."""
    if x.ndim == 3:
        x = x[:, None]
    x = np.concatenate([x, np.full((-len(x) % columns, *x.shape[1:]), x.min(), x.dtype)])
    x = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    picture = rearrange(x, "(r k) c h w -> (r h) (k w) c", k=columns)
    return picture[..., 0] if picture.shape[-1] == 1 else picture


def value_range(x: np.ndarray) -> tuple[float, float]:
    """Ends of the grey scale: [0, 1] for data that live there, else the 0.5 and 99.5 percentiles."""
    low, high = np.percentile(x, [0.5, 99.5])
    return (0.0, 1.0) if low > -0.3 and 0.5 < high < 1.3 else (float(low), float(max(high, low + 1e-12)))


def to_uint8(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to 0..255, and NaN to GAP."""
    return np.nan_to_num(np.clip((x - low) / (high - low), 0, 1) * 255, nan=GAP).round().astype(np.uint8)


def save_samples(path: Path, x: Tensor, title: str, columns: int = 8) -> None:
    """Write a PNG of samples (n, *S): a grid of images, or curves, or points."""
    values = x.numpy()
    if is_image(values.shape[1:]):
        (low, high), tiles, margins = value_range(values), tile(values, columns), (0.12, 0.12, 0.12, 0.4)
        figure, axes = plt.subplots(figsize=(6, 5.76 * tiles.shape[0] / tiles.shape[1] + 0.52))
        axes.imshow(to_uint8(tiles, low, high), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"{title}   [{low:.3g}, {high:.3g}]", fontsize=9)
    else:
        figure, axes = plt.subplots(figsize=(6, 4))
        flat = values.reshape(len(values), -1)
        if flat.shape[1] <= 8:
            axes.scatter(flat[:, 0], flat[:, -1], s=4)
        else:
            axes.plot(flat[:16].T, lw=0.7)
        axes.set_title(title, fontsize=9)
        margins = (0.6, 0.2, 0.4, 0.4)
    _write(path, figure, margins)


def save_rows(path: Path, rows: dict[str, Tensor], columns: int = 12) -> None:
    """Write a PNG whose named rows show the same data, image by image: observation, mean, samples, std."""
    label = 0.2 + 0.07 * max(map(len, rows))
    figure, axes = plt.subplots(len(rows), 1, figsize=(columns * 0.7 + label, len(rows) * 0.75 + 0.2), squeeze=False)
    for axis, (name, x) in zip(axes[:, 0], rows.items()):
        values = x[:columns].numpy()
        if is_image(values.shape[1:]):
            low, high = value_range(values)
            axis.imshow(to_uint8(tile(values, columns), low, high), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        else:
            axis.plot(values.reshape(len(values), -1).T, lw=0.7)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    _write(path, figure, (label, 0.1, 0.1, 0.1), 0.08)


def save_progress(path: Path, history: list[dict[str, Any]], shown: Sequence[str] = SHOWN) -> None:
    """Write a PNG of the figures in `shown` over iterations."""
    names = [name for name in shown if any(name in row for row in history)]
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 2.8), squeeze=False)
    for axis, name in zip(axes[0], names):
        rows = [row for row in history if name in row]
        axis.plot([row["iter"] for row in rows], [row[name] for row in rows], marker="o", ms=3)
        if name in GOOD:
            axis.axhline(GOOD[name], color="0.6", lw=0.8, ls="--")
        axis.set_title(LABELS.get(name, name.replace("_", " ")), fontsize=8)
        axis.set_xlabel("EM iteration" if shown is SHOWN else "round", fontsize=8)
    _write(path, figure, (0.65, 0.15, 0.5, 0.35), 0.27)


def _write(path: Path, figure: Any, margins: tuple[float, float, float, float], gap: float = 0.0) -> None:
    """Write a PNG with margins (left, right, bottom, top) in inches and gaps between axes in units of their size. matplotlib can find margins itself,
    by drawing everything twice."""
    (width, height), (left, right, bottom, top) = figure.get_size_inches(), margins
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, gap, gap)
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    finally:
        plt.close(figure)


def save_fields(path: Path, grid: np.ndarray, log_p: np.ndarray, score: np.ndarray) -> None:
    """Write a PNG of a density on the plane, its logarithm and its score.

    Args:
        path: Where to.
        grid: Values of either coordinate (n,).
        log_p: Log-density (n, n), second coordinate first.
        score: Its gradient (n, n, 2).
    """
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
    ends = (grid[0], grid[-1], grid[0], grid[-1])
    axes[0].imshow(np.exp(log_p), origin="lower", extent=ends, cmap="viridis")
    axes[1].imshow(log_p, origin="lower", extent=ends, cmap="viridis", vmin=log_p.max() - 15)
    few = slice(None, None, max(1, len(grid) // 15))
    axes[2].quiver(grid[few], grid[few], score[few, few, 0], score[few, few, 1])
    axes[2].set_aspect("equal")
    for axis, title in zip(axes, ("p(y)", "log p(y)", "gradient of log p(y)")):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("y_1", fontsize=8)
        axis.set_ylabel("y_2", fontsize=8)
    _write(path, figure, (0.6, 0.1, 0.5, 0.35), 0.3)
