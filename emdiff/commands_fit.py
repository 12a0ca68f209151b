"""What `emdiff fit` does once its arguments are read: plan, lock, fit, say; with several processes the first of them alone does most of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emdiff import interrupt
from emdiff.ahead import goes_on
from emdiff.changes import fork
from emdiff.console import Bars
from emdiff.data import Data
from emdiff.figures import save_progress, save_rows, save_samples
from emdiff.finished import latest_prior
from emdiff.fit import run_fit
from emdiff.folder import RunFolder
from emdiff.identify import blind_spots
from emdiff.metrics import truth_figures
from emdiff.noise import depends_on_signal, first_noise, with_counts, with_level
from emdiff.observations import open_observations, open_truth
from emdiff.outline import Plan
from emdiff.plan import Config, check_shares, default_name, make_plan, print_plan, read_init_prior, resolve_device, resolved_config
from emdiff.processes import Team, joined
from emdiff.report import write_report
from emdiff.runs import Run, rounds_held
from emdiff.scale import Scale, estimate_scale
from emdiff.streams import stream
from emdiff.track import Tracker
from emdiff.turns import rows_of
from emdiff.verdict import best_iteration


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
            self.run.prune(self.keep, best_iteration(history))
        write_report(self.run.path)


class Quiet:
    """The listener of a process that is not the first."""

    def phase(self, name: str, total: int) -> Callable[..., None]:
        """Work ends between two updates if a signal asked for it."""
        return lambda done, loss=None: interrupt.check()

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """The first process tells."""


class Decided(NamedTuple):
    """What is decided before a fit begins.

    Attributes:
        scale: Of the data.
        plan: Settings.
        reasons: For what was chosen.
        resolved: The configuration with nothing left open.
        out: The run folder.
    """

    scale: Scale
    plan: Plan
    reasons: dict[str, str]
    resolved: Config
    out: Path


def fit_command(config: Config, defaults: Config, forked: str | None = None) -> None:
    """`emdiff fit`; defaults are the settings of a user who says nothing, forked the folder of a fork, if one is wanted."""
    device = resolve_device(config["device"])
    with joined(device, config["devices"]) as team:
        data = team.after_first(lambda: opened(config))
        decided = team.lead(decide, config, data, device)
        team.once(check_shares, decided.plan, len(data), team.size)
        if team.first:
            first_of(config, defaults, forked, data, decided, team)
        else:
            run_fit(data, decided.scale, decided.plan, RunFolder(Path(forked) if forked else decided.out), Quiet(), team=team)


def opened(config: Config) -> Data:
    """The observations."""
    shape, unknown = tuple(config["shape"]) if config["shape"] else None, config["noise_std"] == "auto"
    noise_std = 1.0 if unknown else config["noise_std"]
    data = open_observations(Path(config["observations"]), config["observer"], noise_std, shape, config["uint8_range"])
    if unknown:
        return with_level(data, first_noise(data))
    return with_counts(data, None) if depends_on_signal(data) else data


def decide(config: Config, data: Data, device: str) -> Decided:
    """Scale, plan and folder of a fit."""
    initial = config["init_prior"]
    scale = read_init_prior(Path(initial), data).scale if initial else estimate_scale(data, stream(config["seed"], "scale"))
    plan, reasons = make_plan(config, data, scale, device)
    resolved = resolved_config(config, plan)
    out = Path(config["out"]) if config["out"] else Path("runs") / default_name(Path(config["observations"]), resolved)
    return Decided(scale, plan, reasons, resolved, out)


def first_of(config: Config, defaults: Config, forked: str | None, data: Data, decided: Decided, team: Team) -> None:
    """The fit, as the only process or the first one: it holds the run folder, and speaks."""
    scale, plan, reasons, resolved, out = decided
    path = Path(config["observations"])
    if forked is not None:
        fork(out, Path(forked), resolved, path, (len(data), *data.shape), config, defaults)
        out, resolved = Path(forked), {**resolved, "out": forked}
    needed = lambda finished: 4 * (rounds_held(plan.iters, finished, config["keep"]) + 6) * len(data) * math.prod(data.shape)  # noqa: E731
    behind = team.alone and goes_on(torch.device(plan.device))
    with Run(out, resolved, path, needed, config, defaults, processes=team.size, behind=behind) as run:
        interrupt.at_the_end(run.lock.release)
        interrupt.check()
        print_plan(data, scale, plan, reasons, out, run.finished())
        if not team.alone:
            print(f"processes     {team.size}, {team.local_size} on each machine; each walks and trains on its share", flush=True)
        for line in blind_spots(data, stream(config["seed"], "blind spots")):
            print(f"warning: {line}", flush=True)
        tracker = Tracker(config["wandb"], out, resolved, warn=lambda line: print(f"note: {line}"))
        truth, obs = open_truth(path), data.rows(slice(0, 12)).obs
        fixed = {} if truth is None else {"truth": truth[:12]}
        console = Console(run, tracker, fixed | ({"observation": obs} if obs.shape[1:] == data.shape else {}), config["keep"])
        try:
            judge = (lambda x, rows: {}) if truth is None else (lambda x, rows: truth_figures(x, rows_of(truth, rows)))
            run_fit(data, scale, plan, run, console, judge, team)
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
