"""What nobody sees is told: entries exactly, directions to within the probe's accuracy."""

import math

import pytest
import torch
from exact import normal, uniform

from emdiff.data import Observations
from emdiff.identify import blind_spots, seen_power, unseen_directions
from observers import Identity, Mask, Projection, build

N, S, d = 60, (6, 5), 30
ONE = torch.tensor(0.5)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def observed(observer) -> Observations:
    return Observations(observer.simulate(torch.randn(N, *observer.shape, generator=generator(), dtype=observer.std().dtype), generator()), observer)


def test_the_power_of_an_entry_is_the_diagonal_of_the_summed_operators() -> None:
    P = Projection(S, torch.tensor(0.5, dtype=torch.float64), normal(N, 4, d))
    many = [seen_power(observed(P), torch.Generator().manual_seed(seed)) for seed in range(300)]
    torch.testing.assert_close(torch.stack(many).mean(0).flatten(), P.matrix.square().sum((0, 1)), rtol=0.1, atol=0)


@pytest.mark.parametrize("hidden", [1, 7])
def test_a_fixed_mask_is_told_with_the_number_of_entries_it_hides(hidden: int) -> None:
    mask = torch.ones(1, d, dtype=torch.bool)
    mask[0, :hidden] = False
    (line,) = blind_spots(observed(Mask(S, ONE, mask.reshape(1, *S))), generator())
    assert line.startswith(f"{hidden} of 30 entries of x are seen by no datum")
    below = build("compose", S, {"0.observer": "mask", "0.mask": mask.reshape(1, *S), "1.observer": "blur", "1.psf": torch.ones(1, 3, 3)}, ONE)
    assert blind_spots(observed(below), generator())[0].startswith(f"{hidden} of 30 entries")


def test_nothing_is_said_where_every_entry_and_direction_is_seen_by_some_datum() -> None:
    varied = Mask(S, ONE, uniform(N, *S) < 0.3)
    projections = Projection(S, ONE, normal(N, 2, d).float())
    sensing = build("compressed", S, {"seeds": torch.arange(N), "rows": 3}, ONE)
    for observer in (Identity(S, ONE), varied, projections, sensing):
        assert blind_spots(observed(observer), generator()) == []


@pytest.mark.parametrize("rows", [6, 15, 27])
def test_directions_outside_a_shared_projection_are_told(rows: int) -> None:
    """The random vector's share of a space of 30 - rows directions has a standard deviation of about .1."""
    Q = torch.linalg.qr(normal(d, d))[0][:, :rows].T.float()
    data = observed(Projection(S, ONE, Q[None]))
    shares = [unseen_directions(data, torch.Generator().manual_seed(seed)) for seed in range(40)]
    assert sum(shares) / 40 == pytest.approx(1 - rows / d, abs=4 * math.sqrt(2 / d / 40) / 2)
    (line,) = blind_spots(data, generator())
    assert "next to nothing of" in line and "% of the directions" in line


def test_a_downsampling_that_all_data_share_leaves_directions_and_exposures_at_random_do_not() -> None:
    down = build("downsample", (6, 6), {"factor": 2}, ONE)
    assert unseen_directions(observed(down), generator()) == pytest.approx(0.75, abs=0.25)
    both = build("stack", (6, 6), {"0.observer": "downsample", "0.factor": 2, "1.observer": "mask", "1.mask": uniform(N, 6, 6) < 0.3}, ONE)
    assert blind_spots(observed(both), generator()) == []
