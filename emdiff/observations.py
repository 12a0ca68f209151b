r"""Observations on disk and in memory: obs_i = A_i x_i + n_i, n_i ~ N(0, cov_obs_i), for i = 1..N, and never x_i.

A file (.npz, .h5 with the same keys, or a folder of .npy files named by them) holds

| key | what | shape |
|---|---|---|
| `obs` | observations, float; NaN where nothing was observed | (N, *O) |
| `observer` | name of the observer | a string |
| `mask`, `matrix`, ... | the arrays of that observer, `0.mask` those of its first part | (N or 1, ...) |
| `boundary`, `factor`, ... | its options | strings and numbers |
| `noise_std` | standard deviation of the noise, in units of obs | (), (N,) or (N or 1, *O) |
| `noise_cov`, `noise_factor`, `noise_spectrum`, `noise_gain` | other noise (observers.noises) | (N or 1, ...) |
| `shape` | shape S of x | a few integers |
| `x` | the truth, if known; only `open_truth` opens it | (N, *S) |

It may be larger than memory: `open_observations` checks all of it once, in parts, and afterwards reads the rows that are asked for, with their
operators. Every complaint about a file is a `UsageError` of one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emdiff.archive import ARCHIVES, SIGNATURES, array_names, check_suffix, declared, load_array, open_archive
from emdiff.data import Data, Observations, Operators, View, batches
from emdiff.errors import UsageError
from emdiff.parameters import is_parameter, option
from emdiff.rows import Rows, Tally, in_memory, row_spans
from emdiff.stored import open_rows
from emdiff.written import NewArchive
from observers import REGISTRY, Observer
from observers.find import find, find_installed
from observers.noises import NOISE_KEYS

OBS = ("obs", "y", "observations", "y_train", "arr_0")
DATA = ("train_images", "x", "images", "data", "x_train", "arr_0")
TRUTH = ("x", "x_train")


def open_observations(
    path: str | Path,
    observer: str | None = None,
    noise_std: float | None = None,
    shape: tuple[int, ...] | None = None,
    uint8_range: bool = False,
) -> View:
    """Open a file of observations; the arguments override what it says.

    Args:
        path: .npz, .h5 or .hdf5, or a folder of .npy files. The observations may also be called `y`, `observations` or `arr_0`, or be the only array.
        observer: Name of the observer, or module:Class, or path/file.py:Class.
        noise_std: Standard deviation of the noise, in units of obs (after division by 255, if there is one).
        shape: S, the shape of x; where neither says it, the observer infers it.
        uint8_range: Accept uint8 observations and divide them by 255.

    Returns:
        The observations. NaN entries of obs are not observed, and neither is what a mask hides; obs is 0 there.

    Raises:
        UsageError: The file cannot be read, contradicts itself, or lacks what no argument supplies.
    """
    path = Path(path)
    with open_archive(path, ARCHIVES) as file:
        names = array_names(file)
        fields = {name: load_array(path, file, name) for name in names if name in ("observer", "shape")}
        obs_name = _find(path, names, OBS)
        kind = _observer(path, observer, fields)
        obs = _float(path, "obs", open_rows(path, file, obs_name, kind.complex_obs), uint8_range)
        _check_size(path, obs.shape)
        own = {_key(name, names): name for name in names if is_parameter(_key(name, names), kind)}
        options = {key: option(load_array(path, file, name)) for key, name in own.items() if not _is_array(path, file, name)}
        arrays = {key: open_rows(path, file, name, kind.complex_obs) for key, name in own.items() if key not in options}
        arrays |= _noise(path, {name: open_rows(path, file, name) for name in names if name in NOISE_KEYS}, noise_std)
        try:
            made = Operators(kind, shape or _shape(path, fields), arrays, options, tuple(obs.shape))
            gaps = _scan(path, obs, made)
        except ValueError as error:
            raise UsageError(f"{path}: {error}; correct the file, or override it with --observer, --shape or --noise-std") from error
    return View(len(obs), made.shape, lambda index: _blank(obs[index], made(index), gaps))


def read_observations(
    path: str | Path,
    observer: str | None = None,
    noise_std: float | None = None,
    shape: tuple[int, ...] | None = None,
    uint8_range: bool = False,
) -> Observations:
    """All of a file of observations in memory; else as `open_observations`."""
    return open_observations(path, observer, noise_std, shape, uint8_range).rows(slice(None))


def open_truth(path: str | Path) -> Rows | None:
    """The truth x (N, *S), float32, of a file of observations, or None where it has none; uint8 is divided by 255."""
    path = Path(path)
    with open_archive(path, ARCHIVES) as file:
        found = [name for name in TRUTH if name in array_names(file)]
        return _float(path, "x", open_rows(path, file, found[0]), uint8_range=True) if found else None


def read_truth(path: str | Path) -> Tensor | None:
    """All of the truth in memory; else as `open_truth`."""
    truth = open_truth(path)
    return None if truth is None else truth[slice(None)]


def open_data(path: str | Path, count: int | None = None) -> Rows:
    """Clean data to be observed.

    Args:
        path: .npz, .npy, .h5, .hdf5 or a folder with `train_images`, `x`, `images`, `data`, `arr_0` or a single array; uint8 is divided by 255.
        count: Take the first so many data; all of them by default.

    Returns:
        Data (N, *S), float32, finite.

    Raises:
        UsageError: The file cannot be read, or holds fewer data.
    """
    path = Path(path)
    with open_archive(path, tuple(SIGNATURES)) as file:
        name = _find(path, array_names(file), DATA)
        rows = open_rows(path, file, name)
        if len(rows.shape) < 2 or 0 in rows.shape:
            raise UsageError(f"{path}: {name} has shape {rows.shape}, expected (N, ...) with at least one datum; store one datum per row")
        if count is not None and not 1 <= count <= len(rows):
            raise UsageError(f"{path}: {count} data were asked for and {name} holds {len(rows)}; ask for 1 to {len(rows)}")
        x = _float(path, name, rows, uint8_range=True).first(len(rows) if count is None else count)
        bad = Tally(x.shape)
        for part in row_spans(x):
            bad.add(~x[part].isfinite(), part.start)
    if bad.count:
        raise UsageError(f"{path}: {name} is not finite in {bad}; remove those data")
    return x


def read_data(path: str | Path, count: int | None = None) -> Tensor:
    """Clean data in memory; else as `open_data`."""
    return open_data(path, count)[slice(None)]


def write_observations(path: str | Path, observations: Data, x: Tensor | Rows | None = None) -> None:
    """Write a file of observations, whole or not at all; a file of that name is replaced.

    Args:
        path: .npz, .h5 or .hdf5.
        observations: N observations and their observer.
        x: The truth (N, *S), for evaluation only.

    Raises:
        UsageError: The suffix is unsupported, or the disk refuses.
    """
    check_suffix(Path(path), ARCHIVES)
    write_parts(Path(path), len(observations), ((part, None if x is None else x[where]) for where, part in batches(observations)))


def write_parts(path: Path, count: int, parts: Iterable[tuple[Observations, Tensor | None]]) -> None:
    """Write `count` observations that come in parts, of more than one datum but for the last, each with its truth or None; else as
    `write_observations`, and a path without suffix is a folder."""
    with NewArchive(path) as new:
        done, arrays = 0, dict[str, Any]()
        for data, x in parts:
            tensors = {"obs": data.obs, **data.observer.arrays(), **data.observer.noise.tensors(), **({} if x is None else {"x": x})}
            for name, tensor in tensors.items():
                if not done:
                    shared = tensor.ndim == 0 or tensor.shape[0] != len(data)
                    arrays[name] = None if shared else new.array(name, (count, *tensor.shape[1:]), _stored(tensor).dtype)
                    if shared:
                        new.put(name, _stored(tensor))
                if arrays[name] is not None:
                    arrays[name][done : done + len(data)] = tensor
            if not done:
                new.put("shape", np.array(data.shape))
                new.put("observer", data.observer.name)
                for name, value in data.observer.options().items():
                    new.put(name, value)
            done += len(data)


def _stored(tensor: Tensor) -> np.ndarray:
    """Masks as bytes, integers as they are, all else as float32."""
    kept = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.float() if tensor.is_floating_point() else tensor
    return kept.detach().cpu().numpy()


def _key(name: str, names: list[str]) -> str:
    """The key of an array; data sets of deepinv call the arrays of their training data `y_train`, `x_train`, `mask_train` and so on."""
    return name.removesuffix("_train") if "y_train" in names else name


def _is_array(path: Path, file: Any, name: str) -> bool:
    """Whether a parameter is an array of numbers, and not text or one number."""
    shape, dtype = declared(path, file, name)
    return bool(shape) and dtype.kind not in "OSU"


def _find(path: Path, names: list[str], accepted: tuple[str, ...]) -> str:
    """The first accepted name that is there, else the only array that has no other meaning."""
    others = [name for name in names if name not in {*TRUTH, "observer", "shape", *NOISE_KEYS} and not is_parameter(name)]
    found = [name for name in accepted if name in names] or (others if len(others) == 1 else [])
    if not found:
        raise UsageError(f"{path}: cannot tell which array holds the data, it has {', '.join(names) or 'none'}; call it '{accepted[0]}'")
    return found[0]


def _float(path: Path, name: str, rows: Rows, uint8_range: bool) -> Rows:
    """float32, from float of any kind, or from uint8 where that is allowed."""
    if rows.dtype == np.uint8 and uint8_range:
        return rows.map(lambda values: values.float() / 255)
    if rows.dtype.kind in "iub":
        hint = "uint8 is divided by 255 with --uint8-range" if name == "obs" else "uint8 would be divided by 255"
        raise UsageError(f"{path}: {name} holds {rows.dtype}, whose scale is not known; {hint}, anything else must be stored as float32")
    return rows


def _observer(path: Path, wanted: str | None, fields: Mapping[str, np.ndarray]) -> type[Observer]:
    """The class that was asked for, else the one that the file names; only the former may be code that is not installed."""
    if wanted is None and "observer" not in fields:
        raise UsageError(f"{path}: does not say which observer made it; pass --observer, one of {', '.join(sorted(REGISTRY))}")
    try:
        return find_installed(str(option(fields["observer"]))) if wanted is None else find(wanted)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; correct the file, or override it with --observer") from error


def _noise(path: Path, stored: Mapping[str, Rows], override: float | None) -> dict[str, Rows]:
    """The arrays of the noise; an override replaces them all. What noises other than a standard deviation need is checked by the noise itself."""
    remedy = "set it with --noise-std, a positive standard deviation in units of obs"
    if override is None and not stored:
        raise UsageError(f"{path}: has no noise_std; {remedy}")
    found = dict(stored) if override is None else {"noise_std": in_memory(np.array(float(override)))}
    found = {name: rows.map(Tensor.float) for name, rows in found.items()}
    if set(found) == {"noise_std"}:
        bad = Tally(found["noise_std"].shape)
        for part in row_spans(found["noise_std"]):
            values = found["noise_std"][part]
            bad.add(~((values > 0) & values.isfinite()), part.start, values)
        if bad.count:
            raise UsageError(f"{path}: noise_std is {bad.value:g} in {bad}; {remedy}")
    return found


def _shape(path: Path, fields: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """S as the file says it; () where it does not."""
    value = np.atleast_1d(fields.get("shape", np.zeros(0, int)))
    if value.ndim != 1 or value.dtype.kind not in "iu" or (value < 1).any():
        raise UsageError(f"{path}: shape is {value.tolist()}, expected positive integers; correct it, or pass --shape")
    return tuple(value.tolist())


def _check_size(path: Path, got: tuple[int, ...]) -> None:
    if 0 in got:
        raise UsageError(f"{path}: obs is empty, shape {got}; give at least 2 observations")
    if len(got) < 2:
        raise UsageError(f"{path}: obs has shape {got}, expected (N, ...); reshape scalars to (N, 1)")
    if got[0] < 2:
        raise UsageError(f"{path}: obs holds one observation, shape {got}; a distribution needs at least 2, better thousands")


def _blank(obs: Tensor, observer: Observer, gaps: bool) -> Observations:
    """Observations that are 0 where nothing was observed; with gaps, NaN says where."""
    if gaps:
        observer = observer.without(obs.isnan() & observer.observed())
    return Observations(torch.where(observer.observed(), obs, 0.0), observer)


def _scan(path: Path, obs: Rows, made: Operators) -> bool:
    """Look through a file once: refuse what no prior can be learned from; returns whether NaN hides what the observers see."""
    gaps, low, high, infinite = False, math.inf, -math.inf, Tally(obs.shape)
    for part in row_spans(obs):
        values, observer = obs[part], made(part)
        missing = values.isnan() & observer.observed()
        if missing.any():
            gaps, observer = True, observer.without(missing)
        seen = observer.observed().expand(values.shape)
        infinite.add(values.isinf() & seen, part.start)
        if seen.any():
            low, high = min(low, float(values[seen].min())), max(high, float(values[seen].max()))
    if low > high:
        raise UsageError(f"{path}: nothing is observed, obs {tuple(obs.shape)} is NaN or hidden throughout; check what wrote the file")
    if infinite.count:
        raise UsageError(f"{path}: obs is infinite in {infinite}; write NaN where nothing was observed")
    if low == high:
        raise UsageError(f"{path}: obs is {low:g} in all observed places; check what wrote the file")
    return gaps
