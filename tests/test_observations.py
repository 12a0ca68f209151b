r"""Observations files: what is written is read back, the truth never reaches training, and complaints name file, value and remedy."""

from __future__ import annotations

import errno
import gc
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from emdiff.errors import UsageError
from emdiff.observations import Observations, open_observations, read_data, read_observations, read_truth, write_observations, write_parts
from observers import build

N, S = 5, (2, 3)
Fields = dict[str, Any]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MASK = (np.arange(N * 6).reshape(N, *S) % 3 > 0).astype(np.uint8)
ARRAYS: dict[str, Fields] = {"identity": {}, "mask": {"mask": MASK}, "projection": {"matrix": normal(N, 4, 6)}}
NOISE: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "one": lambda O: np.array(0.7, np.float32),
    "per datum": lambda O: 0.3 + abs(normal(N)),
    "shared entries": lambda O: 0.3 + abs(normal(1, *O)),
    "per entry": lambda O: 0.3 + abs(normal(N, *O)),
}


def save(path: Path, **fields: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **fields)
    else:
        with h5py.File(path, "w") as file:
            for name, value in fields.items():
                file[name] = value
    return path


def basic(name: str = "identity", **changes: Any) -> Fields:
    """What a valid file holds; a change to None removes a key."""
    O = (4,) if name == "projection" else S
    fields = {"obs": normal(N, *O, seed=1), "observer": name, "noise_std": 0.7, "shape": S, **ARRAYS[name], **changes}
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".hdf5"])
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_written_is_read_back(tmp_path: Path, name: str, noise: str, suffix: str) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in ARRAYS[name].items()}
    O = (4,) if name == "projection" else S
    observer = build(name, S, arrays, torch.tensor(NOISE[noise](O)))
    written = Observations(torch.where(observer.observed(), torch.from_numpy(normal(N, *O)), 0.0), observer)
    x = torch.from_numpy(normal(N, *S, seed=2))
    path = tmp_path / f"data{suffix}"
    for truth in (None, x):
        write_observations(path, written, truth)
        read, again = read_observations(path), read_truth(path)
        assert torch.equal(read.obs, written.obs) and read.obs.dtype == torch.float32
        assert read.observer.name == name and read.shape == S and len(read) == N
        assert torch.equal(read.observer.noise_std, observer.noise_std)
        assert all(torch.equal(read.observer.arrays()[key], value) for key, value in observer.arrays().items())
        assert again is None if truth is None else again is not None and torch.equal(again, truth)
    assert os.listdir(tmp_path) == [path.name]
    stored = np.load(path) if suffix == ".npz" else h5py.File(path)
    assert name != "mask" or stored["mask"].dtype == np.uint8


@pytest.mark.parametrize("key", ["obs", "y", "observations", "arr_0", "fluxes"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_observations_may_go_by_other_names_and_in_other_precisions(tmp_path: Path, key: str, dtype: str) -> None:
    values = np.asfortranarray(normal(N, *S).astype(dtype))
    read = read_observations(save(tmp_path / "a.npz", **{key: values}), observer="identity", noise_std=0.7)
    assert torch.equal(read.obs, torch.from_numpy(values.astype(np.float32))) and read.shape == S
    assert read.obs.is_contiguous()


def test_arguments_override_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", **basic("mask", observer="identity", noise_std=0.3, shape=(7,)))
    read = read_observations(path, observer="mask", noise_std=0.7, shape=S)
    assert read.observer.name == "mask" and read.observer.noise_std.item() == pytest.approx(0.7) and read.shape == S
    flat = save(tmp_path / "b.npz", **basic("projection", shape=None))
    assert read_observations(flat).shape == (6,) and read_observations(flat, shape=(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_nan_means_not_observed(tmp_path: Path, name: str, shared: bool) -> None:
    fields = basic(name)
    fields |= {key: value[:1] for key, value in ARRAYS[name].items() if shared}
    before = read_observations(save(tmp_path / "a.npz", **fields))
    missing = torch.from_numpy(normal(*fields["obs"].shape, seed=3) > 0.5)
    fields["obs"] = np.where(missing, np.nan, fields["obs"])
    read = read_observations(save(tmp_path / "b.npz", **fields))
    seen = before.observer.observed().expand(missing.shape) & ~missing
    assert torch.equal(read.observer.observed(), seen) and read.observer.name == ("mask" if name == "identity" else name)
    assert torch.equal(read.obs, torch.where(seen, before.obs, 0.0)) and seen.sum() < missing.numel()
    x = torch.from_numpy(normal(N, *S))
    torch.testing.assert_close(read.observer.forward(x), torch.where(seen, before.observer.forward(x), 0.0))


@pytest.mark.parametrize("garbage", [9.0, np.inf, np.nan])
def test_what_a_mask_hides_is_set_to_zero_whatever_it_holds(tmp_path: Path, garbage: float) -> None:
    values = basic()["obs"]
    read = read_observations(save(tmp_path / "a.npz", **basic("mask", obs=np.where(MASK == 1, values, garbage))))
    assert torch.equal(read.obs, torch.from_numpy(values * MASK)) and torch.equal(read.observer.observed(), torch.from_numpy(MASK == 1))
    shared = read_observations(save(tmp_path / "b.npz", **basic("mask", mask=MASK[:1], obs=np.where(MASK[:1] == 1, values, garbage))))
    assert shared.observer.count is None, "a shared mask stays shared"


def test_uint8_is_divided_by_255_where_that_is_stated(tmp_path: Path) -> None:
    values = np.arange(N * 6, dtype=np.uint8).reshape(N, *S)
    path = save(tmp_path / "a.npz", **basic(obs=values, x=values))
    assert torch.equal(read_observations(path, uint8_range=True).obs, torch.from_numpy(values).float() / 255)
    assert torch.equal(read_data(save(tmp_path / "b.npz", images=values)), torch.from_numpy(values).float() / 255)
    truth = read_truth(path)
    assert truth is not None and truth.max() == 29 / 255


def referenced(root: object) -> list[Tensor | np.ndarray]:
    """All arrays that can be reached from an object through attributes and containers."""
    found, seen, todo = [], set(), [root]
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        found += [item] if isinstance(item, Tensor | np.ndarray) else []
        todo += [*vars(item).values()] if hasattr(item, "__dict__") else []
        todo += gc.get_referents(item) if isinstance(item, dict | list | tuple | set | Tensor) else []
    return found


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("name", ARRAYS)
def test_the_truth_is_out_of_reach_of_what_is_read(tmp_path: Path, name: str, suffix: str) -> None:
    x = normal(N, *S, seed=4)
    read = read_observations(save(tmp_path / f"a{suffix}", **basic(name, x=x)))
    arrays = [np.asarray(array) for array in referenced([read, read.rows(slice(0, 2))])]
    assert len(arrays) >= 3 and any(np.array_equal(array, read.obs) for array in arrays), "the search must find what is there"
    assert not any(np.isin(x, array).any() for array in arrays)
    tensors = [array for array in referenced(read) if isinstance(array, Tensor)]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors), "none is a window on something larger"
    assert set(vars(read)) == {"obs", "observer"} and set(vars(read.observer)) == {"shape", "noise", *ARRAYS[name]}
    assert set(vars(read.observer.noise)) == {"noise_std"}


def test_the_truth_is_not_even_opened_and_is_never_taken_for_observations(tmp_path: Path) -> None:
    unreadable = np.array([object()], dtype=object)
    assert len(read_observations(save(tmp_path / "a.npz", **basic(x=unreadable)))) == N
    only = save(tmp_path / "b.npz", x=normal(N, *S))
    complains(lambda: read_observations(only, observer="identity", noise_std=0.7), only, "cannot tell", "it has x;", "call it 'obs'")


def test_rows_take_data_and_operators_together(tmp_path: Path) -> None:
    read = read_observations(save(tmp_path / "a.npz", **basic("mask", noise_std=0.3 + abs(normal(N)))))
    part = read.rows(torch.tensor([3, 1]))
    assert len(part) == 2 and torch.equal(part.obs, read.obs[[3, 1]])
    assert torch.equal(part.observer.observed(), read.observer.observed()[[3, 1]])
    assert torch.equal(part.observer.noise_std, read.observer.noise_std[[3, 1]])
    assert torch.equal(read.to("cpu").obs, read.obs)


def complains(call: Callable[[], object], path: Path, *fragments: str) -> None:
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    assert all(fragment in message for fragment in fragments), message


def at(array: np.ndarray, value: float, *indices: tuple[int, ...]) -> np.ndarray:
    changed = array.copy()
    for index in indices:
        changed[index] = value
    return changed


OBS = basic()["obs"]
BAD: dict[str, tuple[Fields, tuple[str, ...]]] = {
    "no observer": (basic(observer=None), ("pass --observer", "identity", "projection")),
    "unknown observer": (basic(observer="blurr"), ("'blurr'", "identity", "projection", "--observer")),
    "array missing": (basic("mask", mask=None), ("'mask' needs an array 'mask'", "--observer")),
    "array ignored": (basic(mask=MASK), ("'identity' has no array 'mask'", "--observer")),
    "no noise": (basic(noise_std=None), ("has no noise_std", "--noise-std")),
    "zero noise": (basic(noise_std=0.0), ("noise_std is 0", "--noise-std")),
    "negative noise": (basic(noise_std=-0.7), ("noise_std is -0.7", "--noise-std")),
    "NaN noise": (
        basic(noise_std=at(0.7 + 0 * OBS, np.nan, (2, 0, 1))),
        ("noise_std is nan in 1 of 30 places", "(2, 0, 1)", "--noise-std"),
    ),
    "infinite noise": (basic(noise_std=np.inf), ("noise_std is inf", "--noise-std")),
    "noise in words": (basic(noise_std="low"), ("noise_std holds", "real numbers", "float32")),
    "noise of other entries": (basic(noise_std=np.ones((N, 3))), ("noise_std has shape (5, 3)", "(N or 1, 2, 3)", "--noise-std")),
    "noise of other data": (basic(noise_std=np.ones(4)), ("noise_std has shape (4,)", "leading axis of 1 or 5", "(5, 2, 3)")),
    "mask of other entries": (basic("mask", mask=MASK[:, :, :2]), ("mask has shape (5, 2, 2)", "(N or 1, 2, 3)", "correct the file")),
    "mask of other data": (basic("mask", mask=MASK[:4]), ("mask has shape (4, 2, 3)", "leading axis of 1 or 5", "(5, 2, 3)")),
    "mask of grey": (basic("mask", mask=MASK * 0.5), ("mask holds 0.5", "correct the file")),
    "matrix of NaN": (basic("projection", matrix=normal(1, 4, 6) * np.nan), ("matrix holds NaN", "zeros")),
    "obs of another shape": (basic(shape=(6,)), ("obs has shape (5, 2, 3)", "(N, 6)", "--shape")),
    "obs of other rows": (basic("projection", obs=normal(N, 3)), ("obs has shape (5, 3)", "(N, 4)", "(2, 3)")),
    "shape of nothing": (basic(shape=(0, 3)), ("shape is [0, 3]", "--shape")),
    "integers": (basic(obs=(100 * OBS).astype(np.int64)), ("holds int64", "--uint8-range")),
    "bytes": (basic(obs=abs(100 * OBS).astype(np.uint8)), ("holds uint8", "--uint8-range")),
    "complex": (basic(obs=OBS + 1j), ("holds complex64", "float32")),
    "all NaN": (basic(obs=np.nan * OBS), ("nothing is observed", "(5, 2, 3)", "check")),
    "all hidden": (basic("mask", mask=0 * MASK), ("nothing is observed", "(5, 2, 3)", "check")),
    "infinities": (
        basic(obs=at(OBS, -np.inf, (1, 0, 2), (3, 1, 1))),
        ("infinite in 2 of 30 places", "the first at (1, 0, 2)", "write NaN"),
    ),
    "infinities, one hidden": (
        basic("mask", obs=at(OBS, np.inf, (0, 0, 0), (0, 0, 1))),
        ("infinite in 1 of 30 places", "the first at (0, 0, 1)", "write NaN"),
    ),
    "constant": (basic(obs=at(0 * OBS + 0.25, np.nan, (0, 0, 0))), ("obs is 0.25 in all observed places", "check")),
    "one datum": (basic(obs=OBS[:1]), ("one observation", "(1, 2, 3)", "at least 2")),
    "no data": (basic(obs=OBS[:0]), ("obs is empty", "(0, 2, 3)", "at least 2")),
    "scalars": (basic(obs=OBS[:, 0, 0]), ("obs has shape (5,)", "(N, 1)")),
    "nothing known": ({"a": OBS, "b": OBS, "noise_std": 0.7}, ("cannot tell", "a, b, noise_std", "call it 'obs'")),
}


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_refused_with_its_value_and_the_remedy(tmp_path: Path, case: str, suffix: str) -> None:
    fields, fragments = BAD[case]
    path = save(tmp_path / f"a{suffix}", **fields)
    complains(lambda: read_observations(path), path, *fragments)


@pytest.mark.parametrize("noise_std", [0.0, -0.7, np.nan])
def test_bad_noise_on_the_command_line_is_refused_too(tmp_path: Path, noise_std: float) -> None:
    path = save(tmp_path / "a.npz", **basic())
    complains(lambda: read_observations(path, noise_std=noise_std), path, f"noise_std is {noise_std:g}", "--noise-std")


def huge_npz(path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 2)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("obs.npy", header.getvalue() + bytes(40))


def huge_h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("obs", shape=(10**12, 2), dtype="f4", chunks=(1000, 2))


def group(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("obs")["deeper"] = OBS


def truncated(path: Path) -> None:
    save(path, **basic())
    path.write_bytes(path.read_bytes()[:-100])


FILES: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "missing": ("a.npz", lambda path: None, ("no such file", "check the path")),
    "suffix": ("a.csv", lambda path: path.write_text("1,2"), ("'.csv'", ".npz, .h5, .hdf5")),
    "text called npz": ("a.npz", lambda path: path.write_text("1,2"), ("not an .npz file", "write it with")),
    "text called h5": ("a.h5", lambda path: path.write_text("1,2"), ("not an .h5 file", "write it with")),
    "nothing called npz": ("a.npz", lambda path: path.write_text(""), ("not an .npz file", "write it with")),
    "truncated npz": ("a.npz", truncated, ("cannot be read", "cut short", "again")),
    "truncated h5": ("a.h5", truncated, ("cannot be read", "cut short", "again")),
    "pickled": ("a.npz", lambda path: save(path, **basic(obs=np.array([{}], object))), ("obs holds pickled", "array of numbers")),
    "pickled noise": ("a.npz", lambda path: save(path, **basic(noise_std=np.array({}))), ("noise_std holds pickled", "array of numbers")),
    "huge npz": ("a.npz", huge_npz, ("obs declares shape (1000000000000, 2)", "8000000000000 bytes", "write it again")),
    "huge h5": ("a.h5", huge_h5, ("obs declares shape (1000000000000, 2)", "8000000000000 bytes", "write it again")),
    "group": ("a.h5", group, ("obs is a group", "top level")),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused_with_the_remedy(tmp_path: Path, case: str) -> None:
    name, write, fragments = FILES[case]
    path = tmp_path / name
    write(path)
    complains(lambda: read_observations(path, observer="identity"), path, *fragments)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path: Path, suffix: str) -> None:
    path, other = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_observations(path, read_observations(save(tmp_path / "c.npz", **basic("mask"))))
    intact = path.read_bytes()

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(intact) - 1), st.binary(min_size=1, max_size=4), st.integers(1, len(intact)))
    def damage(start: int, content: bytes, end: int) -> None:
        other.write_bytes((intact[:start] + content + intact[start + len(content) :])[: end if end % 4 == 0 else None])
        try:
            read_observations(other)
        except UsageError as error:
            assert str(error).startswith(f"{other}: ") and "\n" not in str(error)

    damage()


def test_clean_data_are_read_by_any_of_their_names(tmp_path: Path) -> None:
    values = normal(N, *S)
    np.save(tmp_path / "a.npy", values)
    for path in (tmp_path / "a.npy", *(save(tmp_path / f"{key}.h5", **{key: values}) for key in ("train_images", "x", "data", "galaxies"))):
        assert torch.equal(read_data(path), torch.from_numpy(values))
        assert torch.equal(read_data(path, count=3), torch.from_numpy(values[:3]))
    complains(lambda: read_data(path, 6), path, "6 data were asked for", "holds 5", "ask for 1 to 5")
    complains(lambda: read_data(path, 0), path, "0 data were asked for", "holds 5", "ask for 1 to 5")
    bad = save(tmp_path / "b.npz", x=at(values, np.nan, (4, 1, 2)))
    complains(lambda: read_data(bad), bad, "x is not finite in 1 of 30 places", "(4, 1, 2)", "remove")
    ints = save(tmp_path / "c.npz", x=np.ones((5, 2), int), labels=np.ones(5))
    complains(lambda: read_data(ints), ints, "x holds int64", "float32")
    flat = save(tmp_path / "d.npz", x=values[:0])
    complains(lambda: read_data(flat), flat, "shape (0, 2, 3)", "one datum per row")
    (tmp_path / "e.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-4])
    complains(lambda: read_data(tmp_path / "e.npy"), tmp_path / "e.npy", "cannot be read", "cut short")


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, where: str) -> None:
    path = tmp_path / f"a{suffix}"
    read = read_observations(save(path, **basic()))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        if where == "writing":
            patch.setattr(np.lib.format, "write_array_header_1_0", full_disk)
            patch.setattr(h5py.Dataset, "__setitem__", full_disk)
        else:
            patch.setattr(os, "replace", full_disk)
        complains(lambda: write_observations(path, read), path, "cannot be written", "No space left on device", "free space")
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == before
    write_observations(path, read.rows(slice(0, 3)))
    assert len(read_observations(path)) == 3, "overwriting is allowed"


def test_writing_below_a_file_or_another_format_is_refused(tmp_path: Path) -> None:
    read = read_observations(save(tmp_path / "a.npz", **basic()))
    below = tmp_path / "a.npz" / "b.npz"
    complains(lambda: write_observations(below, read), below, "cannot be written", "check the folder")
    complains(lambda: write_observations(tmp_path / "a.txt", read), tmp_path / "a.txt", "'.txt'", ".npz, .h5, .hdf5")


PLAIN = np.ones((1, 4, 4), np.uint8)
EVERY: dict[str, tuple[tuple[int, ...], Fields]] = {
    "blur": ((6, 5), {"psf": normal(N, 3, 3), "boundary": "reflect"}),
    "downsample": ((2, 6, 5), {"factor": 2, "axes": 2, "way": "average"}),
    "fourier": ((2, 4, 3), {"mask": (normal(N, 4, 3) > 0).astype(np.uint8), "centred": 1}),
    "multicoil": ((4, 3), {"mask": np.ones((1, 4, 3), np.uint8), "sensitivities": normal(1, 3, 2, 4, 3), "centred": 0}),
    "radon": ((5, 4), {"angles": normal(N, 3), "detectors": 9}),
    "compressed": ((3, 4), {"seeds": 2**60 + np.arange(N), "rows": 5, "kind": "gaussian"}),
    "compose": (
        (4, 4),
        {"0.observer": "blur", "0.psf": normal(N, 3, 3), "0.boundary": "zero", "1.observer": "mask", "1.mask": PLAIN},
    ),
    "stack": ((4, 4), {"0.observer": "identity", "1.observer": "downsample", "1.factor": 2, "1.axes": 2, "1.way": "average"}),
}


@pytest.mark.parametrize("suffix", [".npz", ".h5", ""])
@pytest.mark.parametrize("name", EVERY)
def test_parameters_of_every_observer_are_read_back_by_row(tmp_path: Path, name: str, suffix: str) -> None:
    S_, parameters = EVERY[name]
    made = build(name, S_, {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in parameters.items()}, torch.tensor(0.7))
    obs = made.simulate(torch.from_numpy(normal(N, *S_)), torch.Generator().manual_seed(0))
    path = tmp_path / f"a{suffix}"
    write_parts(path, N, iter([(Observations(obs, made), None)]))
    read, x = read_observations(path), torch.from_numpy(normal(3, *S_, seed=2))
    assert read.observer.name == name and read.shape == S_ and read.observer.options() == made.options()
    assert {k: (v.dtype, v.shape) for k, v in read.observer.arrays().items()} == {k: (v.dtype, v.shape) for k, v in made.arrays().items()}
    index = torch.tensor([4, 0, 2])
    assert torch.equal(open_observations(path).rows(index).observer.forward(x), made.rows(index).forward(x))
    hole = obs.numpy().copy()
    hole[2].flat[1] = np.nan
    if suffix == ".npz":
        np.savez(path, **{**dict(np.load(path)), "obs": hole})
        seen = read_observations(path).observer.observed().expand(obs.shape)
        assert not seen[2].flatten()[1] and bool((seen | ~made.observed().expand(obs.shape)).sum() == seen.numel() - 1)


@pytest.mark.parametrize("noise", ["noise_cov", "noise_factor", "noise_spectrum", "noise_gain"])
def test_noise_of_every_kind_is_read_back_by_row(tmp_path: Path, noise: str) -> None:
    W = normal(N, 6, 6)
    spectrum = 0.5 + abs(normal(N, *S))
    fields = {
        "noise_cov": {"noise_cov": W @ W.transpose(0, 2, 1) + 0.1 * np.eye(6, dtype=np.float32)},
        "noise_factor": {"noise_factor": W[:, :, :2], "noise_std": np.float32(0.3)},
        "noise_spectrum": {"noise_spectrum": spectrum + np.roll(spectrum[:, ::-1, ::-1], (1, 1), (1, 2))},
        "noise_gain": {"noise_gain": 0.1 + abs(normal(N))},
    }[noise]
    path = save(tmp_path / "a.npz", **basic(**{"noise_std": None, **fields}))
    read, w = read_observations(path), torch.from_numpy(normal(2, *S))
    part = open_observations(path).rows(torch.tensor([3, 1])).observer
    torch.testing.assert_close(part.cov(w), read.observer.rows(torch.tensor([3, 1])).cov(w))
    write_observations(tmp_path / "b.h5", read)
    again = read_observations(tmp_path / "b.h5").observer.noise.tensors()
    assert again.keys() == read.observer.noise.tensors().keys() and all(torch.equal(again[k], v) for k, v in read.observer.noise.tensors().items())
    assert read_observations(path, noise_std=0.7).observer.noise_std.item() == pytest.approx(0.7), "an override replaces all of it"


def test_complex_observations_and_sensitivities_become_pairs_of_real_channels(tmp_path: Path) -> None:
    z = normal(N, 3, 4, 4) + 1j * normal(N, 3, 4, 4, seed=1)
    s = normal(1, 3, 4, 4, seed=2) + 1j * normal(1, 3, 4, 4, seed=3)
    fields = {"observer": "multicoil", "noise_std": 0.7, "shape": (2, 4, 4), "mask": np.ones((1, 4, 4), np.uint8)}
    read = read_observations(save(tmp_path / "a.npz", **fields, obs=z.astype(np.complex64), sensitivities=s.astype(np.complex64)))
    np.testing.assert_allclose(read.obs.numpy(), np.stack([z.real, z.imag], 2), rtol=1e-6)
    np.testing.assert_allclose(read.observer.arrays()["sensitivities"].numpy(), np.stack([s.real, s.imag], 2), rtol=1e-6)
