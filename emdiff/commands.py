"""What the commands do once their arguments are read: phases shown, files written, the next step named."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emdiff import interrupt
from emdiff.changes import fork, versions
from emdiff.compiled import for_sampling
from emdiff.console import Bars
from emdiff.data import Data
from emdiff.errors import UsageError
from emdiff.evaluate import Evaluation, Task, drifts, evaluate, ratios, write_evaluation
from emdiff.features import feature_module
from emdiff.figures import is_image, save_progress, save_rows, save_samples
from emdiff.fit import run_fit
from emdiff.identify import blind_spots
from emdiff.metrics import residual_chi2, truth_figures
from emdiff.noise import depends_on_signal, first_noise, with_counts, with_level
from emdiff.observations import open_data, open_observations, open_truth
from emdiff.plan import Config, default_name, make_plan, print_plan, read_init_prior, resolve_device, resolved_config
from emdiff.posterior import check_shape, run_walk, sample_posterior, settled
from emdiff.prior import check_any_level, load_prior
from emdiff.reading import read_json, read_yaml
from emdiff.report import write_report
from emdiff.rows import BLOCK, Rows, spans
from emdiff.runs import Run, latest_prior, round_metrics, round_of
from emdiff.scale import estimate_scale
from emdiff.streams import stream
from emdiff.track import Tracker
from emdiff.turns import rows_of
from emdiff.written import NewArchive


class Console(Bars):
    """Progress bars that name the phase and the time left, and a line per round; pictures and W&B at the end of each round.

    Args:
        run: The run folder.
        tracker: W&B.
        fixed: What stands above the samples in pictures: the truth, if known, and observations of the shape of x, (n, *S) each.
        keep: Rounds whose priors, samples and pictures are kept; None for all.
    """

    def __init__(self, run: Run, tracker: Tracker, fixed: dict[str, Tensor], keep: int | None = None) -> None:
        super().__init__(run.lock.renew)
        self.run, self.tracker, self.fixed, self.keep = run, tracker, fixed, keep

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """Say how the round went, and draw it."""
        self.close()
        names = {"chi2": "chi2", "sample_std": "std", "observation_agreement": "agreement", "error": "error", "noise_std": "noise"}
        names["restarted"] = "restarted"
        figures = "  ".join(f"{label} {metrics[name]:.4g}" for name, label in names.items() if name in metrics)
        print(f"{'start   ' if not k else f'round {k:3d}'}  {figures}  ({metrics['seconds']:.0f} s)", flush=True)
        folder = self.run.path / "figures"
        for name, x in pictures.items():
            save_samples(folder / f"{name}_{k:03d}.png", x, f"{name}, iteration {k}")
        rows = folder / f"rows_{k:03d}.png"
        save_rows(rows, {**self.fixed, "sample": pictures["samples"][:12]})
        history = [self.run.metrics(j) for j in range(k + 1)]
        save_progress(folder / "progress.png", history)
        self.tracker.log(metrics, {**pictures, "rows": rows})
        if self.keep is not None:
            self.run.prune(self.keep)
        write_report(self.run.path)


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


def fit_command(config: Config, defaults: Config, forked: str | None = None) -> None:
    """`emdiff fit`; defaults are the settings of a user who says nothing, forked the folder of a fork, if one is wanted."""
    path, device = Path(config["observations"]), resolve_device(config["device"])
    shape = tuple(config["shape"]) if config["shape"] else None
    unknown = config["noise_std"] == "auto"
    data = open_observations(path, config["observer"], 1.0 if unknown else config["noise_std"], shape, config["uint8_range"])
    if unknown:
        data = with_level(data, first_noise(data))
    elif depends_on_signal(data):
        data = with_counts(data, None)
    initial = config["init_prior"]
    scale = read_init_prior(Path(initial), data).scale if initial else estimate_scale(data, stream(config["seed"], "scale"))
    plan, reasons = make_plan(config, data, scale, device)
    resolved = resolved_config(config, plan)
    out = Path(config["out"]) if config["out"] else Path("runs") / default_name(path, resolved)
    if forked is not None:
        fork(out, Path(forked), resolved, path, (len(data), *data.shape), config, defaults)
        out, resolved = Path(forked), {**resolved, "out": forked}
    needed = 4 * (plan.iters + 6) * len(data) * math.prod(data.shape)
    with Run(out, resolved, path, needed, config, defaults) as run:
        interrupt.at_the_end(run.close)
        interrupt.check()
        print_plan(data, scale, plan, reasons, out, run.finished())
        for line in blind_spots(data, stream(config["seed"], "blind spots")):
            print(f"warning: {line}", flush=True)
        tracker = Tracker(config["wandb"], out, resolved, warn=lambda line: print(f"note: {line}"))
        truth, obs = open_truth(path), data.rows(slice(0, 12)).obs
        fixed = {} if truth is None else {"truth": truth[:12]}
        console = Console(run, tracker, fixed | ({"observation": obs} if obs.shape[1:] == data.shape else {}), config["keep"])
        try:
            judge = (lambda x, rows: {}) if truth is None else (lambda x, rows: truth_figures(x, rows_of(truth, rows)))
            run_fit(data, scale, plan, run, console, judge)
            if _stale(out / "report.html", run.round_path(run.finished()) / "metrics.json"):
                write_report(out)
        finally:
            console.close()
            tracker.artifact(out / "report.html")
            tracker.close()
    print(f"prior: {latest_prior(out)}   report: {out / 'report.html'}   pictures: {out / 'figures'}   figures: {out / 'metrics.jsonl'}")
    print(f"next: emdiff evaluate --run {out} --observations {path}; emdiff sample --run {out} --out samples.npz")


def _stale(page: Path, source: Path) -> bool:
    """Whether a page is missing or older than what it shows: the process that wrote it was stopped."""
    return not page.is_file() or page.stat().st_mtime < source.stat().st_mtime


def reconstruct_command(run: Path, data: Data, samples: int, out: Path, seed: int, device: str, compile: bool = False) -> None:
    """`emdiff reconstruct`."""
    device = resolve_device(device)
    prior = for_sampling(check_any_level(load_prior(latest_prior(run), device), run), device, compile)
    check_shape(prior, data, run)
    generator = stream(seed, "reconstruct", device=device)
    walk, chi2, picture = run_walk(run, data, device), 0.0, out.with_suffix(".png")
    with NewArchive(out) as new:
        shapes = {"samples": (len(data), samples, *data.shape), "mean": (len(data), *data.shape), "std": (len(data), *data.shape)}
        arrays = {name: new.array(name, shape, np.float32) for name, shape in shapes.items()}
        for span in spans(len(data), samples * math.prod(data.shape), len(data), BLOCK):
            block = settled(prior, data.rows(span), walk, generator)
            stacked = sample_posterior(prior, block, walk, samples, generator, bars(span, len(data))).x
            made = {"samples": stacked, "mean": stacked.mean(1), "std": stacked.std(1)}
            for name, values in made.items():
                arrays[name][span] = values
            chi2 += float(residual_chi2(block, stacked[:, 0]).sum()) / len(data)
            if not span.start:
                rows = {"sample 1": stacked[:12, 0], "sample 2": stacked[:12, 1], "mean": made["mean"], "std": made["std"]}
                save_rows(picture, {"observation": block.obs, **rows} if block.obs.shape[1:] == data.shape else rows)
    print(f"{samples} posterior samples of each of {len(data)} observations, residual chi2 {chi2:.3f} (1 is calibrated) -> {out}, picture {picture}")
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
    data = settled(prior, data, run_walk(run, data, device), stream(seed, "evaluate", "counts", device=device))
    task = Task(data, run_walk(run, data, device), samples, prior_samples, truth, features, seed, device)
    history, iteration = round_metrics(run), round_of(latest_prior(run))
    found = evaluate(prior, task, bars())
    found = found._replace(figures=found.figures | drifts([row for row in history if row["iter"] <= iteration], prior.scale.std))
    rival = evaluate(best, task, bars()).figures if best else None
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
