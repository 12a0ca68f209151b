"""What a user can set, in plain dataclasses that only the command line sees. No torch here: `--help` has to answer at once."""

from dataclasses import dataclass
from typing import Literal, Optional


@dataclass
class WalkSettings:
    """The E-step's walk; levels are in units of the data's own standard deviation.

    Args:
        tau_first: Level at which chains re-enter their walk. Unset: with fused guidance every walk starts anew from its observation; with cg
            or gmres 0.3 where chains restart from a pool, else 20, which leaves nothing of where a chain was.
        tau_last: Level of the last jump: structure finer than this is not resolved. Unset: 0.1, or half the noise of the observations if finer.
        tau_relax: Level of the last jump where iterations over-relax since samples spread too much; tau_last is taken for noise below twice that.
        levels: Levels from first to last, one network evaluation each.
        corrected: Give back the spread of x that each level's prediction drops. Without, walks of few levels have less error and too little spread.
            Walks of vectors from a mixture draw that spread and take no notice.
        steps: Langevin steps at each level.
        delta: Their step, in units of the level.
        gamma: Their friction, per unit time in which the level is 1.
        step: Their discretisation: sachs (Algorithm 1), cheng (Algorithm 2) or overdamped.
        iterations: Most solver iterations per step, with cg and gmres.
        tolerance: Largest error of a step's estimate that an unfinished solve may leave, in units of the level.
        coarse: Level above which a solve takes one iteration only.
        batch: Chains walked at once. Unset: 128 on a CPU, 4096 on a GPU.
        pool: Prior samples, resampled by each observation's likelihood, from which chains restart in every iteration; 0 for chains that go on from
            where they were. Unset: 8192 with cg or gmres where x has at most 128 entries, else 0.
    """

    tau_first: Optional[float] = None
    tau_last: Optional[float] = None
    tau_relax: float = 0.25
    levels: int = 24
    corrected: bool = True
    steps: int = 0
    delta: float = 1.0
    gamma: float = 1.0
    step: Literal["sachs", "cheng", "overdamped"] = "sachs"
    iterations: int = 3
    tolerance: float = 0.05
    coarse: float = 1.0
    batch: Optional[int] = None
    pool: Optional[int] = None


@dataclass
class TrainSettings:
    """The M-step's training.

    Args:
        steps: Steps of each M-step. Unset: chosen from the number of observations.
        start_steps: Most steps of the self-supervised start, which held-out observations end earlier; steps of the first M-step after a
            Gaussian start, which trains no network. Unset: what shows 160,000 data; of a U-Net on a GPU at least 2,500.
        batch: Data per step. Unset: for a U-Net 32 on a CPU, on a GPU by their number from 32 to 2048; else 128.
        rate: Learning rate of Adam.
        refresh: Observations walked anew in each iteration, in turn; the M-step trains on all, with the last pair of those it is not the turn of.
            0 for all. Unset: a fifth of more than 5000 images whose observations are fused on a CPU, else all.
    """

    steps: Optional[int] = None
    start_steps: Optional[int] = None
    batch: Optional[int] = None
    rate: float = 2e-3
    refresh: Optional[int] = None


@dataclass
class ModelSettings:
    """What `emdiff train` trains. Unset settings are chosen from the data.

    Args:
        parametrisation: mdae (multidenoising autoencoder), mem (MEM2, an energy), or muvb (an energy with latent variables).
        sigma: Noise levels in the units of the data, for the paper's networks that see all measurements of one set of levels: one value for
            `measurements` equal ones, or one value each. Unset: the network sees their mean, and all levels from tau_last up are trained.
        measurements: M.
        tau_last: Finest level to train where sigma is unset, in units of the data's std.
        network: unet (small, conditioned on the level), u2net (Table 1), resnet (Table 3, for muvb), mlp. Unset: unet for images, mlp else, resnet
            for muvb.
        width: Width factor of u2net and resnet, 1 for the paper's; features of the mlp are 128 times it.
        widths: Channels at each resolution of the unet. Unset: as `emdiff fit` chooses.
        patch: Side of the pixel blocks that the unet folds into channels.
        blocks: Residual blocks at each resolution of the unet.
        latent: Latent variables of muvb.
        metaencoder: Add the metaencoder h to mem or muvb.
        spectral_norm: Normalise the weights of all layers spectrally.
        masks: Also train levels that differ between the entries of a datum, where sigma is unset: what a prior has to know to be the start or the
            oracle of a fit to observations with entries missing or noisier than others. Half of the data are shown so.
    """

    parametrisation: Literal["mdae", "mem", "muvb"] = "mdae"
    sigma: Optional[list[float]] = None
    measurements: int = 1
    tau_last: float = 0.05
    network: Optional[Literal["unet", "u2net", "resnet", "mlp"]] = None
    width: float = 1.0
    widths: Optional[list[int]] = None
    patch: Optional[int] = None
    blocks: int = 1
    latent: int = 64
    metaencoder: bool = False
    spectral_norm: bool = False
    masks: bool = False


@dataclass
class ObjectiveSettings:
    """How `emdiff train` trains.

    Args:
        objective: mean (eq. 14), softmax (the larger of the M losses count more) or mdsm (eq. 16); they differ only where sigma is set.
        optimizer: adam or sgd.
        rate: Learning rate.
        momentum: Of sgd.
        anneal: Let the rate fall linearly to 0 (the paper does not).
        clip: Largest norm of the gradient.
        batch: Data per step.
        steps: Steps in all.
        rounds: Parts of the training; after each the state is saved, figures and pictures are made, and an interrupted training goes on from there.
    """

    objective: Literal["mean", "softmax", "mdsm"] = "mean"
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 2e-3
    momentum: float = 0.9
    anneal: bool = True
    clip: float = 1.0
    batch: int = 128
    steps: int = 4000
    rounds: int = 10
