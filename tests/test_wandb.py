"""Weights & Biases as the user meets it: real offline runs read back with W&B's own reader, the dashboard, the sweep. No network, no prompt."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from wandb_server import wandb_server

from emdiff.cli import main
from emdiff.track import Tracker
from emdiff.verdict import score

ROOT = Path(__file__).parent.parent
SMALL = ["--train.steps", "10", "--train.start-steps", "10", "--walk.levels", "4", "--device", "cpu"]
FIT = ["fit", "--observations", "obs.npz", "--out", "run", *SMALL]
EVALUATE = ["evaluate", "--run", "run", "--observations", "obs.npz", "--count", "40", "--samples", "4", "--prior-samples", "40"]
EVALUATE += ["--device", "cpu", "--wandb", "off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where a run was fitted in three commands (W&B off, offline, offline), evaluated, and given a report."""
    from sklearn.datasets import load_digits

    before, path = Path.cwd(), tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(path / name.lower()))
        patch.setenv("NETRC", str(path / "netrc"))
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        np.savez("digits.npz", x=(load_digits().images[:100] / 16).astype("float32"))
        main(["observe", "--data", "digits.npz", "--noise-std", "0.25", "--out", "obs.npz"])
        for iters, mode in ((1, "off"), (2, "offline"), (3, "offline")):
            main([*FIT, "--iters", str(iters), "--wandb", mode])
        main(EVALUATE)
        tracker = Tracker("offline", Path("run"), {})
        tracker.evaluation(*evaluation(path))
        Path("run/report.html").unlink()
        tracker.artifact(Path("run/report.html"))
        Path("run/report.html").write_text("<p>report</p>")
        tracker.artifact(Path("run/report.html"))
        tracker.close()
        yield path
    assert Path.cwd() == before


def evaluation(folder):
    """What `emdiff evaluate` wrote, as if there had been an oracle; and its arrays."""
    with np.load(folder / "run/evaluation/arrays.npz") as arrays:
        return json.loads((folder / "run/evaluation/metrics.json").read_text()) | {"oracle": {"error": 1.5}}, dict(arrays)


def records(sync_dir):
    """The records of an offline run's .wandb file, as W&B's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(sync_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sessions(folder):
    """The records of each session of the run, oldest first."""
    return [records(path) for path in sorted((folder / "run/wandb").glob("offline-run-*"))]


@pytest.fixture(scope="module")
def rows(sessions):
    """All history rows."""
    return [record["history"]["item"] for session in sessions for record in session if record["type"] == "history"]


@pytest.fixture(scope="module")
def keys(rows):
    """All names that were logged: of numbers, and of media, whose entries are NAME._type, NAME.path and so on."""
    return {key.split("._")[0] for row in rows for key in row}


@pytest.fixture(scope="module")
def board():
    """The dashboard script."""
    spec = importlib.util.spec_from_file_location("wandb_dashboard", ROOT / "scripts/wandb_dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_of_every_round_is_logged_once(folder, rows):
    """Of the rounds fitted with W&B off too, and of the start."""
    figures = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    logged = [{k: float(v) for k, v in row.items() if k.startswith("em/")} for row in rows if "em/chi2" in row]
    scores = [{"em/score": score(row)} if row["iter"] else {} for row in figures]
    wanted = [{f"em/{k}": float(v) for k, v in row.items() if not isinstance(v, str)} for row in figures]
    assert len(figures) == 4 and logged == [row | more for row, more in zip(wanted, scores)]


def test_pictures_are_logged_every_round(rows):
    rounds = [row for row in rows if "em/chi2" in row]
    assert all(row[f"samples/{name}._type"] == "image-file" for row in rounds for name in ("samples", "rows"))
    assert all("samples/prior._type" in row for row in rounds[1:])


def test_an_evaluation_is_logged_at_its_iteration(folder, rows):
    (row,) = [row for row in rows if "eval/chi2" in row]
    result, arrays = evaluation(folder)
    figures = {name: value for name, value in result["figures"].items() if value is not None}
    assert row["em/iter"] == result["iter"] == 3 and row["eval/best_iteration"] == result["best_iteration"] and row["eval/oracle/error"] == 1.5
    assert {name: row[f"eval/{name}"] for name in figures} == figures
    assert {name: row[f"eval/floor/{name}"] for name in result["floors"]} == result["floors"]
    wanted = {
        "coverage": {"nominal": arrays["coverage_levels"], "actual": arrays["coverage"]},
        "tarp": {"nominal": arrays["tarp_levels"], "actual": arrays["tarp_coverage"]},
        "ranks": {"rank": np.arange(5), "count": arrays["rank_counts"]},
    }
    for name, columns in wanted.items():
        (file,) = (folder / "run/wandb").glob(f"offline-run-*/files/{row[f'calibration/{name}.path']}")
        table = json.loads(file.read_text())
        assert table["columns"] == list(columns)
        np.testing.assert_allclose(table["data"], np.stack(list(columns.values()), axis=1))


def test_the_report_is_an_artifact_and_the_system_is_watched(sessions):
    artifacts = [record["artifact"] for record in sessions[-1] if record["type"] == "artifact"]
    (report,) = [artifact for artifact in artifacts if artifact["type"] == "report"]
    assert [entry["path"] for entry in report["manifest"]["contents"]] == ["report.html"]
    assert all(any("proc.memory.rssMB" in r["stats"]["item"] for r in session if r["type"] == "stats") for session in sessions[:2])


def test_continued_fits_and_evaluations_are_one_wandb_run(folder, sessions):
    starts = [next(record["run"] for record in session if record["type"] == "run") for session in sessions]
    assert [start["run_id"] for start in starts] == [(folder / "run/wandb_id").read_text()] * 3


def wandb_command(folder, server, *arguments, **more):
    """A Python process of a user who is logged in to `server`, or to none."""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}  # the tests' own connection to W&B's background process
    environment |= {"PYTHONPATH": str(ROOT), **more}
    if server:
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_sync_appends_the_rows_of_later_sessions(folder, monkeypatch):
    """Two sessions of a fit, one evaluation, a third session: after `wandb sync` no step is used twice and no row is lost."""
    monkeypatch.chdir(folder)
    for session in ([0, 1, 2], [3], "evaluation", [4, 5]):
        tracker = Tracker("offline", Path("synced"), {})
        if session == "evaluation":
            tracker.evaluation({"iter": 3, "figures": {"chi2": 0.5}}, {})
        else:
            for k in session:
                tracker.log({"iter": k, "chi2": 1 + k}, {})
        tracker.close()
    with wandb_server() as server:
        done = wandb_command(folder, server, "-m", "wandb", "sync", "--yes", *map(str, sorted(Path("synced/wandb").glob("offline-run-*"))))
        assert done.returncode == 0, done.stderr
        assert [row["_step"] for row in server.rows] == list(range(7))
        assert [row["em/iter"] for row in server.rows] == [0, 1, 2, 3, 3, 4, 5]
        assert [row.get("em/chi2", row.get("eval/chi2")) for row in server.rows] == [1, 2, 3, 4, 0.5, 5, 6]


def test_without_network_an_online_run_goes_on_offline(folder):
    """A key, but no server behind the address: one line says so, and the same run is logged offline."""
    code = """if True:
        import emdiff.track as track
        track.TIMEOUT = 2
        tracker = track.Tracker("online", track.Path("alone"), {})
        tracker.log({"iter": 0, "chi2": 1.5}, {})
        tracker.close()"""
    with wandb_server() as closed:
        pass
    done = wandb_command(folder, closed, "-c", code)
    (line,) = done.stdout.strip().splitlines()
    assert done.returncode == 0 and "cannot be reached" in line and "wandb sync" in line, done.stderr
    (session,) = (folder / "alone/wandb").glob(f"offline-run-*-{(folder / 'alone/wandb_id').read_text()}")
    assert [r["history"]["item"]["em/chi2"] for r in records(session) if r["type"] == "history"] == [1.5]


def test_a_sweep_chooses_the_run_and_gets_every_round(folder):
    """Two trials with the same settings share a run folder; both show all of its rounds."""
    code = """if True:
        import os, wandb
        from emdiff.track import Path, Tracker
        for name in ("first", "second"):
            os.environ["WANDB_RUN_ID"] = name
            Tracker("offline", Path("trial"), {}).close()
            wandb.teardown()"""
    (folder / "trial").mkdir()
    (folder / "trial/metrics.jsonl").write_text('{"iter": 0, "chi2": 1.5}\n{"iter": 1, "chi2": 1.25}\n')
    (folder / "settings.yaml").write_text("wandb_version: 1\nwalk.levels:\n  value: 16\n")
    done = wandb_command(folder, None, "-c", code, WANDB_SWEEP_ID="sweep", WANDB_SWEEP_PARAM_PATH=str(folder / "settings.yaml"))
    assert done.returncode == 0, done.stderr
    for name in ("first", "second"):
        (session,) = (folder / "trial/wandb").glob(f"offline-run-*-{name}")
        assert [r["history"]["item"]["em/chi2"] for r in records(session) if r["type"] == "history"] == [1.5, 1.25]


def shown(spec):
    """Names of metrics, pictures and tables anywhere in a specification, by section."""

    def walk(node):
        if isinstance(node, list):
            return [name for item in node for name in walk(item)]
        if not isinstance(node, dict):
            return []
        own = [node["value"]] if node.get("name") == "tableKey" else []
        return own + [*node.get("metrics", []), *node.get("mediaKeys", [])] + walk([v for v in node.values() if isinstance(v, (dict, list))])

    return {section["name"]: [walk(panel["config"]) for panel in section["panels"]] for section in spec["section"]["panelBankConfig"]["sections"]}


def test_each_panel_shows_what_a_run_logs(board, keys, capsys):
    board.main(["--dry-run", "--json"])
    sections = shown(json.loads(capsys.readouterr().out)["spec"])
    assert list(sections) == ["progress", "calibration", "chains", "samples"]
    assert all(panel and set(panel) <= keys for panels in sections.values() for panel in panels), sections
    board.main(["--dry-run"])
    listed = capsys.readouterr().out
    assert all(name in listed for panels in sections.values() for panel in panels for name in panel)
    assert sections == board.metrics(board.dashboard("me", "emdiff"))


def test_a_dashboard_is_saved_where_there_is_a_login(board, folder):
    with wandb_server() as server:
        done = wandb_command(folder, server, str(ROOT / "scripts/wandb_dashboard.py"), "--entity", "me")
        assert done.returncode == 0 and done.stdout.startswith(f"{server.url}/me/emdiff"), done.stderr
        (view,) = server.views
        assert shown(json.loads(view["spec"])) == board.metrics(board.dashboard("me", "emdiff"))
        done = wandb_command(folder, server, str(ROOT / "scripts/wandb_dashboard.py"), "--entity", "refused")
        assert done.returncode == 2 and "refused/emdiff" in done.stderr and "permission denied" in done.stderr and len(server.views) == 1


@pytest.mark.parametrize(("arguments", "word"), [([], "--entity"), (["--entity", "me"], "wandb login")])
def test_without_login_or_entity_nothing_is_saved(board, arguments, word, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        board.main(arguments)
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("wandb: ")]
    assert stop.value.code == 2 and len(lines) == 1 and word in lines[0] and "--dry-run" in lines[0], lines


def test_a_sweep_minimises_what_a_run_logs_without_the_truth(rows):
    """The metric is a function of the figures without truth (`verdict.score`), and each round has it."""
    metric = yaml.safe_load((ROOT / "configs/sweep.yaml").read_text())["metric"]
    rounds = [row for row in rows if row.get("em/iter", 0) > 0 and "em/chi2" in row]
    assert metric == {"name": "em/score", "goal": "minimize"} and len(rounds) == 3
    assert all(row["em/score"] == score({"chi2": row["em/chi2"], "observation_agreement": row["em/observation_agreement"]}) for row in rounds)
