"""What `emdiff train`, `sample` and `denoise` do once their arguments are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emdiff import interrupt
from emdiff.chain import ChainWalk, density, own_levels, run_chain
from emdiff.chain_figures import ChainFigures
from emdiff.classifier import digit_classifier
from emdiff.console import Bars
from emdiff.data import Observations
from emdiff.datasets import open_dataset
from emdiff.errors import UsageError
from emdiff.figures import save_progress, save_rows, save_samples
from emdiff.files import write_arrays, write_json
from emdiff.finished import prior_file
from emdiff.flow import flow
from emdiff.plan import resolve_device
from emdiff.posterior import check_shape
from emdiff.prior import load_prior, sample_prior
from emdiff.runs import Run, rounds_held
from emdiff.streams import stream
from emdiff.track import Tracker
from emdiff.train import best_round, measure_scale, run_training
from emdiff.train_plan import FREE_TRAIN, Config, disk_bytes, make_train_plan, print_train_plan, resolved_train_config, train_name

LEVEL = 3.2
"""Level of a chain's measurements in units of the data's std, where it is not given: 1 for MNIST, as in the paper."""


class TrainConsole(Bars):
    """Progress bars, a line per round, pictures, and W&B.

    Args:
        run: The run folder.
        tracker: W&B.
        keep: Rounds whose priors and pictures are kept; None for all.
    """

    def __init__(self, run: Run, tracker: Tracker, keep: int | None = None) -> None:
        super().__init__(run.lock.renew)
        self.run, self.tracker, self.keep = run, tracker, keep

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """Say how the round went, and draw it."""
        self.close()
        names = {"steps": "step", "loss": "loss", "image_loss": "loss per image", "held_out_loss": "held out", "prior_std": "std of samples"}
        names |= {"images_per_second": "images/s"}
        figures = "  ".join(f"{label} {metrics[name]:.6g}" for name, label in names.items() if name in metrics)
        print(f"round {k:3d}  {figures}  ({metrics['seconds']:.0f} s)", flush=True)
        for name, x in pictures.items():
            save_samples(self.run.path / "figures" / f"{name}_{k:03d}.png", x, f"{name}, round {k}")
        history = self.run.history()
        save_progress(self.run.path / "figures" / "progress.png", history[1:], ("loss", "image_loss", "held_out_loss", "prior_std"))
        self.tracker.log(metrics, pictures)
        if self.keep is not None:
            self.run.prune(self.keep, best_round(history))


def train_command(config: Config, defaults: Config) -> None:
    """`emdiff train`; defaults are the settings of a user who says nothing."""
    device = resolve_device(config["device"])
    data = open_dataset(config["data"], config["root"], config["download"], config["count"])
    scale = measure_scale(data)
    if not scale.std > 1e-9:
        raise UsageError(f"--data {config['data']}: all entries are {scale.mean:g}; there is nothing to learn")
    plan = make_train_plan(config, data, scale, device)
    resolved = resolved_train_config(config, plan)
    out = Path(config["out"]) if config["out"] else Path("runs") / train_name(data, resolved)
    needed = lambda finished: disk_bytes(plan, data.shape, rounds_held(plan.rounds, finished, config["keep"]))  # noqa: E731
    with Run(out, resolved, data.identity, needed, given=config, defaults=defaults, free=FREE_TRAIN) as run:
        interrupt.at_the_end(run.close)
        interrupt.check()
        print_train_plan(data, scale, plan, out, run.finished())
        tracker = Tracker(config["wandb"], out, resolved, warn=lambda line: print(f"note: {line}"))
        console = TrainConsole(run, tracker, config["keep"])
        try:
            best = run_training(data, scale, plan, run, console)[1]
        finally:
            console.close()
            tracker.close()
    if best < plan.rounds:
        print(f"note: the loss of the data held out was least after round {best}, whose prior is kept; later rounds did worse on them")
    print(f"prior: {out / 'prior.safetensors'}   pictures: {out / 'figures'}   figures: {out / 'metrics.jsonl'}")
    start = "" if plan.network.get("levels") else f"; emdiff fit --init-prior {out / 'prior.safetensors'}"  # of fixed levels, fit takes none
    print(f"next: emdiff sample --run {out}; emdiff sample --run {out} --chain true{start}")


def sample_command(run: Path, count: int, out: Path, levels: int, steps: int | None, seed: int, device: str) -> None:
    """`emdiff sample`: by accumulating measurements, or by parallel chains where the prior has fixed levels."""
    device = resolve_device(device)
    prior = load_prior(prior_file(run), device)
    generator, own = stream(seed, "sample", device=device), own_levels(prior)
    many = steps or 1000
    bar = tqdm(total=count if own is None else many, desc="samples" if own is None else "steps", leave=False, file=sys.stderr)
    update = lambda done: bar.update(done - bar.n)
    if own is None:
        x = sample_prior(prior, count, generator, levels, steps or 0, progress=update)
    else:
        every = max(1, many // 20)
        x, restarts = run_chain(prior, ChainWalk(own, delta=min(own) / 2), many, every, generator, count=count, progress=update)
        print(f"{count} chains of {many} steps through the prior's own M-density, M = {len(own)}; {restarts} times one diverged and was set back")
    bar.close()
    write_arrays(out, x=x.numpy())
    picture = out.with_suffix(".png")
    save_samples(picture, x[:64], f"samples of {run.name}")
    print(f"{count} samples of shape {prior.shape} -> {out}, picture {picture}")
    print(f"next: look at {picture}; np.load('{out}')['x'] is in the units of the data")


def chain_command(
    run: Path, out: Path, steps: int, every: int, sigma: float | None, measurements: int, walk: dict[str, Any], keep: int, seed: int, device: str
) -> None:
    """`emdiff sample --chain`."""
    device = resolve_device(device)
    prior = load_prior(prior_file(run), device)
    if prior.scale.channels:
        raise UsageError(f"{run}: this prior standardises each channel by itself, so one sigma is not one M-density; sample it without --chain")
    own = own_levels(prior)
    if own is not None and sigma is not None:
        raise UsageError(f"--sigma {sigma:g}: this prior was made for its own levels, {', '.join(f'{s:.4g}' for s in own[:8])}; leave --sigma out")
    if own is not None and walk["warm_start"]:
        raise UsageError("--warm_start true comes down from coarser levels, and this prior has its own only; leave it out")
    levels = own or (sigma or LEVEL * prior.scale.std,) * measurements
    chain = ChainWalk(levels, **{**walk, "delta": walk["delta"] or min(levels) / 2})
    tau = float(density(prior, chain, device).sigma.square().reciprocal().sum().rsqrt())
    if own is None and tau < prior.tau_last:
        raise UsageError(
            f"--sigma {levels[0]:g} with --measurements {measurements} makes an effective noise of {tau * prior.scale.std:.3g}, and the prior was "
            f"trained down to {prior.tau_last * prior.scale.std:.3g}; raise --sigma or lower --measurements"
        )
    net = digit_classifier(prior.shape, prior.scale.mean)
    classify = None if net is None else lambda x: net(x).softmax(1)
    figures = ChainFigures(prior.shape, keep, classify)
    bar = tqdm(total=steps, desc="steps", leave=False, file=sys.stderr)
    run_chain(prior, chain, steps, every, stream(seed, "chain", device=device), figures, progress=lambda done: bar.update(done - bar.n))
    bar.close()
    found = {"steps": steps, "every": every, "seed": seed, "walk": chain._asdict(), "tau": tau * prior.scale.std, **figures.figures()}
    at, x = zip(*figures.gallery.items)
    write_arrays(out, x=torch.stack(x).numpy(), step=torch.tensor(at).numpy())
    write_json(out.with_suffix(".json"), found)
    save_samples(out.with_suffix(".png"), torch.stack(x)[:: max(1, len(x) // 400)][:400], f"one chain of {run.name}, {steps} steps", columns=20)
    print(f"one chain of {steps} steps, a jump every {every}; {len(x)} kept -> {out}, figures and picture beside it as .json and .png")
    print(f"set back {found['restarts']} times; stuck {found['stuck']} times; autocorrelation time {found['autocorrelation_time']:.1f} jumps")
    if net is not None:
        shares = ", ".join(f"{c / found['jumps']:.3f}" for c in found["classes"])
        print(f"classes visited {found['classes_visited']} of 10, shares {shares}; longest stay {found['longest_stay']} jumps")


def denoise_command(run: Path, data: Observations, out: Path, rate: float | None, steps: int, device: str) -> None:
    """`emdiff denoise`; with a rate, the flow too."""
    device = resolve_device(device)
    prior = load_prior(prior_file(run), device)
    check_shape(prior, data, run)
    standard = prior.scale.observations(data)
    direct = standard.observer.as_measurement(standard.obs)
    if direct is None:
        raise UsageError(f"observer {data.observer.name} mixes entries of x, so no single step denoises it; use emdiff reconstruct")
    z, sigma = direct[0].to(device), direct[1].expand(direct[0].shape).to(device)
    own = own_levels(prior)
    if own is not None and not (len(own) == 1 and bool((sigma * prior.scale.std - own[0]).abs().max() < 1e-4)):
        raise UsageError(
            f"this prior was made for measurements of levels {', '.join(f'{s:.4g}' for s in own[:8])}; train a pooled one for other noise"
        )
    if rate is not None and not bool((sigma == sigma.flatten()[0]).all()):
        raise UsageError("--flow true needs one noise level for all entries: the flow is that of one M-density")
    found: dict[str, list[Tensor]] = {"x": [], "attractor": [], "steps": [], "converged": []}
    bar = tqdm(total=len(z), desc="data", leave=False, file=sys.stderr)
    for i in range(0, len(z), 500):
        y, s = z[i : i + 500], sigma[i : i + 500, None]
        level = sigma.flatten()[:1]
        with torch.inference_mode():
            found["x"].append(prior.scale.restore(prior.denoiser.xhat(y[:, None], s if own is None else level)).cpu())
            if rate is not None:
                end = flow(lambda y, s=level: prior.denoiser.xhat(y[:, None], s), y, rate, steps)
                for name, value in (("attractor", prior.scale.restore(end.y)), ("steps", end.steps), ("converged", end.converged)):
                    found[name].append(value.cpu())
        bar.update(len(y))
    bar.close()
    arrays = {name: torch.cat(parts) for name, parts in found.items() if parts}
    write_arrays(out, **{name: value.numpy() for name, value in arrays.items()})
    rows = {"denoised": arrays["x"]} | ({"attractor": arrays["attractor"]} if rate is not None else {})
    save_rows(out.with_suffix(".png"), {"observation": data.obs, **rows} if data.obs.shape[1:] == data.shape else rows)
    print(f"{len(z)} observations denoised in a single step -> {out}, picture {out.with_suffix('.png')}")
    if rate is not None:
        print(f"attractors: {int(arrays['converged'].sum())} reached, in a median of {int(arrays['steps'].median())} steps")
