"""What the commands do once their arguments are read: phases shown, files written, the next step named."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emdiff.changes import versions
from emdiff.compiled import for_sampling
from emdiff.data import Data
from emdiff.em import Walk
from emdiff.errors import UsageError
from emdiff.evaluate import Evaluation, Task, drifts, evaluate, ratios, write_evaluation
from emdiff.features import feature_module
from emdiff.figures import is_image, save_rows
from emdiff.finished import latest_prior, round_metrics, round_of
from emdiff.observations import open_data, open_truth
from emdiff.plan import resolve_device
from emdiff.posterior import STEADY, check_levels, check_shape, run_bound, run_walk, sample_posterior, settled, steady
from emdiff.prior import Prior, check_any_level, load_prior
from emdiff.reading import read_json, read_yaml
from emdiff.report import write_report
from emdiff.rows import BLOCK, Rows, spans
from emdiff.streams import stream
from emdiff.track import Tracker
from emdiff.written import NewArchive


def bars(span: slice | None = None, count: int = 0) -> Callable[[str, int], Callable[[int], None]]:
    """Phases shown as one bar after the other; where they are of a part of `count` data, the name says which."""
    which = f" of data {span.start + 1} to {span.stop}" if span and span.stop - span.start < count else ""

    def phase(name: str, total: int) -> Callable[[int], None]:
        bar = tqdm(total=total, desc=f"{name}{which}", leave=False, file=sys.stderr)

        def update(done: int) -> None:
            bar.update(done - bar.n)
            if done >= total:
                bar.close()

        return update

    return phase


def reconstruct_command(run: Path, data: Data, samples: int, out: Path, seed: int, device: str, compile: bool = False) -> None:
    """`emdiff reconstruct`."""
    device = resolve_device(device)
    prior = for_sampling(check_any_level(load_prior(latest_prior(run), device), run), device, compile)
    check_shape(prior, data, run)
    generator = stream(seed, "reconstruct", device=device)
    walk, bound, picture = run_walk(run, data, device), run_bound(run), out.with_suffix(".png")
    walk = walk_under(prior, walk, data, run)
    chi2, again = 0.0, 0
    with NewArchive(out) as new:
        shapes = {"samples": (len(data), samples, *data.shape), "mean": (len(data), *data.shape), "std": (len(data), *data.shape)}
        arrays = {name: new.array(name, shape, np.float32) for name, shape in shapes.items()}
        for span in spans(len(data), samples * math.prod(data.shape), len(data), BLOCK):
            block = settled(prior, data.rows(span), walk, generator, bound)
            drawn = sample_posterior(prior, block, walk, samples, generator, bars(span, len(data)), bound)
            stacked, again = drawn.x, again + drawn.restarted
            made = {"samples": stacked, "mean": stacked.mean(1), "std": stacked.std(1)}
            for name, values in made.items():
                arrays[name][span] = values
            chi2 += float(drawn.chi2[:, 0].sum()) / len(data)
            if not span.start:
                rows = {"sample 1": stacked[:12, 0], "sample 2": stacked[:12, 1], "mean": made["mean"], "std": made["std"]}
                save_rows(picture, {"observation": block.obs, **rows} if block.obs.shape[1:] == data.shape else rows)
    print(f"{samples} posterior samples of each of {len(data)} observations, residual chi2 {chi2:.3f} (1 is calibrated) -> {out}, picture {picture}")
    if again:
        print(f"note: {again} chains left the range of the data of the fit and were walked again; are these observations in the same units?")
    print(f"next: look at {picture}; np.load('{out}') holds samples, mean and std in the units of the data")


def evaluate_command(
    run: Path, file: Path, data: Data, count: int | None, truth_file: Path, demanded: bool, samples: int, prior_samples: int,
    oracle: Path | None, features: str, out: Path, seed: int, device: str, wandb: str | None,
) -> None:  # fmt: skip
    """`emdiff evaluate`."""
    device = resolve_device(device)
    prior = check_any_level(load_prior(latest_prior(run), device), run)
    check_shape(prior, data, run)
    rows = evaluated_rows(data, count, samples, seed)
    if count is None and len(rows) < len(data):
        print(f"evaluating a random {len(rows)} of {len(data)} observations: their samples are held in memory; --count takes the first so many")
    truth = read_matching_truth(truth_file, data, rows, demanded)
    total, data = len(data), data.rows(rows)
    if truth is not None and is_image(data.shape):
        feature_module(features, truth[:2].reshape(len(truth[:2]), -1, *data.shape[-2:]))
    best = check_any_level(load_prior(oracle, device), oracle) if oracle else None
    walk, bound = run_walk(run, data, device), run_bound(run)
    rival_walk = None if best is None else walk_under(best, walk, data, oracle)
    walk = walk_under(prior, walk, data, run)
    data = settled(prior, data, walk, stream(seed, "evaluate", "counts", device=device), bound)
    task = Task(data, walk, samples, prior_samples, truth, features, seed, device, bound)
    history, iteration = round_metrics(run), round_of(latest_prior(run))
    found = evaluate(prior, task, bars())
    found = found._replace(figures=found.figures | drifts([row for row in history if row["iter"] <= iteration], prior.scale.std))
    rival = None if best is None else evaluate(best, task._replace(walk=rival_walk), bars()).figures
    about = {"run": run.name, "observations": str(file), "observations_count": len(data), "observations_total": total,
             "samples": samples, "iter": iteration, "seed": seed, "features": features, "versions": versions()}  # fmt: skip
    verdict = write_evaluation(out, about, found, history, rival)
    mode = wandb or str(read_yaml(run / "config.yaml").get("wandb", "off"))
    if out == run / "evaluation":
        write_report(run)
    tracker = Tracker(mode, run, {}, warn=lambda line: print(f"note: {line}"))
    tracker.evaluation(read_json(out / "metrics.json"), found.arrays)
    tracker.artifact(run / "report.html")
    tracker.close()
    print_evaluation(found, rival)
    print(f"verdict: {verdict.text}")
    for reason in verdict.reasons:
        print(f"  - {reason}")
    print(f"figures: {out / 'metrics.json'}   arrays: {out / 'arrays.npz'}")
    print(f"next: open {run / 'report.html'}")


def walk_under(prior: Prior, walk: Walk, data: Data, path: Path) -> Walk:
    """The walk as the network of a prior from `path` takes it; what that changes is said.

    Raises:
        UsageError: if that network does not see what it would be guided by.
    """
    check_levels(prior, data, walk.guidance, path)
    taken = steady(walk, prior)
    if taken != walk:
        print(f"note: {path}: {STEADY}")
    return taken


def evaluated_rows(data: Data, count: int | None, samples: int, seed: int) -> Tensor:
    """Indices of the data to evaluate: the first `count`, or all, or so many random ones as keep all samples together within 4 BLOCK entries."""
    most = max(2, 4 * BLOCK // (samples * math.prod(data.shape)))
    if count is not None or len(data) <= most:
        return torch.arange(len(data) if count is None else count)
    return torch.randperm(len(data), generator=stream(seed, "evaluated rows"))[:most].sort().values


def read_matching_truth(path: Path, data: Data, rows: Tensor, demanded: bool) -> Tensor | None:
    """The truth behind the observations at indices (n,), (n, *S); None where none was demanded and the file has none.

    Raises:
        UsageError: if a demanded truth cannot be read, is too short, or has another shape.
    """
    truth: Rows | None = open_data(path) if demanded else open_truth(path)
    if truth is None:
        return None
    if len(truth) <= int(rows.max()) or tuple(truth.shape[1:]) != data.shape:
        raise UsageError(
            f"{path}: the truth has shape {tuple(truth.shape)}, expected ({int(rows.max()) + 1} or more, {', '.join(map(str, data.shape))}); "
            "give the clean data behind these observations, in their order"
        )
    return truth[rows]


def print_evaluation(found: Evaluation, rival: dict[str, float] | None) -> None:
    """A table: figure, value, floor, ratio to the oracle."""
    compared = ratios(found.figures, rival) if rival else {}
    print(f"{'figure':<26}{'value':>12}{'floor':>12}" + (f"{'/ oracle':>12}" if rival else ""))
    for name, value in found.figures.items():
        floor = f"{found.floors[name]:12.5g}" if name in found.floors else " " * 12
        print(f"{name:<26}{value:12.5g}{floor}" + (f"{compared[name]:12.4g}" if name in compared else ""))
