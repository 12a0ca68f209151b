"""The layers: a module imports only from layers before its own, and Lightning, matplotlib and wandb only where training, figures and tracking are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    {"errors", "streams", "ahead", "behind", "settings", "meanings", "charts", "flow", "chain_figures", "classifier"},
    {"interrupt"},
    {"launch"},
    {"files", "processes", "measurement", "linalg", "reading", "checks", "console"},
    {"rows", "checkpoint", "graphs", "finished"},
    {"unfinished"},
    {"archive", "written", "data", "denoise", "langevin", "printing", "lock", "parameters", "memory"},
    {"stored", "changes", "smooth", "near"},
    {"folder"},
    {"observations"},
    {"factors"},
    {"accumulate", "guidance", "gaussian", "deconvolution", "learner"},
    {"mixture", "watch"},
    {"restarts"},
    {
        "nn",
        "mdae",
        "components",
        "scale",
        "noise",
        "identify",
        "metrics",
        "calibration",
        "features",
        "verdict",
        "first_samples",
        "start",
        "training",
        "objectives",
        "turns",
    },
    {"basewalk", "shrink", "paper_nets", "poisson", "turns"},
    {"mem"},
    {"muvb"},
    {"models", "precision"},
    {"prior", "runs"},
    {"compiled"},
    {"em", "pool", "chain", "datasets"},
    {"pairs", "outline", "strata"},
    {"posterior"},
    {"firsts"},
    {"relax"},
    {"rounds"},
    {"fit", "figures"},
    {"track", "evaluate", "strips", "train"},
    {"evidence"},
    {"report", "plan", "train_plan"},
    {"commands", "commands_fit", "check", "commands_prior", "commands_observe"},
    {"cli_prior"},
    {"cli"},
]
ONLY = {"pytorch_lightning": {"learner", "watch", "training"}, "matplotlib": {"figures"}, "wandb": {"track"}}


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


MODULES = {path.stem: imported(path) for path in (ROOT / "emdiff").glob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_layer():
    assert set(MODULES) == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    layer = next(i for i, names in enumerate(LAYERS) if module in names)
    below = set().union(*LAYERS[:layer])
    used = {name.split(".")[1] for name in MODULES[module] if name.startswith("emdiff.")}
    assert used <= below, f"{module} imports {used - below} from its own layer or above"


@pytest.mark.parametrize("library", ONLY)
def test_heavy_libraries_are_imported_in_few_files(library):
    users = {module for module, names in MODULES.items() if any(name.split(".")[0] == library for name in names)}
    assert users == ONLY[library]


def test_observers_know_nothing_of_emdiff():
    for path in (ROOT / "observers").glob("*.py"):
        assert not {name for name in imported(path) if name.split(".")[0] == "emdiff"}, path


def test_lightning_is_never_imported_under_its_other_name():
    assert not [module for module, names in MODULES.items() if any(name.split(".")[0] == "lightning" for name in names)]
