"""From what the user gave to a plan: what was left open is chosen from the data and the device, and said, with reasons."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from emdiff.changes import FREE
from emdiff.data import Data, batches, observer_name
from emdiff.em import Walk, choose_guidance
from emdiff.errors import UsageError
from emdiff.files import sha256
from emdiff.firsts import first_steps, level_maps
from emdiff.gaussian import DENSE
from emdiff.models import is_image_shape
from emdiff.noise import depends_on_signal
from emdiff.outline import Plan
from emdiff.pool import applies, noise
from emdiff.posterior import STEADY, check_levels, default_batch, default_pool, default_tau_first, steady
from emdiff.prior import TAU_FIRST, Prior, check_any_level, choose_network, load_prior
from emdiff.relax import default_relax
from emdiff.rows import evenly
from emdiff.scale import Scale
from emdiff.start import Choice, choose_start
from emdiff.strata import TAU

Config = dict[str, Any]

SHOWN = 160_000
"""Data that a self-supervised start is shown at most, on a GPU at least."""

GPU_START = 2500
"""Steps of a start on a GPU, if that shows SHOWN data."""

NO_LIMIT = 10**6
"""Iterations: what --relax stands for when it is not set."""


def resolve_device(wanted: str) -> str:
    """cpu or cuda.

    Raises:
        UsageError: if cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu or auto")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def make_plan(config: Config, data: Data, scale: Scale, device: str) -> tuple[Plan, dict[str, str]]:
    """Fill in what the user left open; returns the plan and the reasons for what was chosen.

    Raises:
        UsageError: for settings out of range or that do not go together.
    """
    walk, train = config["walk"], config["train"]
    check_ranges(walk, train, config["relax"])
    try:
        start = Choice("prior", f"{config['init_prior']}, trained elsewhere") if config.get("init_prior") else choose_start(data, config["start"])
        guidance, reason = choose_guidance(data, config["guidance"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    pool = default_pool(data, guidance) if walk["pool"] is None else walk["pool"]
    if pool and (guidance == "fused" or not applies(data)):
        raise UsageError(f"--walk.pool {pool}: chains restart from a pool with guidance cg or gmres and at most {DENSE} entries in x; give 0")
    tau_first = walk["tau_first"] or default_tau_first(guidance, pool)
    relative = relative_noise(data, scale, guidance)
    tau_last = walk["tau_last"] or default_tau_last(relative)
    if not tau_first > tau_last:
        raise UsageError(f"--walk.tau-first {tau_first:g} is not above --walk.tau-last {tau_last:g}; levels fall from first to last")
    if guidance != "fused" and not math.isfinite(tau_first):
        raise UsageError(f"--walk.tau-first has to be finite with guidance {guidance}; {TAU_FIRST:g} starts every walk anew")
    chains = walk["batch"] or default_batch(device)
    chosen = Walk(**{**walk, "guidance": guidance, "tau_first": tau_first, "tau_last": tau_last, "batch": chains, "pool": pool})
    relax = config["relax"]
    if relax is None:
        relax = NO_LIMIT if start.kind != "mixture" and default_relax(relative, guidance, walk["tau_relax"]) else 0
        chosen = chosen._replace(tau_relax=walk["tau_relax"] if relative > 2 * walk["tau_relax"] else tau_last)
    if relax and chosen.tau_relax > tau_last and not tau_first > chosen.tau_relax:
        raise UsageError(f"--walk.tau-relax {chosen.tau_relax:g} is not below --walk.tau-first {tau_first:g}; lower it, or give --relax 0")
    lack = lack_of_strata(config, data, start.kind, guidance, tau_last)
    if config["strata"] and lack:
        raise UsageError(f"--strata true: needs {lack}; leave it out")
    strata = lack is None if config["strata"] is None else config["strata"]
    maps = guidance == "fused" and level_maps(data) is not None
    network = choose_network(data.shape, maps, gain=guidance == "fused")
    if config.get("init_prior"):
        first = read_init_prior(Path(config["init_prior"]), data, tau_last)
        check_levels(first, data, guidance, Path(config["init_prior"]))
        network, asked, chosen = first.network, chosen, steady(chosen, first)
        reason += f"; {STEADY}" if chosen != asked else ""
    refresh = default_refresh(len(data), guidance, network["kind"], device) if train["refresh"] is None else train["refresh"]
    if refresh and guidance != "fused":
        raise UsageError(f"--train.refresh {refresh}: chains take turns with fused guidance only, and this is {guidance}; give 0")
    batch = train["batch"] or default_train_batch(device, network["kind"], len(data))
    steps = train["steps"] or default_steps(refresh // 2 or len(data), device, network["kind"], batch)
    start_steps = train["start_steps"] or max(SHOWN // batch, GPU_START if (device, network["kind"]) == ("cuda", "unet") else 1)
    plan = Plan(
        config["iters"], start, chosen, network, start_steps, steps, batch, train["rate"], refresh, relax, strata,
        maps=maps, seed=config["seed"], device=device, stop=config["stop"] == "auto",
        level=noise_range(data)[0] if config["noise_std"] == "auto" else None, compile=config["compile"], init_prior=config.get("init_prior"),
    )  # fmt: skip
    return plan, {"start": start.reason, "guidance": reason}


def lack_of_strata(config: Config, data: Data, start: str, guidance: str, tau_last: float) -> str | None:
    """What a fit by strata needs and this one has not; None where nothing lacks."""
    there = {
        f"guidance fused, and this is {guidance}": guidance == "fused",
        f"images, and x has shape {data.shape}": is_image_shape(data.shape),
        f"a start without a mixture, and this is {start}": start != "mixture",
        "a noise level that is known": config["noise_std"] != "auto" and not depends_on_signal(data),
        f"--walk.tau-last below {TAU:g}, and it is {tau_last:g}": tau_last < TAU,
    }
    return next((what for what, found in there.items() if not found), None)


def read_init_prior(path: Path, data: Data, tau_last: float = math.inf) -> Prior:
    """The prior that EM starts from.

    Raises:
        UsageError: if it cannot be read, is of data of another shape, takes one set of levels only, or was not trained down to tau_last.
    """
    prior = check_any_level(load_prior(path), path)
    if prior.shape != data.shape:
        raise UsageError(
            f"--init-prior {path}: it is of data of shape {prior.shape}, the observations of {data.shape}; give --shape or another prior"
        )
    if prior.tau_last > tau_last * 1.001:
        raise UsageError(
            f"--init-prior {path}: trained down to level {prior.tau_last:.3g}, while the walk ends at {tau_last:.3g}, in units of the data's std; "
            f"give --walk.tau-last {prior.tau_last:.3g} or more"
        )
    return prior


def relative_noise(data: Data, scale: Scale, guidance: str) -> float:
    """Median noise, over at most 1024 evenly spaced data, in units of the data's std; where an observer of vectors mixes entries, over the norm of
    its rows."""
    some = data.rows(evenly(len(data), 1024))
    direct = scale.observations(some).observer.as_measurement(some.obs) if scale.channels else None
    if direct is not None:
        return float(direct[1][direct[1].isfinite()].median())
    std = noise(some) if guidance != "fused" and applies(data) else some.observer.std()
    return float(std.median()) / scale.std


def noise_range(data: Data) -> tuple[float, float]:
    """Least and largest standard deviation of the noise."""
    low, high = math.inf, 0.0
    for _, part in batches(data):
        std = part.observer.std()
        low, high = min(low, float(std.min())), max(high, float(std.max()))
        if std.shape[0] < len(part):
            break
    return low, high


def default_tau_last(noise: float) -> float:
    """0.1, or half the observations' relative noise where that is finer: the prior has to resolve what the observations do. At least 0.005."""
    return max(0.005, min(0.1, 0.5 * noise))


def default_refresh(count: int, guidance: str, network: str, device: str) -> int:
    """A fifth of more than 5000 observations where walks start anew and are slow; 0, which is all, elsewhere."""
    return -(-count // 5) if (guidance, network, device) == ("fused", "unet", "cpu") and count > 5000 else 0


def default_train_batch(device: str, network: str, count: int) -> int:
    """32 for a U-Net on a CPU, which learns more from the same number of data so (docs/ablation.md) and keeps a core busy; on a GPU, where a step
    takes hardly longer for more data (docs/speed.md), the power of two below a 29th of their number, from 32 to 2048. Else 128.

    >>> [default_train_batch("cuda", "unet", count) for count in (1000, 3000, 10_000, 60_000)]
    [32, 64, 256, 2048]
    """
    if (device, network) == ("cuda", "unet"):
        return 2 ** max(5, min(11, (count // 29).bit_length() - 1))
    return 32 if (device, network) == ("cpu", "unet") else 128


def default_steps(count: int, device: str, network: str, batch: int) -> int:
    """Steps of an M-step: about 20 passes over the data (10 over those whose turn it is), at least 25,600 data, and at most 51,200 for a U-Net on a
    CPU, 256,000 for an MLP there, and 512,000 for one on a GPU. A U-Net on a GPU is shown count/860 times all data where that is more, and at most
    3,276,800.

    >>> default_steps(1000, "cpu", "unet", 32), default_steps(60_000, "cpu", "unet", 32), default_steps(60_000, "cuda", "unet", 2048)
    (800, 1600, 1600)
    """
    if (device, network) == ("cuda", "unet"):
        return round(min(max(25_600, 20 * count, count**2 // 860), 3_276_800) / batch)
    return round(min(max(25_600, 20 * count), 512_000 if device == "cuda" else 256_000 if network == "mlp" else 51_200) / batch)


def check_ranges(walk: Config, train: Config, relax: int | None) -> None:
    """Refuse numbers out of range, naming flag, value and range."""
    rules: list[tuple[str, Any, float, float]] = [
        ("--walk.tau-last", walk["tau_last"], 1e-3, 1.0),
        ("--walk.tau-relax", walk["tau_relax"], walk["tau_last"] or 1e-3, 2.0),
        ("--walk.tau-first", walk["tau_first"], 1e-3, math.inf),
        ("--walk.levels", walk["levels"], 2, 10_000),
        ("--walk.steps", walk["steps"], 0, 10_000),
        ("--walk.delta", walk["delta"], 1e-6, 2.0),
        ("--walk.gamma", walk["gamma"], 1e-6, 1e6),
        ("--walk.iterations", walk["iterations"], 1, 1000),
        ("--walk.tolerance", walk["tolerance"], 1e-12, 10.0),
        ("--walk.coarse", walk["coarse"], 0.0, math.inf),
        ("--walk.batch", walk["batch"], 1, 10**7),
        ("--walk.pool", walk["pool"], 0, 10**6),
        ("--train.steps", train["steps"], 1, 10**8),
        ("--train.start-steps", train["start_steps"], 1, 10**8),
        ("--train.batch", train["batch"], 1, 10**6),
        ("--train.rate", train["rate"], 1e-8, 1.0),
        ("--train.refresh", train["refresh"], 0, 10**9),
        ("--relax", relax, 0, 10**6),
    ]
    for flag, value, low, high in rules:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} is {value:g}; give a value from {low:g} to {high:g}")


def check_shares(plan: Plan, count: int, processes: int) -> None:
    """Refuse work of which some process would have nothing.

    Raises:
        UsageError: naming what is too little.
    """
    half = 2 if plan.start.kind == "self-supervised" else 1  # of its data the start has each twice in a batch
    shared = {
        "the number of observations": (count, count),
        "--train.batch": (plan.batch, max(1, plan.batch // half)),
        "--train.refresh": (plan.refresh or count, plan.refresh or count),
    }
    for name, (value, most) in shared.items():
        if most < processes:
            raise UsageError(f"{name} is {value}, which {processes} processes cannot share; start at most {most}")


def resolved_config(config: Config, plan: Plan) -> Config:
    """The configuration with nothing left open, in the form that `emdiff fit --config` reads."""
    walk = {k: v for k, v in plan.walk._asdict().items() if k != "guidance"}
    walk["tau_first"] = None if math.isinf(plan.walk.tau_first) else plan.walk.tau_first
    train = {"steps": plan.steps, "start_steps": plan.start_steps, "batch": plan.batch, "rate": plan.rate, "refresh": plan.refresh}
    chosen = {"start": plan.start.kind, "guidance": plan.walk.guidance, "relax": plan.relax, "strata": plan.strata, "device": plan.device}
    if plan.init_prior is not None:
        chosen["start"] = config["start"]
    return {**config, **chosen, "walk": walk, "train": train}


def default_name(path: Path, resolved: Config) -> str:
    """NAME-HASH: the file's name and eight hex digits of what a run may not change."""
    fixed = {k: v for k, v in resolved.items() if k not in FREE}
    text = json.dumps(fixed, sort_keys=True) + sha256(path)
    return f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def print_plan(data: Data, scale: Scale, plan: Plan, reasons: dict[str, str], out: Path, finished: int) -> None:
    """Say what will be done, and why."""
    low, high = noise_range(data)
    noise = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    walk = plan.walk
    first = "no measurement" if math.isinf(walk.tau_first) else f"{walk.tau_first * scale.std:.3g}"
    print(f"observations  {len(data)} of shape {data.shape} through {observer_name(data)}, noise_std {noise}")
    if plan.level is not None:
        print("noise         its level is estimated from the observations, and by EM in every iteration")
    elif depends_on_signal(data):
        print("noise         counts: its variance is taken from the last samples in every iteration")
    source = "of the prior it starts from" if plan.init_prior else "estimated from the observations"
    print(f"data          mean {scale.mean:.4g}, std {scale.std:.4g}, {source}")
    if scale.channels:
        print("channels      " + ", ".join(f"mean {mean:.4g}, std {std:.4g}" for mean, std in scale.channels))
    print(f"start         {plan.start.kind}: {reasons['start']}")
    print(f"guidance      {walk.guidance}: {reasons['guidance']}")
    print(
        f"walk          {walk.levels} levels from {first} to {walk.tau_last * scale.std:.3g} (in the data's units), {walk.steps} Langevin steps each"
    )
    if plan.refresh:
        print(f"turns         {plan.refresh} observations are walked anew in each iteration; the M-step keeps the last pairs of the others")
    if walk.pool:
        print(f"chains        restart in every iteration from {walk.pool} prior samples, resampled by each observation's likelihood")
    print(f"prior         {plan.network['kind']}, {plan.steps} steps of {plan.batch} per M-step, {first_steps(plan)} in the first, on {plan.device}")
    limit = "" if plan.relax == NO_LIMIT else f", up to iteration {plan.relax}"
    follow = "" if plan.strata else ", or follow the noise"
    relaxed = f"over-relaxed where the samples spread more than the data do{follow}{limit}" if plan.relax else "exact"
    relaxed += ", without the variance that the observations object to in strata" if plan.strata else ""
    print(f"iterations    {plan.iters}; {relaxed}")
    print(f"run folder    {out}" + (f", continued after round {finished}" if finished >= 0 else ""), flush=True)
