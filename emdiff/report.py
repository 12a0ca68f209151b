"""One page that shows a run: figures over iterations, pictures that step with a slider, what an evaluation found, and how it was made.

The page needs nothing else: pictures are data URIs, charts are SVG, and its security policy forbids every request. Whatever comes from
files is escaped by the template; the policy names script and style by their hash, so nothing else can run.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

import emdiff
from emdiff.charts import Chart, nice_ticks, number, padded
from emdiff.errors import UsageError
from emdiff.evidence import calibration, figures, is_number, read_evaluation, reconstructions, residuals
from emdiff.files import write_atomically
from emdiff.finished import round_metrics
from emdiff.meanings import FIRST, meaning, order
from emdiff.reading import read_json, read_text
from emdiff.strips import file_uri

BUDGET = 9_000_000
"""Bytes of pictures in a page; of a run with more, some iterations are left out of the galleries."""

GALLERIES = {
    "samples": ("Posterior samples", "One sample x | obs for each of the first observations."),
    "prior": ("Prior samples", "New draws from the learned p(x). The start has no prior yet."),
    "rows": ("Reconstructions", "The same data through the iterations: truth (where known), observation, one sample."),
}

LEVELS = {"good": ("✓", "Good"), "warn": ("!", "With care"), "bad": ("✗", "Not to be trusted"), "none": ("?", "Not evaluated")}

Rounds = list[dict[str, Any]]


class Frame(NamedTuple):
    """The picture of iteration k in a gallery."""

    k: int
    uri: str


class Gallery(NamedTuple):
    """Pictures of one kind through the iterations."""

    name: str
    title: str
    about: str
    frames: list[Frame]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run as far as it has come.

    Args:
        run: Run folder of `emdiff fit`, in which at least the start is finished.
        out: The file; report.html in the run folder by default.

    Returns:
        The file.

    Raises:
        UsageError: if the run is missing or has no finished round, or the file cannot be written.
    """
    rounds = round_metrics(run)
    page = render(page_of(run, rounds)).encode("utf-8", "replace")
    out = out or run / "report.html"
    write_atomically(out, lambda temporary: temporary.write_bytes(page))
    return out


def page_of(run: Path, rounds: Rounds) -> dict[str, Any]:
    """All that the template shows."""
    galleries, thinned = gallery_frames(run, rounds)
    evaluation, about = read_evaluation(run), _json(run / "about.json")
    first, more, constant = history(rounds)
    evidence = {} if evaluation is None else {"calibration": calibration(evaluation), "blocks": reconstructions(evaluation.arrays)}
    rows, chart = ([], None) if evaluation is None else residuals(evaluation.arrays)
    metrics = {} if evaluation is None else evaluation.metrics
    return {
        "name": run.resolve().name,
        "last": rounds[-1]["iter"],
        "rounds": rounds,
        "names": order({name for row in rounds for name, value in row.items() if is_number(value) and name != "iter"}),
        "galleries": galleries,
        "thinned": thinned,
        "charts": first,
        "more": more,
        "constant": constant,
        "relaxed": any(row.get("over_relaxed") for row in rounds),
        "verdict": verdict(metrics),
        "evaluated": metrics,
        "notes": [] if evaluation is None else evaluation.notes,
        "tables": figure_tables(metrics),
        "residual_rows": rows,
        "residual_chart": chart,
        **({"calibration": [], "blocks": []} | evidence),
        "config": _text(run / "config.yaml"),
        "about": about,
        "seconds": sum(row["seconds"] for row in rounds if is_number(row.get("seconds"))),
        "finished": _when(run, rounds[-1]["iter"]),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": emdiff.__version__,
    }


def render(page: dict[str, Any]) -> str:
    """The page as HTML; every value is escaped."""
    script, style = (_templates().loader.get_source(_templates(), f"report.{kind}")[0] for kind in ("js", "css"))
    policy = f"default-src 'none'; img-src data:; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _templates().get_template("report.html").render(page, script=Markup(script), style=Markup(style), policy=policy)
    finally:
        gc.collect(0)  # the template's macros and their context refer to each other and hold all pictures, 12 MB: still young, so that this is quick
        if collecting:
            gc.enable()


@functools.cache
def _templates() -> jinja2.Environment:
    """The templates, compiled once for all pages of a process."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emdiff", "templates"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": lambda v: number(v) if is_number(v) else str(v), "duration": duration}
    environment.globals |= {"meaning": meaning, "is_number": is_number, "levels": LEVELS}
    return environment


def history(rounds: Rounds) -> tuple[list[Chart], list[Chart], dict[str, float]]:
    """A chart of every figure over iterations: the first ones, the others, and the figures that never changed."""
    values = {name: [row[name] for row in rounds if is_number(row.get(name))] for name in order({k for row in rounds for k in row})}
    names = [name for name, seen in values.items() if seen and name not in ("iter", "bound") and not name.startswith("start_")]
    constant = {name: values[name][0] for name in names if name not in FIRST and len(set(values[name])) == 1}
    charts = {name: progress(name, rounds) for name in names if name not in constant}
    return [charts[n] for n in FIRST if n in charts], [chart for n, chart in charts.items() if n not in FIRST], constant


def progress(name: str, rounds: Rounds) -> Chart:
    """One figure over iterations; its value to reach as a line."""
    rows = [row for row in rounds if is_number(row.get(name))]
    what, last = meaning(name), max(rounds[-1]["iter"], 1)
    wanted = [] if what.target is None else [what.target]
    ends = padded([row[name] for row in rows] + wanted, 0.12)
    chart = Chart(what.label, (-0.03 * last, 1.03 * last), ends, "EM iteration", what.good and f"Good: {what.good}.")
    chart.x_ticks = [v for v in nice_ticks(0, last) if v == int(v)]
    if what.target is not None:
        chart.line("target", [(chart.x[0], what.target), (chart.x[1], what.target)])
    chart.line("line", [(row["iter"], row[name]) for row in rows])
    for row in rows:
        relaxed = bool(row.get("over_relaxed"))
        text = f"iteration {row['iter']}: {number(row[name])}" + (", over-relaxed" if relaxed else "")
        chart.dot(row["iter"], row[name], text, "hollow" if relaxed else "dot", row["iter"])
    return chart


def gallery_frames(run: Path, rounds: Rounds) -> tuple[list[Gallery], bool]:
    """Galleries of the pictures in the run folder, and whether iterations had to be left out to keep the page small."""
    paths = {(name, row["iter"]): run / "figures" / f"{name}_{row['iter']:03d}.png" for name in GALLERIES for row in rounds}
    size = sum(path.stat().st_size for path in paths.values() if path.is_file())
    most = max(2, int(len(rounds) * min(1.0, BUDGET / max(size, 1))))
    kept = {rounds[i]["iter"] for i in np.linspace(0, len(rounds) - 1, min(most, len(rounds))).round().astype(int)}
    galleries = []
    for name, (title, about) in GALLERIES.items():
        found = [(k, file_uri(path)) for (which, k), path in paths.items() if which == name and k in kept]
        frames = [Frame(k, uri) for k, uri in found if uri is not None]
        galleries += [Gallery(name, title, about, frames)] if frames else []
    return galleries, len(kept) < len(rounds)


def verdict(metrics: dict[str, Any]) -> dict[str, Any]:
    """Level, text and reasons of an evaluation, whatever of it is there."""
    found = metrics.get("verdict")
    found = found if isinstance(found, dict) else {}
    reasons = found.get("reasons", [])
    level = found.get("level")
    return {
        "level": level if level in LEVELS else "none",
        "text": str(found.get("text") or ""),
        "reasons": [str(reason) for reason in (reasons if isinstance(reasons, list) else [reasons])],
    }


def figure_tables(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Tables of figures without and with the truth: rows of name, value, floor, ratio to the oracle."""
    values, floors, oracle = (figures(metrics, name) for name in ("figures", "floors", "oracle"))
    tables = []
    for title, truth in {"Without the truth": False, "Against the truth": True}.items():
        rows = [(name, values[name], floors.get(name), oracle.get(name)) for name in order(set(values)) if meaning(name).truth == truth]
        shown = {"floors": any(row[2] is not None for row in rows), "oracle": any(row[3] is not None for row in rows)}
        tables += [{"title": title, "rows": rows, **shown}] if rows else []
    return tables


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(59.6), duration(3700)
    ('60 s', '1 h 02 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _hash(text: str) -> str:
    """How a security policy names a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _when(run: Path, k: int) -> str:
    """When iteration k was finished."""
    path = run / (f"round_{k:03d}" if k else "start") / "metrics.json"
    return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _text(path: Path) -> str:
    """A text file, or what kept it from being read."""
    try:
        return "" if path.is_symlink() else read_text(path)
    except UsageError as error:
        return str(error)


def _json(path: Path) -> dict[str, Any]:
    """An object of a JSON file, or what kept it from being read."""
    try:
        return read_json(path)
    except UsageError as error:
        return {"note": str(error)}
