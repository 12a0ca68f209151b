r"""Data larger than memory: rows are those of the whole array wherever it lies, fits from files equal fits from memory bit for bit, and memory does
not grow with the number of data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from exact import normal
from torch import Tensor

from emdiff import commands, rows
from emdiff.archive import open_archive
from emdiff.cli import main
from emdiff.data import Data, Observations
from emdiff.em import RETRIES, Walk
from emdiff.errors import UsageError
from emdiff.files import sha256
from emdiff.fit import run_fit
from emdiff.observations import open_data, open_observations, open_truth, read_observations, write_observations
from emdiff.outline import Plan
from emdiff.rows import Rows, in_memory, spans
from emdiff.runs import Run
from emdiff.scale import estimate_scale
from emdiff.start import Choice
from emdiff.stored import open_rows
from emdiff.streams import stream
from emdiff.written import NewArchive, NewArray
from observers import Mask, Projection

N, S = 40, (3, 4)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array stays in its file, and passes take a few rows at a time."""
    monkeypatch.setattr(rows, "SMALL", 0)
    monkeypatch.setattr(rows, "ENTRIES", 7 * 12)


def h5(path: Path, array: np.ndarray, **how: Any) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("obs", data=array, **how)


def folder(path: Path, **arrays: Any) -> Path:
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


PLACES: dict[str, tuple[str, Callable[[Path, np.ndarray], object]]] = {
    "npz": ("a.npz", lambda path, array: np.savez(path, other=array[:3], obs=array)),
    "npz, Fortran": ("a.npz", lambda path, array: np.savez(path, obs=np.asfortranarray(array))),
    "npz, compressed": ("a.npz", lambda path, array: np.savez_compressed(path, obs=array)),
    "npz, compressed Fortran": ("a.npz", lambda path, array: np.savez_compressed(path, obs=np.asfortranarray(array))),
    "folder": ("a", lambda path, array: folder(path, obs=array)),
    "h5": ("a.h5", lambda path, array: h5(path, array)),
    "h5, chunks": ("a.h5", lambda path, array: h5(path, array, chunks=(6, 3, 2))),
    "h5, compressed": ("a.h5", lambda path, array: h5(path, array, chunks=(6, 3, 4), compression="gzip")),
}


def opened(path: Path, name: str = "obs") -> Rows:
    with open_archive(path, (".npz", ".h5", ".npy")) as file:
        return open_rows(path, file, name)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "u1"])
@pytest.mark.parametrize("place", PLACES)
def test_rows_are_those_of_the_array_wherever_it_lies(tmp_path: Path, place: str, dtype: str) -> None:
    name, write = PLACES[place]
    array = (40 * normal(N, *S).abs()).numpy().astype(dtype)
    write(tmp_path / name, array)
    found = opened(tmp_path / name)
    whole = torch.from_numpy(array.astype(np.float32))
    assert found.shape == array.shape and found.dtype == array.dtype and found[:2].dtype == (torch.uint8 if dtype == "u1" else torch.float32)
    for index in (slice(None), slice(3, 9), slice(35, 99), slice(9, 9), torch.tensor([5, 3, 39, 3, 0])):
        assert torch.equal(found[index].float(), whole[index]) and found[index].is_contiguous()
    assert torch.equal(torch.cat([found[part] for part in spans(N, 12)]).float(), whole)
    with pytest.raises((IndexError, OSError)):
        found[torch.tensor([3, N])]


def test_rows_of_numbers_and_files_cut_short(tmp_path: Path) -> None:
    values = np.arange(N, dtype=np.float32)
    found = opened(folder(tmp_path / "a", obs=values))
    assert found[torch.tensor([7, 2])].tolist() == [7, 2] and found[5:7].tolist() == [5, 6]
    os.truncate(tmp_path / "a" / "obs.npy", 200)
    with pytest.raises(UsageError, match="obs.npy: ends before row 30 of 40"):
        found[30:]


@pytest.mark.parametrize("place", ["npz", "folder", "h5", "npz, compressed"])
def test_an_open_file_that_is_replaced_goes_on_giving_the_old_rows(tmp_path: Path, place: str) -> None:
    """A fit that runs must not change its data midway because a file of that name was written anew."""
    name, write = PLACES[place]
    path, old = tmp_path / name, normal(N, *S).float().numpy()
    write(path, old)
    found = opened(path)
    path.rename(tmp_path / "moved")
    write(path, old + 1)
    assert torch.equal(found[2:4], torch.from_numpy(old[2:4])) and torch.equal(opened(path)[2:4], torch.from_numpy(old[2:4] + 1))


@pytest.mark.parametrize("place", ["npz, compressed", "h5, compressed"])
def test_compressed_arrays_are_unpacked_once_and_again_when_the_file_changes(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, write = PLACES[place]
    path, array = tmp_path / name, normal(N, *S).float().numpy()
    write(path, array)
    cache = tmp_path / f"{name}.unpacked"
    for _ in range(2):
        assert torch.equal(opened(path)[:5], torch.from_numpy(array[:5]))
    assert capsys.readouterr().err.count(f"note: {path}: obs is compressed; unpacking") == 1
    write(path, array[:30] + 1)
    os.utime(path, ns=(1, 1))
    assert torch.equal(opened(path).all(), torch.from_numpy(array[:30] + 1)) and len(list(cache.iterdir())) == 1
    rows.SMALL = 10**6
    assert torch.equal(opened(path).all(), torch.from_numpy(array[:30] + 1)) and not capsys.readouterr().err.count("note") > 1


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, obs=normal(N, *S).float().numpy())
    (tmp_path / "a.npz.unpacked").write_text("in the way")
    with pytest.raises(UsageError, match="a.npz.unpacked.*cannot be written"):
        opened(path)


def damaged_zip(path: Path) -> None:
    np.savez(path, obs=normal(N, *S).float().numpy())
    content = bytearray(path.read_bytes())
    content[400] ^= 1
    path.write_bytes(content)


def lying_folder(path: Path) -> None:
    folder(path, obs=normal(N, *S).float().numpy())
    content = (path / "obs.npy").read_bytes()
    (path / "obs.npy").write_bytes(content.replace(b"(40, 3, 4), }       ", b"(4000000000, 3, 4), }", 1)[: len(content)])


def lying_deflate(path: Path) -> None:
    """A header that declares more rows than follow it."""
    np.save(path.with_suffix(".npy"), normal(N, *S).float().numpy())
    content = path.with_suffix(".npy").read_bytes().replace(b"(40, 3, 4), }", b"(44, 3, 4), }", 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("obs.npy", content)


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a byte changed": ("a.npz", damaged_zip, "cannot be read"),
    "shape beyond the file": ("a", lying_folder, "more than the file can hold"),
    "shape beyond what is packed": ("a.npz", lying_deflate, "declares shape"),
    "pickled in a folder": ("a", lambda path: folder(path, obs=np.array([{}], object)), "pickled"),
    "words in a folder": ("a", lambda path: folder(path, obs=np.array(["a"])), "real numbers"),
    "no arrays": ("a", lambda path: folder(path), "cannot tell"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_lie_are_refused_and_allocate_nothing(tmp_path: Path, case: str) -> None:
    name, write, fragment = HOSTILE[case]
    write(tmp_path / name)
    with pytest.raises(UsageError, match=fragment) as error:
        open_observations(tmp_path / name, observer="identity", noise_std=0.5)
    assert str(error.value).startswith(f"{tmp_path / name}: ")
    assert not list(tmp_path.glob("*.unpacked/*")), "no half-made cache is left"


@pytest.mark.parametrize("name", ["a.npz", "a.h5"])
def test_a_damaged_large_file_is_read_or_refused_but_never_crashes(tmp_path: Path, name: str) -> None:
    path, draw = tmp_path / name, np.random.default_rng(0)
    write_observations(path, masked(20)[0])
    intact, refused = path.read_bytes(), 0
    for _ in range(200):
        content, start = bytearray(intact), draw.integers(len(intact))
        content[start : start + 3] = draw.bytes(3)
        other = tmp_path / f"other{path.suffix}"
        other.unlink(missing_ok=True)
        other.write_bytes(content[: draw.integers(len(content)) if draw.random() < 0.2 else None])
        try:
            data = open_observations(other)
            assert len(data.rows(slice(0, 5))) == 5 and bool(data.rows(torch.tensor([len(data) - 1])).obs.isfinite().all())
        except UsageError as error:
            refused += 1
            assert str(error).startswith(f"{other}: ") and "\n" not in str(error)
    assert 40 < refused < 200


def test_the_same_arrays_are_the_same_bytes_whenever_they_are_written(tmp_path: Path) -> None:
    """A run knows its observations by the sum of their file, and refuses to go on with others."""
    for name in ("a.npz", "b.npz"):
        with NewArchive(tmp_path / name) as new:
            new.array("obs", (3, 2), np.dtype(np.float32))[slice(0, 3)] = torch.arange(6.0).reshape(3, 2)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert [member.date_time for member in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.npz")["obs"], np.arange(6.0).reshape(3, 2))


def test_new_arrays_have_no_name_before_their_last_row(tmp_path: Path) -> None:
    path, values = tmp_path / "a.npy", normal(5, 2).float()
    new = NewArray(path, (5, 2))
    new[1:3], new[torch.tensor([4, 0])] = values[1:3], values[[4, 0]]
    assert not path.exists() and torch.equal(new[slice(None)], torch.where(torch.tensor([True, True, True, False, True])[:, None], values, 0.0))
    new[3:4] = values[3:4]
    with pytest.raises(ValueError, match="rows of shape"):
        new[0:3] = values[:2]
    assert torch.equal(new.commit()[:], values) and os.listdir(tmp_path) == ["a.npy"] and np.array_equal(np.load(path), values)


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a"])
def test_an_archive_that_fails_midway_leaves_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ZeroDivisionError), NewArchive(tmp_path / name) as new:
        new.array("obs", (5, 2), np.float32)[:2] = torch.ones(2, 2)
        new.put("observer", "identity")
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="other things"):
        NewArchive(tmp_path / "a")


def masked(count: int = 60) -> tuple[Observations, Tensor]:
    """Images of 12 pixels with masks and noise of their own, and the truth."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(count, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    x = x.reshape(count, *S)
    made = Mask(S, 0.3 + torch.rand(count, generator=draw), torch.rand(count, *S, generator=draw) < 0.7)
    return Observations(made.simulate(x, draw), made), x


def projected(count: int = 60) -> tuple[Observations, Tensor]:
    """Vectors through matrices of their own."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, generator=draw) * torch.tensor([1.0, 2.0, 0.5])
    made = Projection((3,), torch.tensor(0.4), torch.randn(count, 2, 3, generator=draw))
    return Observations(made.simulate(x, draw), made), x


class Silent:
    """A listener who does not care."""

    def phase(self, name: str, total: int) -> Callable[..., None]:
        return lambda done, loss=None: None

    def round(self, k: int, metrics: dict[str, Any], pictures: dict[str, Tensor]) -> None:
        assert pictures["samples"].shape[0] > 0


def fitted(folder: Path, file: Path, data: Data, start: str, iters: int = 2) -> tuple[dict[str, Tensor], Tensor, list[dict[str, Any]]]:
    """Weights, last samples and figures of a small fit."""
    scale = estimate_scale(data, stream(0, "scale"))
    fused = start == "self-supervised"
    walk = Walk("fused", levels=3, batch=16) if fused else Walk("cg", tau_first=0.3, levels=2, batch=16, pool=32)
    network = {"kind": "mlp", "width": 8, "blocks": 1}
    plan = Plan(iters, Choice(start, ""), walk, network, start_steps=12, steps=12, batch=16, relax=2 if fused else 0, prior_samples=20)
    with Run(folder, {}, file) as run:
        prior = run_fit(data, scale, plan, run, Silent(), lambda x, rows: {"first": float(x[:1].sum())})
    figures = [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in run.history()]
    return prior.denoiser.state_dict(), run.array(iters, "samples").all(), figures


@pytest.mark.parametrize("start", ["self-supervised", "gaussian"])
def test_a_fit_from_any_file_is_the_fit_from_memory_bit_for_bit(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small passes and batches; a run that was interrupted is continued on another storage of the same data."""
    data, x = masked() if start == "self-supervised" else projected()
    file = tmp_path / "obs.npz"
    write_observations(file, data, x)
    rows.SMALL = 10**9
    weights, samples, figures = fitted(tmp_path / "memory", file, data, start)
    rows.SMALL = 0
    with np.load(file) as stored:
        folder(tmp_path / "obs", **stored)
        with h5py.File(tmp_path / "obs.h5", "w") as h5file:
            for name in stored.files:
                array = stored[name]
                h5file.create_dataset(name, data=np.bytes_(str(array)) if name == "observer" else array, chunks=True if array.ndim > 1 else None)
    for name in ("obs.npz", "obs.h5"):
        again, same, told = fitted(tmp_path / f"run-{name}", file, open_observations(tmp_path / name), start)
        assert torch.equal(samples, same) and all(torch.equal(weights[key], again[key]) for key in weights), name
        assert told == figures, name
    half = tmp_path / "half"
    fitted(half, file, open_observations(tmp_path / "obs"), start, iters=1)
    assert not list(half.glob("*/scratch")) and not list(half.glob("*/.*")), "nothing is left of what a round needed"
    again, same, _ = fitted(half, file, open_observations(tmp_path / "obs.h5"), start)
    assert torch.equal(samples, same) and all(torch.equal(weights[key], again[key]) for key in weights)


def test_gaps_and_bytes_of_a_file_are_found_batch_by_batch(tmp_path: Path) -> None:
    """One NaN in the last row makes the observer a mask in every batch; bytes and float16 are converted there."""
    values = np.arange(N * 12, dtype=np.float16).reshape(N, *S)
    values[-1, 2, 3] = np.nan
    data = open_observations(folder(tmp_path / "a", obs=values), observer="identity", noise_std=0.5)
    first = data.rows(slice(0, 4))
    assert first.observer.name == "mask" and bool(first.observer.observed().all()) and first.obs.dtype == torch.float32
    last = data.rows(torch.tensor([N - 1]))
    assert last.obs[0, 2, 3] == 0 and not last.observer.observed()[0, 2, 3]
    data = open_observations(folder(tmp_path / "b", obs=np.full((N, *S), 51, np.uint8) + np.eye(N, 12, dtype=np.uint8).reshape(N, *S)),
                             observer="identity", noise_std=0.5, uint8_range=True)  # fmt: skip
    assert torch.allclose(data.rows(torch.tensor([20])).obs, torch.tensor(0.2))


@pytest.mark.parametrize("name", ["a.npz", "a.h5", "a"])
def test_observing_in_parts(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part has masks and noise of its own, from one stream; the truth lies beside them."""
    monkeypatch.setattr(commands, "BLOCK", 4 * 12 * 12)
    x = normal(N, *S).float()
    np.save(tmp_path / "x.npy", x.numpy())
    out = f"{tmp_path / name}/" if name == "a" else str(tmp_path / name)
    main(["observe", "--data", str(tmp_path / "x.npy"), "--observer", "mask", "--noise-std", "0.5", "--out", out])
    data, truth = read_observations(tmp_path / name), open_truth(tmp_path / name)
    assert truth is not None and torch.equal(truth.all(), x) and len(data) == N
    seen = data.observer.observed()
    z = (data.obs - x)[seen] / 0.5
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5 and abs(float(z.std()) - 1) < 5 / (2 * len(z)) ** 0.5
    assert len(seen.flatten(1).unique(dim=0)) > N // 2 and len(z.unique()) == len(z), "no part repeats another's draws"
    assert abs(float(seen.float().mean()) - 0.5) < 0.1
    main(["observe", "--data", str(tmp_path / "x.npy"), "--observer", "projection", "--observer.shared", "true", "--noise-std", "0.5", "--out", out])
    shared = read_observations(tmp_path / name)
    assert shared.observer.count is None and shared.obs.shape == (N, 2)


def fitted_masks() -> tuple[Observations, Tensor]:
    """Observations and truth, in obs.npz, and a run of one iteration on them."""
    data, x = masked()
    write_observations("obs.npz", data, x)
    main(["fit", "--observations", "obs.npz", "--out", "run", "--iters", "1", "--train.steps", "20", "--train.start-steps", "20",
          "--walk.levels", "3", "--wandb", "off", "--device", "cpu"])  # fmt: skip
    return data, x


def test_reconstructions_in_parts_and_evaluation_of_a_random_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data, x = fitted_masks()
    monkeypatch.setattr(commands, "BLOCK", 12 * 11)
    main(["reconstruct", "--run", "run", "--observations", "obs.npz", "--out", "r/", "--device", "cpu"])
    samples, mean = np.load("r/samples.npy"), np.load("r/mean.npy")
    assert samples.shape == (60, 4, *S) and np.allclose(samples.mean(1), mean, atol=1e-6) and len(np.unique(samples[:, 0, 0, 0])) == 60
    main(["evaluate", "--run", "run", "--observations", "obs.npz", "--prior-samples", "20", "--samples", "4", "--wandb", "off",
          "--device", "cpu"])  # fmt: skip
    about = json.loads(Path("run/evaluation/metrics.json").read_text())
    assert "evaluating a random 11 of 60 observations" in capsys.readouterr().out
    assert (about["observations_count"], about["observations_total"]) == (11, 60) and about["figures"]["error"] > 0
    chosen = commands.evaluated_rows(data, None, 4, 0)
    arrays = np.load("run/evaluation/arrays.npz")
    assert len(chosen.unique()) == 11 and np.array_equal(arrays["obs"], data.obs[chosen]) and np.array_equal(arrays["truth"], x[chosen])


def test_chains_that_leave_the_range_of_the_fit_are_walked_again_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data, x = fitted_masks()
    again = ["reconstruct", "--run", "run", "--observations", "obs.npz", "--samples", "2", "--out", "r.npz", "--device", "cpu"]
    capsys.readouterr()
    main(again)
    assert "walked again" not in capsys.readouterr().out
    start = Path("run/start/metrics.json")
    start.write_text(json.dumps(json.loads(start.read_text()) | {"bound": 1e-9}))
    main(again)
    assert f"note: {2 * len(x) * RETRIES} chains left the range" in capsys.readouterr().out
    main(["evaluate", "--run", "run", "--observations", "obs.npz", "--prior-samples", "20", "--samples", "4", "--count", "10", "--wandb", "off",
          "--device", "cpu"])  # fmt: skip
    assert json.loads(Path("run/evaluation/metrics.json").read_text())["figures"]["restarted"] == 4 * 10 * RETRIES


def test_the_fingerprint_of_a_folder_tells_its_arrays_apart(tmp_path: Path) -> None:
    a, b = np.zeros(3), np.ones(3)
    prints = [sha256(folder(tmp_path / str(i), **arrays)) for i, arrays in enumerate([{"a": a, "b": b}, {"a": b, "b": a}, {"a": a, "b": b}])]
    assert prints[0] == prints[2] != prints[1]


def test_clean_data_are_checked_to_the_last_row(tmp_path: Path) -> None:
    x = normal(N, *S).float().numpy()
    x[-1, 1, 2] = np.inf
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UsageError, match=r"not finite in 1 of 480 places, the first at \(39, 1, 2\)"):
        open_data(tmp_path / "x.npy")
    assert open_data(tmp_path / "x.npy", 30).shape == (30, *S)
    assert torch.equal(in_memory(x).first(30)[25:99], torch.from_numpy(x[25:30]))


GROWTH = """
import json, resource, sys
from pathlib import Path
import numpy as np
from emdiff import rows
from emdiff.em import Walk
from emdiff.fit import run_fit
from emdiff.outline import Plan
from emdiff.observations import open_observations, open_truth
from emdiff.metrics import truth_figures
from emdiff.runs import Run
from emdiff.scale import estimate_scale
from emdiff.start import Choice
from emdiff.streams import stream

class Silent:
    def phase(self, name, total): return lambda done, loss=None: None
    def round(self, k, metrics, pictures): pass

def write(path, count):
    path.mkdir()
    draw = np.random.default_rng(0)
    for name, dtype in (("obs", np.float16), ("mask", np.uint8), ("x", np.float16)):
        new = np.lib.format.open_memmap(path / f"{name}.npy", "w+", dtype, (count, 32, 32))
        for i in range(0, count, 500):
            new[i:i+500] = draw.integers(0, 2, (500, 32, 32)) if name == "mask" else draw.normal(size=(500, 32, 32), scale=2)
        del new
    np.save(path / "noise_std.npy", 0.5)
    np.save(path / "observer.npy", "mask")
    return sum(f.stat().st_size for f in path.iterdir())

def fit(path, out):
    data, truth = open_observations(path), open_truth(path)
    plan = Plan(2, Choice("self-supervised", ""), Walk("fused", levels=2, batch=250), {"kind": "mlp", "width": 8, "blocks": 1},
                start_steps=4, steps=4, batch=64, prior_samples=100)
    run_fit(data, estimate_scale(data, stream(0, "scale")), plan, Run(out, {}, path), Silent(), lambda x, rows: truth_figures(x, truth))
    return sum(f.stat().st_size for f in out.glob("*/*.npy"))

rows.SMALL, rows.ENTRIES = 2**16, 2**18
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
folder, found = Path(sys.argv[1]), {}
for count in (1000, 8000):
    size = write(folder / f"{count}", count)
    made = fit(folder / f"{count}", folder / f"run{count}")
    found[count] = {"mb": size / 2**20, "made_mb": made / 2**20, "peak_mb": peak()}
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_memory_does_not_grow_with_the_number_of_data(tmp_path: Path) -> None:
    """Start, E-step, M-step and figures of 7,000 images of 32 x 32 more: 34 MB of observations and 109 MB of arrays in the run folder; in memory, any
    one of these arrays would take 27 MB. The allocator is told to hand back what is freed, so that the peak tells what is held."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True, env=environment)
    small, large = json.loads(done.stdout.splitlines()[-1]).values()
    assert large["mb"] - small["mb"] > 33 and large["made_mb"] - small["made_mb"] > 100
    assert large["peak_mb"] - small["peak_mb"] < 16, f"{small} {large}"


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_scaling_benchmark_tells_slopes_and_memory(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parent.parent / "scripts/bench_scaling.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--png", str(tmp_path / "a.png")], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.5 < found["slope_n"] < 1.5 and 0.5 < found["slope_pixels"] < 1.5 and (tmp_path / "a.png").stat().st_size > 5000
    assert abs(found["memory_mb"]["1000"] - found["memory_mb"]["250"]) < 30
