r"""Charts as plain geometry, for a template to draw as SVG: no library, no style, only coordinates and words.

A chart maps data (x, y) linearly onto a box of WIDTH x HEIGHT minus margins, y upwards:
    X = LEFT + (x - x0) / (x1 - x0) (WIDTH - LEFT - RIGHT),   Y = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) (HEIGHT - TOP - BOTTOM).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 58, 12, 12, 40

Pair = tuple[float, float]


@dataclass
class Mark:
    """One shape: its kind is a class of the style sheet, `points` are SVG coordinates, `text` is shown on hover.

    Attributes:
        kind: "line", "target", "diagonal", "band", "bar", "dot", "hollow", ...
        points: "x,y x,y ..." for lines and bands; of dots and bars only `box` is set.
        box: (x, y) of a dot, (x, y, width, height) of a bar.
        text: What hovering says.
        k: EM iteration, for what follows the slider.
    """

    kind: str
    points: str = ""
    box: tuple[float, ...] = ()
    text: str = ""
    k: int | None = None


@dataclass
class Chart:
    """Axes and what is drawn on them.

    Args:
        title: Said above the chart, and by screen readers.
        x: Ends of the x axis.
        y: Ends of the y axis.
        x_label: Below the x axis.
        note: One line below the chart.

    >>> chart = Chart("t", (0.0, 1.0), (0.0, 1.0))
    >>> chart.line("diagonal", [(0, 0), (1, 1)]).marks[0].points
    '58.0,180.0 348.0,12.0'
    """

    title: str
    x: Pair
    y: Pair
    x_label: str = ""
    note: str = ""
    marks: list[Mark] = field(default_factory=list)
    x_ticks: list[float] | None = None

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM

    def at(self, x: float, y: float) -> Pair:
        """SVG coordinates of data (x, y)."""
        return (
            LEFT + (x - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM),
        )

    def line(self, kind: str, points: Iterable[Sequence[float]]) -> Chart:
        """Add a line, or the outline of a band, through data points (n, 2)."""
        places = [self.at(*point) for point in points]
        self.marks.append(Mark(kind, " ".join(f"{x:.1f},{y:.1f}" for x, y in places)))
        return self

    def band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> Chart:
        """Add a band between low and high, (n,) each, cut to the axes."""
        cut = lambda v: min(max(float(v), self.y[0]), self.y[1])
        return self.line("band", [(a, cut(b)) for a, b in zip(x, low)] + [(a, cut(b)) for a, b in reversed(list(zip(x, high)))])

    def dot(self, x: float, y: float, text: str, kind: str = "dot", k: int | None = None) -> Chart:
        """Add a dot that says `text`."""
        self.marks.append(Mark(kind, box=self.at(x, y), text=text, k=k))
        return self

    def bar(self, x0: float, x1: float, height: float, text: str) -> Chart:
        """Add a bar from the x axis up."""
        (a, top), (b, bottom) = self.at(x0, height), self.at(x1, self.y[0])
        self.marks.append(Mark("bar", box=(a + 0.5, top, max(b - a - 1, 0.5), bottom - top), text=text))
        return self

    def ticks_x(self) -> list[tuple[float, str]]:
        """Places and words of the ticks on the x axis."""
        values = self.x_ticks if self.x_ticks is not None else nice_ticks(*self.x)
        return [(self.at(v, self.y[0])[0], word) for v, word in zip(values, words(values))]

    def ticks_y(self) -> list[tuple[float, str]]:
        """Places and words of the ticks on the y axis."""
        values = nice_ticks(*self.y)
        return [(self.at(self.x[0], v)[1], word) for v, word in zip(values, words(values))]


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about as many as asked.

    >>> nice_ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if raw <= m * power * 1.3)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def words(values: Sequence[float]) -> list[str]:
    """Tick labels with as many digits as tell neighbours apart."""
    if not values:
        return []
    step = min((b - a for a, b in zip(values, values[1:])), default=abs(values[0]) or 1.0)
    size = max(map(abs, values))
    if size >= 1e5 or 0 < size < 1e-2:
        return [f"{v:.{max(0, math.ceil(math.log10(size / step) - 1e-9))}e}".replace("e-0", "e-").replace("e+0", "e") if v else "0" for v in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:.{digits}f}" for v in values]


def padded(values: Sequence[float], share: float = 0.08) -> Pair:
    """Ends of an axis that holds the values with some room; values that no tick label tells apart are taken as equal.

    >>> padded([1.0, 1.0 - 1e-12])
    (0.899999999999, 1.1)
    """
    low, high = min(values), max(values)
    apart = high - low > 1e-9 * max(abs(low), abs(high))
    room = share * (high - low) if apart else 0.1 * abs(high) or 1.0
    return low - room, high + room


def number(value: float) -> str:
    """A figure in four digits."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
