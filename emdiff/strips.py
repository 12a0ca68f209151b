r"""Arrays as pictures within a page: rows of images in grey, or in colours that the colour-blind can tell apart, as data URIs.

Colours are interpolated between a few anchors: viridis for spreads (dark is 0), blue - white - red for residuals (white is 0).
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from emdiff.figures import GAP, is_image, tile, to_uint8, value_range

SPREAD = ("440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725")
RESIDUAL = ("2166ac", "67a9cf", "d1e5f0", "f7f7f7", "fddbc7", "ef8a62", "b2182b")


class Strip(NamedTuple):
    """One picture: its data URI, its size in pixels, and the ends of its scale in words."""

    uri: str
    width: int
    height: int
    scale: str


def strip(x: np.ndarray, ends: tuple[float, float], colours: tuple[str, ...] | None = None, columns: int | None = None) -> Strip:
    """Images side by side.

    Args:
        x: Images (n, H, W), (n, 1, H, W) or (n, 3, H, W); NaN is shown in grey.
        ends: What is black and what is white, or the first and the last colour.
        colours: Anchors of a colour scale; channels are then averaged. Without: grey, or true colours.
        columns: Images per row; all in one row by default.

    Returns:
        The picture.
    """
    if colours is not None and x.ndim == 4:
        x = x.mean(1)
    picture = tile(np.asarray(x, np.float32), columns or len(x))[:-1, :-1]
    values = to_uint8(picture, *ends)
    if colours is not None:
        values = palette(colours)[values]
        values[np.isnan(picture)] = GAP
    return Strip(png(values), values.shape[1], values.shape[0], f"{ends[0]:.3g} to {ends[1]:.3g}")


def palette(anchors: tuple[str, ...]) -> np.ndarray:
    """256 colours (256, 3), uint8, through anchors in hex.

    >>> palette(("000000", "ffffff"))[128].tolist()
    [128, 128, 128]
    """
    rgb = np.array([[int(a[i : i + 2], 16) for i in (0, 2, 4)] for a in anchors], float)
    at = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(at, np.arange(len(anchors)), rgb[:, c]) for c in range(3)], 1).round().astype(np.uint8)


def png(values: np.ndarray) -> str:
    """A data URI of grey (H, W) or colours (H, W, 3), uint8."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    """A data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def file_uri(path: Path) -> str | None:
    """A data URI of a PNG file; None where there is none: a link or another file under its name is not shown."""
    if path.is_symlink() or not path.is_file():
        return None
    content = path.read_bytes()
    return data_uri(content) if content.startswith(b"\x89PNG") else None


def shown_range(x: np.ndarray) -> tuple[float, float]:
    """Ends of the grey scale of x, NaN aside."""
    seen = x[np.isfinite(x)]
    return value_range(seen) if seen.size else (0.0, 1.0)


def as_images(x: np.ndarray | None) -> bool:
    """Whether there are data (n, *S) and they are images."""
    return x is not None and len(x) > 0 and is_image(x.shape[1:])
