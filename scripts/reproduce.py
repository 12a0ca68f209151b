"""The experiments of Multimeasurement Generative Models (Saremi & Srivastava 2022); each writes a picture and figures to --out.

    python scripts/reproduce.py fig1                       Fig. 1: a mixture's M-density, log-density and score (exact, seconds)
    python scripts/reproduce.py poisson                    Sec. 2.1: estimator, learned denoiser, both walks, against Gamma priors (seconds)
    python scripts/reproduce.py fig5 --run RUN             single-step multidenoising
    python scripts/reproduce.py losses --run RUN           loss per image at 1/4 x 1 (= 1 x 16) and other levels, training and test digits
    python scripts/reproduce.py quality --run RUN          Frechet distance and class frequencies of 5,000 samples; --chain RUN.npz: of one chain's
    jumps
    python scripts/reproduce.py fig7 --run RUN             mixing against quality for M = 1, 2, 4, 16
    python scripts/reproduce.py more --run RUN             "more is different": 1/4 x 1 against 1 x 16
    python scripts/reproduce.py lifelong --run RUN         one chain of --steps steps on MNIST
    python scripts/reproduce.py muvb --run RUN --rival RUN MDAE against MUVB: mixing and quality of chains of equal length

RUN is a run folder of `emdiff train`, such as `emdiff train --config configs/mnist_cpu.yaml --data mnist --out RUN`. That is the size for a CPU; the
paper's networks have `configs/mnist_*_gpu.yaml`, for minutes of a GPU, and `configs/mnist_1x16.yaml` and the like, for hours. Networks run on a GPU
where there is one.
Frechet distances are in 64 features of the classifier of scripts/mnist_features.py, to the 60,000 training digits; all test digits score 3.2, every
second one 4.4.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emdiff.chain import ChainWalk, own_levels, run_chain
from emdiff.chain_figures import ChainFigures
from emdiff.classifier import digit_classifier
from emdiff.figures import save_fields, save_rows, save_samples
from emdiff.files import write_json
from emdiff.finished import prior_file
from emdiff.measurement import measure
from emdiff.mixture import MixtureDenoiser
from emdiff.models import fixed_levels
from emdiff.nn import MLP
from emdiff.objectives import errors
from emdiff.plan import resolve_device
from emdiff.poisson import GammaDenoiser, PoissonLoss, PoissonMDAE, count, exact_moments, gibbs_walk, plain_moments
from emdiff.prior import Prior, load_prior, sample_prior
from emdiff.streams import stream
from emdiff.training import Optimiser, train


def report(args: argparse.Namespace, name: str, figures: dict[str, Any], clock: float) -> None:
    """Print and write figures, with what made them."""
    figures |= {
        "seconds": time.perf_counter() - clock,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "run": str(args.run),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{name}.json", figures)
    print(name, json.dumps(figures))


def digits(args: argparse.Namespace, part: str = "train") -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) in [0, 1] and labels."""
    with np.load(args.data) as file:
        return torch.from_numpy(file[f"{part}_images"]).float() / 255, torch.from_numpy(file[f"{part}_labels"]).long()


def prior_of(args: argparse.Namespace, run: Path | None = None) -> Prior:
    """The prior of a run folder, or of a file."""
    return load_prior(prior_file(run or args.run), args.device)


def fig1(args: argparse.Namespace) -> None:
    """The M-density (M = 2, equal levels) of a mixture of Gaussians in one dimension."""
    clock = time.perf_counter()
    weights, means, variances = torch.tensor([0.4, 0.6]), torch.tensor([-2.0, 2.0]), torch.tensor([0.3, 0.6])
    sigma = torch.tensor([1.0, 1.0])
    grid = torch.linspace(-6, 6, 181)
    y = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1).reshape(-1, 2, 1).double()
    covs = variances[:, None, None] * torch.ones(2, 2) + torch.diag(sigma**2)
    parts = [
        torch.distributions.MultivariateNormal(m.expand(2).double(), c.double()).log_prob(y[..., 0]) + w.log()
        for w, m, c in zip(weights, means, covs)
    ]
    log_p = torch.logsumexp(torch.stack(parts), 0).reshape(181, 181)
    exact = MixtureDenoiser(weights.double(), means[:, None].double(), variances[:, None, None].double())
    score = exact.score(y, sigma.double()).reshape(181, 181, 2)
    step = float(grid[1] - grid[0])
    slope = torch.stack(torch.gradient(log_p, spacing=step, dim=(1, 0), edge_order=2), -1)
    args.out.mkdir(parents=True, exist_ok=True)
    save_fields(args.out / "fig1.png", grid.numpy(), log_p.numpy(), score.numpy())
    gap = float((score - slope)[2:-2, 2:-2].abs().max() / score.abs().max())
    report(args, "fig1", {"mass": float(log_p.exp().sum() * step**2), "score_against_differences": gap,
                          "permutation_gap": float((log_p - log_p.T).abs().max())}, clock)  # fmt: skip


def poisson(args: argparse.Namespace) -> None:
    """Gamma(2.5, 0.8) counted M times: risk of a learned denoiser over the least, and second moments of both walks over the M-density's."""
    clock, a, b, figures = time.perf_counter(), 2.5, 0.8, {}
    for M in (2, 4, 16):
        generator = stream(args.seed, "poisson", M)
        x = torch._standard_gamma(torch.full((20_000, 2), a), generator=generator) / b
        torch.manual_seed(args.seed)
        learned = train(PoissonMDAE(MLP((2,), 32, 1), float(x.mean())), PoissonLoss(x, M), len(x), 800, 256, seed=args.seed,
                        optimiser=Optimiser(rate=3e-3)).denoiser  # fmt: skip
        exact = GammaDenoiser(torch.tensor(a), torch.tensor(b))
        fresh = torch._standard_gamma(torch.full((50_000, 2), a), generator=generator) / b
        y, least = count(fresh, M, generator), float(exact.risk(M))
        figures[f"M{M}"] = {
            "risk": float(learned.loss(fresh, y).mean()),
            "risk_least": least,
            "risk_mean_count": float((y.mean(1) - fresh).square().mean()),
            "exact": exact_moments(a, b)._asdict(),
            "plain_theory": plain_moments(a, b, M)._asdict(),
            "plain_exact_denoiser": walked(exact, y[:20_000], 20 * M, False, generator),
            "spread_exact_denoiser": walked(exact, y[:20_000], 20 * M, True, generator),
            "plain_learned": walked(learned, y[:20_000], 20 * M, False, generator),
            "spread_learned": walked(learned, y[:20_000], 20 * M, True, generator),
        }
    report(args, "poisson", figures, clock)


@torch.no_grad()
def walked(denoiser: Any, y: Tensor, steps: int, spread: bool, generator: torch.Generator) -> dict[str, float]:
    """Mean, variance and covariance between measurements after `steps` replacements."""
    end = gibbs_walk(denoiser, y, steps, spread, generator).double()
    c = torch.stack([torch.cov(end[..., j].T) for j in range(end.shape[2])]).mean(0)
    M = y.shape[1]
    return {"mean": float(end.mean()), "variance": float(c.diagonal().mean()), "covariance": float((c.sum() - c.trace()) / (M * (M - 1)))}


@torch.no_grad()
def fig5(args: argparse.Namespace) -> None:
    """Clean, one measurement, the M outputs and the mean of the measurements; the spread of the outputs over their error."""
    clock, prior = time.perf_counter(), prior_of(args)
    x, generator, own = digits(args, "test")[0][:500].to(args.device), stream(args.seed, "fig5", device=args.device), own_levels(prior)
    sigma = torch.tensor(own or (1.0,) * args.measurements, device=args.device)
    y = measure(x, sigma, generator)
    levels = fixed_levels(prior.denoiser)
    nu = prior.scale.restore(prior.denoiser.nu(prior.scale.standardise(y), sigma / prior.scale.std if levels is None else levels))
    spread = float(nu.var(1, unbiased=False).flatten(1).sum(1).mean())
    error = float((nu - x[:, None]).square().flatten(2).sum(2).mean())
    rows = {"x": x, "y_1": y[:, 0], **{f"nu_{m + 1}": nu[:, m] for m in range(min(4, nu.shape[1]))}, "mean of y": y.mean(1)}
    args.out.mkdir(parents=True, exist_ok=True)
    save_rows(args.out / "fig5.png", {name: row.cpu() for name, row in rows.items()})
    plug = float((y.mean(1) - x).square().flatten(1).sum(1).mean())
    report(args, "fig5", {"measurements": len(sigma), "outputs_variance": spread, "outputs_error": error, "plug_in_error": plug}, clock)


@torch.no_grad()
def losses(args: argparse.Namespace) -> None:
    """Loss per image (sum of squares) at levels of the paper; training digits as the paper reports, and test digits."""
    clock, prior = time.perf_counter(), prior_of(args)
    levels, figures = fixed_levels(prior.denoiser), {}
    for part in ("train", "test"):
        x = prior.scale.standardise(digits(args, part)[0][:10_000].to(args.device))
        for name, tau in {"1x1": 1.0, "1x4": 0.5, "1x16_quarter_1x1": 0.25}.items() if levels is None else {"own": 0.0}.items():
            sigma = torch.tensor([tau / prior.scale.std], device=args.device) if levels is None else levels
            generator = stream(args.seed, "losses", part, device=args.device)
            L = [errors(prior.denoiser, batch, measure(batch, sigma, generator), sigma).mean(1) for batch in x.split(500)]
            figures[f"{part}_{name}"] = prior.scale.std**2 * float(torch.cat(L).mean())
    report(args, "losses", figures, clock)


class Judge:
    """Frechet distance to the training digits, and class frequencies."""

    def __init__(self, args: argparse.Namespace) -> None:
        from mnist_features import mnist_features

        from emdiff.metrics import FeatureDistance

        x, labels = digits(args)
        self.share = torch.bincount(labels, minlength=10) / len(labels)
        self.distance = FeatureDistance(mnist_features(x, labels, args.out), x[:, None])
        self.net = digit_classifier((28, 28), float(x.mean()))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> dict[str, Any]:
        """Figures of images (n, 28, 28)."""
        found = torch.cat([self.net(part).argmax(1) for part in x.split(1000)])
        share = torch.bincount(found, minlength=10) / len(x)
        ratio = share / self.share
        return {"count": len(x), "frechet": self.distance(x[:, None]).frechet, "frechet_cut": self.distance(x.clamp(0, 1)[:, None]).frechet,
                "class_shares": [round(float(s), 4) for s in share],
                "class_ratio_least": float(ratio.min()), "class_ratio_most": float(ratio.max())}  # fmt: skip


def quality(args: argparse.Namespace) -> None:
    """Frechet distance and classes of samples by accumulating measurements, of one chain's jumps if given, and of test digits."""
    clock, judge = time.perf_counter(), Judge(args)
    test = digits(args, "test")[0]
    figures = {"test_digits": judge(test[:: max(1, len(test) // args.count)][: args.count])}  # the first half is of other writers than the second
    if args.chain:
        with np.load(args.chain) as file:
            figures["chain"] = judge(torch.from_numpy(file["x"]))
    x = sample_prior(prior_of(args), args.count, stream(args.seed, "quality", device=args.device), count_levels=args.levels)
    figures["samples"] = judge(x)
    save_samples(args.out / "samples.png", x[:200], f"samples of {args.run.name}", columns=20)
    report(args, "quality", figures, clock)


def follow(
    args: argparse.Namespace,
    prior: Prior,
    sigma: tuple[float, ...],
    steps: int,
    every: int,
    name: str,
    keep: int = 1024,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, dict[str, Any]]:
    """One chain's jumps (n, 28, 28) and its diagnostics; Algorithm 1 with delta = sigma/2, gamma = 1/4, u = 1, unless told otherwise. Pooled priors
    start warm, or where --start says."""
    net = digit_classifier(prior.shape, prior.scale.mean)
    figures = ChainFigures(prior.shape, keep, None if net is None else lambda x: net(x).softmax(1))
    warm = args.start == "warm" and own_levels(prior) is None
    chain = ChainWalk(sigma, delta=args.delta * min(sigma), gamma=args.gamma, step=args.step, warm_start=warm)
    x = digits(args, "test")[0][:1] if args.start == "digit" else None
    run_chain(prior, chain, steps, every, stream(args.seed, name, device=args.device), figures, progress=progress, x=x)
    return torch.stack([x for _, x in figures.gallery.items]), figures.figures() | {"delta": chain.delta, "sigma": sigma[0], "M": len(sigma)}


def fig7(args: argparse.Namespace) -> None:
    """Chains for M = 1, 2, 4, 16 at sigma = 1: mixing against quality."""
    clock, prior, judge, figures = time.perf_counter(), prior_of(args), Judge(args), {}
    for M in (1, 2, 4, 16):
        x, found = follow(args, prior, (1.0,) * M, args.steps, args.every, f"fig7 {M}")
        figures[f"1x{M}"] = {k: v for k, v in found.items() if k != "classes_by_window"} | judge(x)
        save_samples(args.out / f"fig7_M{M}.png", x[:200], f"1 x {M}, {args.every} steps apart", columns=20)
    report(args, "fig7", figures, clock)


def more(args: argparse.Namespace) -> None:
    """1/4 x 1 against 1 x 16, which have one effective noise: the same loss, and chains that differ in how they mix."""
    clock, prior, figures = time.perf_counter(), prior_of(args), {}
    for name, sigma in {"quarter_1x1": (0.25,), "1x16": (1.0,) * 16}.items():
        x, found = follow(args, prior, sigma, args.steps, args.every, name)
        figures[name] = {k: v for k, v in found.items() if k != "classes_by_window"}
        save_samples(args.out / f"more_{name}.png", x[:200], f"{name}, {args.every} steps apart", columns=20)
    report(args, "more", figures, clock)


def lifelong(args: argparse.Namespace) -> None:
    """One chain of --steps steps, its classes over time, and the Frechet distance of its jumps beside that of parallel samples."""
    clock, prior, peaks = time.perf_counter(), prior_of(args), []

    def watch(done: int) -> None:
        if done * 5 >= args.steps * (len(peaks) + 1):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    sigma = own_levels(prior) or (1.0,) * args.measurements
    x, found = follow(args, prior, sigma, args.steps, args.every, "lifelong", keep=8192, progress=watch)
    found |= {"steps_per_second": args.steps / (time.perf_counter() - clock), "peak_mb_by_fifth": peaks}
    args.out.mkdir(parents=True, exist_ok=True)
    save_samples(args.out / "lifelong.png", x[:: max(1, len(x) // 600)][:600], f"one chain, {args.steps} steps", columns=30)
    np.savez(args.out / "lifelong.npz", x=x.numpy())
    report(args, "lifelong", found | (Judge(args)(x) if len(x) >= 500 else {}), clock)


def muvb(args: argparse.Namespace) -> None:
    """Chains of equal length of two runs, each at its own levels or at 1 x --measurements."""
    clock, judge, figures = time.perf_counter(), Judge(args), {}
    for run in (args.run, args.rival):
        prior = prior_of(args, run)
        x, found = follow(args, prior, own_levels(prior) or (1.0,) * args.measurements, args.steps, args.every, "muvb")
        figures[run.name] = {k: v for k, v in found.items() if k != "classes_by_window"} | judge(x)
        save_samples(args.out / f"muvb_{run.name}.png", x[:200], run.name, columns=20)
    report(args, "muvb", figures, clock)


COMMANDS = {f.__name__: f for f in (fig1, poisson, fig5, losses, quality, fig7, more, lifelong, muvb)}


def main() -> None:
    """Parse, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=COMMANDS)
    parser.add_argument("--run", type=Path, default=Path("runs/mnist_cpu"))
    parser.add_argument("--rival", type=Path, default=Path("runs/muvb_mnist_1x4_cpu"))
    parser.add_argument("--chain", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mnist.npz"))
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--measurements", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--delta", type=float, default=0.5, help="step in units of sigma; the paper's is 1 for 1 x 4")
    parser.add_argument(
        "--start",
        choices=["warm", "uniform", "digit"],
        default="warm",
        help="of chains: by accumulating measurements, Remark 4, or measurements of the first test digit",
    )
    parser.add_argument("--gamma", type=float, default=0.25)
    parser.add_argument("--step", choices=["sachs", "cheng", "overdamped"], default="sachs")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where networks run")
    args = parser.parse_args()
    args.device = resolve_device(args.device)
    COMMANDS[args.experiment](args)


if __name__ == "__main__":
    main()
