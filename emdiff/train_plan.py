"""From the settings of `emdiff train` to a plan: what was left open is chosen from the data; what does not go together is refused."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from emdiff.changes import FREE
from emdiff.datasets import Dataset
from emdiff.errors import UsageError
from emdiff.memory import Optimiser
from emdiff.models import is_image_shape
from emdiff.prior import build_network, choose_network
from emdiff.scale import Scale
from emdiff.train import LOSS_DATA, TrainPlan, tau_of

Config = dict[str, Any]

FREE_TRAIN = (*FREE, "data", "root", "download")
"""Settings of a training that may change when it is continued; the data are compared by their fingerprint."""


def make_train_plan(config: Config, data: Dataset, scale: Scale, device: str) -> TrainPlan:
    """The plan of a training.

    Raises:
        UsageError: for settings out of range or that do not go together.
    """
    model, fit = config["model"], config["train"]
    check_ranges(model, fit, config["pictures"])
    apart = held_out_count(config["held_out"], len(data))
    levels = levels_of(model, scale)
    if levels is None and fit["objective"] != "mean":
        raise UsageError(
            f"--train.objective {fit['objective']} differs from mean only for several fixed levels; give --model.sigma and --model.measurements"
        )
    if config["flips"] and not is_image_shape(data.shape):
        raise UsageError(f"--flips true: data of shape {data.shape} are no images; leave it out")
    if model["masks"] and levels is not None:
        raise UsageError("--model.masks true is for a prior of all levels; leave out --model.sigma, or the masks")
    network = choose_model(model, data.shape, levels)
    tau_last = model["tau_last"] if levels is None else tau_of(levels)
    optimiser = Optimiser(fit["optimizer"], fit["rate"], fit["momentum"], fit["anneal"], fit["clip"])
    batch, rounds = min(fit["batch"], len(data) - apart), min(fit["rounds"], fit["steps"])
    return TrainPlan(
        network, tau_last, fit["objective"], optimiser, batch, fit["steps"], rounds, config["flips"], config["pictures"], config["seed"], device,
        model["masks"], apart,
    )  # fmt: skip


def held_out_count(wanted: int | None, count: int) -> int:
    """How many of `count` data are set aside; unless told, one in 20, and at most as many as a loss is a mean over.

    Raises:
        UsageError: if that leaves fewer than two.
    """
    if wanted is None:
        return min(LOSS_DATA, count // 20)
    if not 0 <= wanted <= count - 2:
        raise UsageError(f"--held_out is {wanted}; of {count} data 0 to {count - 2} can be set aside")
    return wanted


def disk_bytes(plan: TrainPlan, shape: tuple[int, ...], rounds: int) -> int:
    """Bytes that a training of data of shape S takes on the disk: the priors of so many rounds and of the run, the state within a round, and what one
    round leaves to the next, old and new. That is weights, their average and up to two moments each, in the state also the last good average."""
    with torch.device("meta"):
        denoiser = build_network(shape, **{**plan.network, **({"spectral": False} if "spectral" in plan.network else {})})
    return 4 * sum(p.numel() for p in denoiser.parameters()) * (rounds + 1 + 5 + 2 * 4)


def levels_of(model: Config, scale: Scale) -> list[float] | None:
    """sigma_1..sigma_M in units of the data's std, or None for the pooled view.

    Raises:
        UsageError: if there are neither one nor M levels.
    """
    sigma, M = model["sigma"], model["measurements"]
    if sigma is None:
        if M != 1:
            raise UsageError(f"--model.measurements {M} needs --model.sigma; without it one network serves every number of measurements")
        return None
    if len(sigma) not in (1, M) and M != 1:
        raise UsageError(f"--model.sigma has {len(sigma)} levels and --model.measurements is {M}; give one level, or one for each measurement")
    return [s / scale.std for s in (sigma * M if len(sigma) == 1 else sigma)]


def choose_model(model: Config, shape: tuple[int, ...], levels: list[float] | None) -> dict[str, Any]:
    """Arguments of `prior.build_network`.

    Raises:
        UsageError: for a network that takes other data or another parametrisation.
    """
    kind, image = model["parametrisation"], is_image_shape(shape)
    name = model["network"] or ("mlp" if not image else "resnet" if kind == "muvb" else "unet")
    if (name == "resnet") != (kind == "muvb" and name != "mlp"):
        raise UsageError(
            f"--model.network {name} does not go with --model.parametrisation {kind}; muvb takes resnet or mlp, the others unet, u2net or mlp"
        )
    if name != "mlp" and not image:
        raise UsageError(f"--model.network {name} takes images, not data of shape {tuple(shape)}; use mlp")
    if model["metaencoder"] and kind == "mdae":
        raise UsageError("--model.metaencoder true: an mdae has no energy to add it to; use --model.parametrisation mem or muvb")
    wide = [max(4, round(model["width"] * w)) for w in (128, 256, 512, 1024, 1024, 1024)]
    net: dict[str, Any] = {"kind": name}
    if name == "mlp":
        net |= {"width": round(128 * model["width"])} | ({"blocks": 3} if kind != "muvb" else {})
    elif name == "u2net":
        net |= {"width": model["width"]}
    elif name == "unet":
        default = choose_network(shape)
        net |= {
            "widths": model["widths"] or default.get("widths", [32, 64]),
            "patch": model["patch"] or default.get("patch", 1),
            "blocks": model["blocks"],
        } | ({"maps": True} if model["masks"] else {})
    else:
        net |= {"widths": wide}
    if kind == "muvb":
        net |= {"latent": model["latent"]}
    if kind == "mdae" and levels is None and name in ("unet", "mlp") and not model["spectral_norm"]:
        return net | ({"gain": True} if net.get("maps") else {})
    meta = None if not model["metaencoder"] else {} if name == "mlp" else {"widths": wide if name == "resnet" else wide[:3]}
    spread = {"spread": 0.2} if kind != "muvb" and levels is None and name != "mlp" else {}
    return {"kind": kind, "net": net, "levels": levels, "metaencoder": meta, "spectral": model["spectral_norm"], **spread}


def check_ranges(model: Config, fit: Config, pictures: int) -> None:
    """Refuse numbers out of range, naming flag, value and range."""
    rules: list[tuple[str, Any, float, float]] = [
        *[("--model.sigma", s, 1e-6, 1e6) for s in model["sigma"] or []],
        ("--model.measurements", model["measurements"], 1, 4096),
        ("--model.tau-last", model["tau_last"], 1e-3, 1.0),
        ("--model.width", model["width"], 1e-3, 64),
        ("--model.blocks", model["blocks"], 1, 64),
        ("--model.latent", model["latent"], 1, 10**6),
        ("--train.rate", fit["rate"], 1e-8, 10.0),
        ("--train.momentum", fit["momentum"], 0.0, 0.9999),
        ("--train.clip", fit["clip"], 1e-6, math.inf),
        ("--train.batch", fit["batch"], 1, 10**6),
        ("--train.steps", fit["steps"], 1, 10**9),
        ("--train.rounds", fit["rounds"], 1, 10**5),
        ("--pictures", pictures, 0, 10**6),
    ]
    for flag, value, low, high in rules:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} is {value:g}; give a value from {low:g} to {high:g}")


def resolved_train_config(config: Config, plan: TrainPlan) -> Config:
    """The configuration with nothing left open, and the walk that `reconstruct` takes."""
    walk = {**config["walk"], "tau_last": config["walk"]["tau_last"] or max(0.1, plan.tau_last)}
    return {**config, "device": plan.device, "held_out": plan.held_out, "walk": walk}


def train_name(data: Dataset, resolved: Config) -> str:
    """NAME-HASH: the data's name and eight hex digits of what a run may not change."""
    fixed = {k: v for k, v in resolved.items() if k not in FREE_TRAIN}
    text = json.dumps(fixed, sort_keys=True) + data.identity
    return f"train-{data.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def print_train_plan(data: Dataset, scale: Scale, plan: TrainPlan, out: Path, finished: int) -> None:
    """Say what will be done."""
    levels = plan.network.get("levels")
    net = plan.network.get("net", plan.network)["kind"]
    kind = plan.network["kind"] if "net" in plan.network else "mdae"
    print(f"data          {len(data)} of shape {data.shape} from {data.name}, mean {scale.mean:.4g}, std {scale.std:.4g}")
    if levels is None:
        print(f"model         {kind} on {net}, pooled: any number of measurements, all levels from {plan.tau_last * scale.std:.3g} up (data's units)"
              + (", entry by entry in half of the data" if plan.masks else ""))  # fmt: skip
    else:
        units = ", ".join(f"{s * scale.std:.4g}" for s in levels[:8]) + (", ..." if len(levels) > 8 else "")
        print(f"model         {kind} on {net}, M = {len(levels)} measurements of levels {units}; together {plan.tau_last * scale.std:.4g}")
    how = plan.optimiser
    print(f"held out      {plan.held_out}" + (", whose loss chooses the round that is kept" if plan.held_out else ": the last round is kept"))
    print(f"training      {plan.steps} steps of {plan.batch} in {plan.rounds} rounds, {how.name} at rate {how.rate:g}, on {plan.device}")
    print(f"run folder    {out}" + (f", continued after round {finished}" if finished >= 0 else ""), flush=True)
