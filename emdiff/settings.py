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
        tau_relax: Level of the last jump in over-relaxed iterations.
        levels: Levels from first to last, one network evaluation each.
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
    levels: int = 32
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
            Gaussian start, which trains no network.
        batch: Data per step.
        rate: Learning rate of Adam.
    """

    steps: Optional[int] = None
    start_steps: int = 1200
    batch: int = 128
    rate: float = 2e-3
