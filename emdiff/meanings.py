"""What the figures of a fit and of an evaluation mean to a reader, and what a good value looks like."""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """A figure in words.

    Attributes:
        label: What it is.
        good: What a good value looks like; empty where there is none.
        truth: Whether it needs the truth.
        target: The value to reach, drawn as a line; None where there is none.
    """

    label: str
    good: str = ""
    truth: bool = False
    target: float | None = None


MEANINGS = {
    "chi2": Meaning("residual χ² of posterior samples", "1; below: samples follow the noise; above: they over-smooth", target=1.0),
    "noise_std": Meaning("noise level, as estimated with --noise-std auto", "settled, within a few per cent"),
    "chi2_spread": Meaning("spread to expect of χ²", "χ² lies within 4 of these of 1"),
    "chi2_datum_std": Meaning("std over data of χ² per datum", "its expected value, in the next row"),
    "chi2_datum_std_expected": Meaning("its expected value"),
    "observation_agreement": Meaning("re-observed prior samples: distance to observations / floor", "near 1: cannot be told apart", target=1.0),
    "observation_agreement_error": Meaning("its standard error, over random sets of observations"),
    "sliced_wasserstein": Meaning("sliced Wasserstein distance, re-observed prior samples to observations", "near its floor"),
    "energy": Meaning("energy distance, re-observed prior samples to observations", "near its floor"),
    "sliced_wasserstein_ratio": Meaning("sliced Wasserstein distance / floor", "near 1: cannot be told apart; above 3: wrong", target=1.0),
    "energy_ratio": Meaning("energy distance / floor", "near 1: cannot be told apart; above 3: wrong", target=1.0),
    "mean_drift": Meaning("drift of the mean per iteration, in data std", "below .01: the fit has settled"),
    "std_drift": Meaning("drift of the std per iteration, in data std", "below .01: the fit has settled"),
    "autocorrelation_time": Meaning("autocorrelation time, in samples", "1: successive samples are independent"),
    "ess": Meaning("effective sample size per 1000 chain states", "near 1000"),
    "ess_share": Meaning("effective samples per sample", "near 1"),
    "solver_residual": Meaning("relative residual of the linear solver", "below about .1; 0 where no solver is needed"),
    "solver_iterations": Meaning("iterations of the linear solver", "below the limit --walk.iterations"),
    "shrunk": Meaning("mean share by which --strata drew samples in", "falls"),
    "restarted": Meaning("chains started again", "0, or few"),
    "restarted_share": Meaning("chains started again, per sample", "0"),
    "kept": Meaning("data whose draw was kept from the iteration before", "0, or few"),
    "loss": Meaning("training loss of the M-step", "levels off"),
    "sample_mean": Meaning("mean of posterior samples", "levels off"),
    "sample_std": Meaning("std of posterior samples", "levels off"),
    "prior_mean": Meaning("mean of prior samples", "that of posterior samples"),
    "prior_std": Meaning("std of prior samples", "that of posterior samples"),
    "seconds": Meaning("seconds, whole iteration"),
    "seconds_e": Meaning("seconds, E-step"),
    "seconds_m": Meaning("seconds, M-step"),
    "error": Meaning("mean squared error of one sample, per entry", "small; one sample cannot go below the posterior's spread", True),
    "error_mean": Meaning("mean squared error of the posterior mean, per entry", "about half that of one sample if calibrated", True),
    "psnr": Meaning("PSNR of one sample, dB", "large", True),
    "psnr_mean": Meaning("PSNR of the posterior mean, dB", "large; above one sample", True),
    "ssim": Meaning("structural similarity of one sample", "near 1", True),
    "ssim_mean": Meaning("structural similarity of the posterior mean", "near 1", True),
    "sharpness": Meaning("mean width of the 80 % interval", "small, at correct coverage", True),
    "coverage_50": Meaning("coverage of the 50 % interval", ".50", True, 0.5),
    "coverage_80": Meaning("coverage of the 80 % interval", ".80", True, 0.8),
    "coverage_80_weighted": Meaning("coverage of the 80 % interval, entries weighted by their posterior variance", ".80", True, 0.8),
    "coverage_95": Meaning("coverage of the 95 % interval", ".95", True, 0.95),
    "sbc_pvalue": Meaning("simulation-based calibration: p-value", "above .01; with many data see the deviation instead", True),
    "sbc_deviation": Meaning("simulation-based calibration: largest distance to the uniform law", "near 0", True),
    "tarp": Meaning("TARP: largest distance to the diagonal", "near 0", True),
    "tarp_pvalue": Meaning("TARP: p-value", "above .01; with many data see the distance instead", True),
    "crps": Meaning("continuous ranked probability score", "small", True),
    "frechet": Meaning("Fréchet distance, posterior samples", "near its floor; compares only within one feature network", True),
    "kernel": Meaning("kernel distance, posterior samples", "near its floor; compares only within one feature network", True),
    "frechet_prior": Meaning("Fréchet distance, prior samples", "near the floor of posterior samples", True),
    "kernel_prior": Meaning("kernel distance, prior samples", "near the floor of posterior samples", True),
    "std_ratio": Meaning("std of samples / std of truth", "1", True, 1.0),
}
"""Every figure that a fit or an evaluation writes, in the order in which it is shown."""

FIRST = ("chi2", "observation_agreement", "sample_std", "error", "std_ratio", "loss")
"""Figures drawn first; the others are folded away."""


def meaning(name: str) -> Meaning:
    """The meaning of a figure; its bare name where nobody wrote one down.

    >>> meaning("chi2").target, meaning("my_figure").label
    (1.0, 'my_figure')
    """
    return MEANINGS.get(name, Meaning(name))


def order(names: set[str]) -> list[str]:
    """Names in the order of MEANINGS, unknown ones last."""
    known = list(MEANINGS)
    return sorted(names, key=lambda name: (known.index(name) if name in MEANINGS else len(known), name))
