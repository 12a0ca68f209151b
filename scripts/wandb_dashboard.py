"""Build the W&B dashboard of emdiff's runs: progress, calibration, chains and samples, all against the EM iteration.

    python scripts/wandb_dashboard.py --dry-run                      # sections and metrics, no login needed
    python scripts/wandb_dashboard.py --entity YOU [--project emdiff]   # saves it and prints its address

Needs the extra wandb: pip install -e ".[wandb]". Figures are described in emdiff/track.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from emdiff.track import PROJECT, logged_in

ITER = "em/iter"

LINES: dict[str, dict[str, list[str]]] = {
    "progress": {
        "residual chi2 (1 is calibrated)": ["em/chi2"],
        "re-observed prior samples: distance / floor (1: cannot tell apart)": ["em/observation_agreement"],
        "std of posterior and prior samples": ["em/sample_std", "em/prior_std"],
        "error of one sample (truth known)": ["em/error"],
        "score of --stop auto (smaller is better)": ["em/score"],
        "loss of the M-step": ["em/loss"],
        "seconds": ["em/seconds_e", "em/seconds_m"],
    },
    "calibration": {
        "coverage of 50, 80 and 95 % intervals": ["eval/coverage_50", "eval/coverage_80", "eval/coverage_95", "eval/coverage_80_weighted"],
        "chi2 of the evaluation, and its std over data": ["eval/chi2", "eval/chi2_datum_std", "eval/chi2_datum_std_expected"],
        "largest deviation of TARP": ["eval/tarp"],
        "p-values of ranks and TARP": ["eval/sbc_pvalue", "eval/tarp_pvalue"],
        "CRPS": ["eval/crps"],
        "re-observed prior samples: ratios over the floor": ["eval/sliced_wasserstein_ratio", "eval/energy_ratio"],
    },
    "chains": {
        "effective samples per chain state": ["eval/ess_share"],
        "autocorrelation time in E-steps": ["eval/autocorrelation_time"],
        "drift per iteration, in std of the data": ["eval/mean_drift", "eval/std_drift"],
        "chains restarted": ["em/restarted"],
        "solver: relative residual": ["em/solver_residual"],
        "solver: iterations": ["em/solver_iterations"],
        "over-relaxed": ["em/over_relaxed"],
    },
}
"""Section -> title of a line plot -> its metrics."""

CHARTS = {
    "calibration/coverage": ("wandb/line/v0", {"x": "nominal", "y": "actual"}, "coverage (calibrated: the diagonal)"),
    "calibration/tarp": ("wandb/line/v0", {"x": "nominal", "y": "actual"}, "TARP coverage (calibrated: the diagonal)"),
    "calibration/ranks": ("wandb/bar/v0", {"label": "rank", "value": "count"}, "ranks of the truth (calibrated: flat)"),
}
"""Table -> W&B's chart, its axes and its title."""

PICTURES = {"samples/rows": "truth, observation, sample", "samples/samples": "posterior samples", "samples/prior": "prior samples"}
"""Key -> title of a panel that steps through iterations."""


def dashboard(entity: str, project: str) -> ws.Workspace:
    """The workspace, not saved."""
    panels: dict[str, list[Any]] = {section: [wr.LinePlot(title=t, x=ITER, y=y) for t, y in plots.items()] for section, plots in LINES.items()}
    for table, (chart, axes, title) in CHARTS.items():
        query = {"summaryTable": {"tableKey": table}}
        panels["calibration"].append(wr.CustomChart(query=query, chart_name=chart, chart_fields=axes, chart_strings={"title": title}))
    panels["samples"] = [wr.MediaBrowser(title=title, media_keys=[key], gallery_axis="step") for key, title in PICTURES.items()]
    sections = [ws.Section(name=name, panels=content, is_open=True) for name, content in panels.items()]
    return ws.Workspace(name="emdiff", entity=entity, project=project, sections=sections, settings=ws.WorkspaceSettings(x_axis=ITER))


def metrics(workspace: ws.Workspace) -> dict[str, list[list[str]]]:
    """The names that each panel shows, section by section, read from the specification that W&B would be sent."""
    return {section.name: [_names(panel._to_model().config.model_dump(by_alias=True)) for panel in section.panels] for section in workspace.sections}


def _names(config: dict[str, Any]) -> list[str]:
    """The metrics, media keys or table of one panel's configuration."""
    if config.get("userQuery"):
        fields = config["userQuery"]["queryFields"][0]["fields"]
        return [argument["value"] for field in fields if field["name"] == "summaryTable" for argument in field["args"]]
    return config.get("mediaKeys") or config["metrics"]


def main(arguments: list[str] | None = None) -> None:
    """Print the dashboard or save it; without login or entity, one message and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", help="your W&B user or team")
    parser.add_argument("--project", default=PROJECT, help="W&B project (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print sections and metrics instead of saving; --json prints the specification")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print what W&B would be sent")
    options = parser.parse_args(arguments)
    workspace = dashboard(options.entity or "entity", options.project)
    if options.dry_run:
        print(json.dumps(workspace._to_model().model_dump(by_alias=True, exclude_none=True), indent=1) if options.json else _listing(workspace))
        return
    if options.entity is None:
        _refuse("--entity is missing: give your W&B user or team, or --dry-run to look at the dashboard without saving it")
    if not logged_in():
        _refuse("saving the dashboard needs a W&B login: run `wandb login` first, or give --dry-run to look at it without saving")
    try:
        workspace.save()
    except Exception as error:  # the library has no base class for what W&B's servers refuse
        _refuse(f"W&B did not save the dashboard to {options.entity}/{options.project}: {str(error).strip().splitlines()[0]}")
    print(workspace.url)


def _listing(workspace: ws.Workspace) -> str:
    """A line per section, and one per panel with its metrics."""
    return "\n".join("\n".join([name, *(f"    {', '.join(names)}" for names in panels)]) for name, panels in metrics(workspace).items())


def _refuse(message: str) -> None:
    print(f"wandb_dashboard: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
