"""The sweep file: each combination that W&B's agent can draw is a command that emdiff accepts. Its metric: test_wandb.py."""

import random
from pathlib import Path

import pytest
import yaml

from emdiff.cli import main
from emdiff.plan import check_ranges

SWEEP = yaml.safe_load((Path(__file__).parent.parent / "configs/sweep.yaml").read_text())


def corner(parameter, choose):
    """A value of one of the sweep's parameters: an end of its range, or an element of its list."""
    return choose(parameter["values"] if set(parameter) == {"values"} else [parameter["min"], parameter["max"]])


@pytest.mark.parametrize("choose", [min, max, random.Random(1).choice, random.Random(2).choice], ids=["least", "most", "mixed", "mixed again"])
def test_a_sweep_agent_can_run_each_combination(choose, capsys, monkeypatch):
    """The command that W&B's agent would start, read by emdiff's own parser and within the ranges it accepts."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    monkeypatch.setenv("OBSERVATIONS", "mine.npz")
    values = {name: corner(parameter, choose) for name, parameter in SWEEP["parameters"].items()}
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
    command = [str(part) for part in create_sweep_command(list(SWEEP["command"]))]
    assert command[:2] == ["${env}", "emdiff"] and command[-1] == "${args}"
    with pytest.raises(SystemExit) as stop:
        main([*command[2:-1], *arguments, "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert stop.value.code == 0 and config["observations"] == "mine.npz" and config["wandb"] == "online"
    for name, value in values.items():
        group, _, key = name.rpartition(".")
        assert (config[group] if group else config)[key] == value
    check_ranges(config["walk"], config["train"], config["relax"])
