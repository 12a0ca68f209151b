"""What a fit has to know, and whom it tells of its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from emdiff.em import Walk
from emdiff.start import Choice


class Plan(NamedTuple):
    """All that a fit has to know.

    Attributes:
        iters: EM iterations.
        start: The start, decided.
        walk: The E-step.
        network: Arguments of `build_network`.
        start_steps: Most training steps of the self-supervised start; those of the first M-step after a Gaussian one (`first_steps`).
        steps: Training steps of an M-step.
        batch: Data per training step.
        rate: Learning rate.
        refresh: Observations walked anew in each iteration from the second on, in turn; the others keep their last pair, chain and jump. 0 for all.
        relax: Last iteration that may over-relax, which it does if the samples spread too much or follow the noise (relax).
        strata: Exact iterations take out of their samples what the observations object to, stratum by stratum (strata), in place of the rule
            against following the noise.
        maps: Whether observations are fused whose levels differ between entries or data.
        prior_samples: Prior samples drawn per round for figures.
        seed: Seed of everything random.
        device: "cpu" or "cuda".
        level: Where the noise level is not known, its first estimate, which EM updates; else None.
        init_prior: The prior that EM starts from; None for a start from the observations alone.
        stop: End when the figures that need no truth have stopped to improve, and keep the best iteration (verdict).
        compile: Run the network of the E-step and of prior samples through torch.compile (compiled).
    """

    iters: int
    start: Choice
    walk: Walk
    network: dict[str, Any]
    start_steps: int = 1200
    steps: int = 700
    batch: int = 128
    rate: float = 2e-3
    refresh: int = 0
    relax: int = 0
    strata: bool = False
    maps: bool = False
    prior_samples: int = 500
    seed: int = 0
    device: str = "cpu"
    stop: bool = False
    compile: bool = False
    level: float | None = None
    init_prior: str | None = None


class Listener(Protocol):
    """Whoever is told of a fit's progress."""

    def phase(self, name: str, total: int) -> Callable[..., None]:
        """A phase of `total` units begins; call the result with the units done, and a note."""
        ...

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        """Round k is complete. Pictures are samples (n, *S) in the user's units."""
        ...
