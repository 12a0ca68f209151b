"""Weights & Biases: figures against em/iter, grids of samples, the configuration. The one file that imports wandb.

It never prompts and never waits for a network it cannot reach: online needs a key, and a short time-out ends in offline mode.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from emdiff.figures import is_image, tile, to_uint8, value_range

TIMEOUT = 15
"""Seconds to wait for W&B's servers before a run goes on offline."""


class Tracker:
    """One W&B run, or none.

    Args:
        mode: "auto" (WANDB_MODE if set; online where a key is at hand; else offline), "online", "offline" or "off".
        folder: The run folder; W&B's files go to its wandb/ and a continued fit continues the same W&B run.
        config: The resolved configuration.
        warn: Told in one line what could not be done.
    """

    def __init__(self, mode: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None] = print) -> None:
        self.run, self.mode = None, resolve_mode(mode)
        if self.mode == "off":
            return
        self.run = _start(self.mode, folder, config, warn)
        self.run.define_metric("em/iter")
        self.run.define_metric("em/*", step_metric="em/iter")

    def log(self, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """Log numbers as em/NAME and pictures (n, *S) as samples/NAME."""
        if self.run is None:
            return
        import wandb

        row: dict[str, Any] = {f"em/{k}": v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for name, x in pictures.items():
            if is_image(x.shape[1:]):
                low, high = value_range(x.numpy())
                row[f"samples/{name}"] = wandb.Image(to_uint8(tile(x.numpy(), 8), low, high), caption=f"scale [{low:.3g}, {high:.3g}]")
        self.run.log(row)

    def close(self) -> None:
        """Finish the run."""
        if self.run is not None:
            self.run.finish()


def resolve_mode(mode: str) -> str:
    """The mode that "auto" stands for here; other modes stay as they are."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline"):
        return asked
    if asked in ("disabled", "dryrun"):
        return "off" if asked == "disabled" else "offline"
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _start(mode: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]) -> Any:
    """Start online or offline; online falls back to offline, saying so."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"silent": True, "init_timeout": TIMEOUT, "disable_git": True, "x_disable_meta": False}
    identity = folder / "wandb_id"
    if not identity.is_file():
        identity.write_text(secrets.token_hex(4))
    shared = {"project": "emdiff", "dir": str(folder), "name": folder.name, "id": identity.read_text().strip(), "config": config}
    try:
        return wandb.init(mode=mode, resume="allow" if mode == "online" else None, settings=wandb.Settings(**settings), **shared)
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        if mode == "offline":
            raise
        warn(f"W&B cannot be reached ({str(error).splitlines()[0]}); this run is logged offline, `wandb sync` uploads it later")
        return wandb.init(mode="offline", settings=wandb.Settings(**settings), **shared)
