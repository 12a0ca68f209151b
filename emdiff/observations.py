r"""Observations on disk and in memory: obs_i = A_i x_i + n_i, n_i ~ N(0, cov_obs_i), for i = 1..N, and never x_i.

A file (.npz, or .h5 with the same keys) holds

| key | what | shape |
|---|---|---|
| `obs` | observations, float; NaN where nothing was observed | (N, *O) |
| `observer` | name of the observer | a string |
| `mask`, `matrix`, ... | the arrays of that observer, `0.mask` those of its first part | (N or 1, ...) |
| `boundary`, `factor`, ... | its options | strings and numbers |
| `noise_std` | standard deviation of the noise, in units of obs | (), (N,) or (N or 1, *O) |
| `noise_cov`, `noise_factor`, `noise_spectrum`, `noise_gain` | other noise (observers.noise) | (N or 1, ...) |
| `shape` | shape S of x | a few integers |
| `x` | the truth, if known; only `read_truth` opens it | (N, *S) |

Every complaint about a file is a `UsageError` of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiff.archive import ARCHIVES, SIGNATURES, array_names, check_suffix, load_array, open_archive, save_archive
from emdiff.errors import UsageError
from emdiff.files import write_atomically
from emdiff.parameters import is_parameter, parameter, real_pairs
from observers import REGISTRY, Observer
from observers.find import find, find_installed
from observers.noises import NOISE_KEYS, Noise, noise_of

OBS = ("obs", "y", "observations", "arr_0")
DATA = ("train_images", "x", "images", "data", "arr_0")


@dataclass(frozen=True, eq=False)
class Observations:
    """All that learning may see: observations and the observer that made them.

    Attributes:
        obs: Observations (N, *O), float32, finite, 0 where nothing was observed.
        observer: A and cov_obs of the N data.

    >>> from observers import Identity
    >>> Observations(torch.zeros(5, 3), Identity((3,), torch.tensor(0.5))).rows(slice(0, 2)).obs.shape
    torch.Size([2, 3])
    """

    obs: Tensor
    observer: Observer

    def __len__(self) -> int:
        return self.obs.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """S, the shape of x."""
        return self.observer.shape

    def rows(self, index: Tensor | slice) -> Observations:
        """The data at indices (B,), int64, or in a slice."""
        return Observations(self.obs[index], self.observer.rows(index))

    def to(self, device: torch.device | str) -> Observations:
        """A copy on a device."""
        return Observations(self.obs.to(device), self.observer.to(device))


def read_observations(
    path: str | Path,
    observer: str | None = None,
    noise_std: float | None = None,
    shape: tuple[int, ...] | None = None,
    uint8_range: bool = False,
) -> Observations:
    """Read a file of observations; the arguments override what it says.

    Args:
        path: .npz, .h5 or .hdf5. The observations may also be called `y`, `observations` or `arr_0`, or be the only array.
        observer: Name of the observer, or module:Class, or path/file.py:Class.
        noise_std: Standard deviation of the noise, in units of obs (after division by 255, if there is one).
        shape: S, the shape of x; where neither says it, the observer infers it.
        uint8_range: Accept uint8 observations and divide them by 255.

    Returns:
        Observations. NaN entries of obs are not observed, and neither is what a mask hides; obs is 0 there.

    Raises:
        UsageError: The file cannot be read, contradicts itself, or lacks what no argument supplies.
    """
    path = Path(path)
    kind, fields = _load(path, observer)
    try:
        obs = _float(path, "obs", real_pairs(fields["obs"]) if kind.complex_obs else fields["obs"], uint8_range)
        _check_size(path, obs)
        parameters = {key: parameter(path, key, value) for key, value in fields.items() if is_parameter(key, kind)}
        S = shape or _shape(path, fields) or kind.infer_shape(tuple(obs.shape[1:]), parameters)
        if not S:
            raise ValueError(f"does not say the shape of x, and observer '{kind.name}' cannot infer it; pass --shape")
        built = kind.assemble(S, _noise(path, fields, noise_std), parameters)
        _check_fit(obs, built)
        built = _without_nan(obs, built)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; correct the file, or override it with --observer, --shape or --noise-std") from error
    return _blank(path, obs, built)


def read_truth(path: str | Path) -> Tensor | None:
    """The truth x (N, *S), float32, of a file of observations, or None where it has none; uint8 is divided by 255."""
    path = Path(path)
    with open_archive(path, ARCHIVES) as file:
        array = load_array(path, file, "x") if "x" in array_names(file) else None
    return None if array is None else _float(path, "x", array, uint8_range=True)


def read_data(path: str | Path, count: int | None = None) -> Tensor:
    """Clean data to be observed.

    Args:
        path: .npz, .npy, .h5 or .hdf5 with `train_images`, `x`, `images`, `data`, `arr_0` or a single array; uint8 is divided by 255.
        count: Take the first so many data; all of them by default.

    Returns:
        Data (N, *S), float32, finite.

    Raises:
        UsageError: The file cannot be read, or holds fewer data.
    """
    path = Path(path)
    with open_archive(path, tuple(SIGNATURES)) as file:
        name = _find(path, array_names(file), DATA)
        array = load_array(path, file, name)
    if array.ndim < 2 or array.size == 0:
        raise UsageError(f"{path}: {name} has shape {array.shape}, expected (N, ...) with at least one datum; store one datum per row")
    if count is not None and not 1 <= count <= len(array):
        raise UsageError(f"{path}: {count} data were asked for and {name} holds {len(array)}; ask for 1 to {len(array)}")
    x = _float(path, name, array[:count], uint8_range=True)
    if not x.isfinite().all():
        raise UsageError(f"{path}: {name} is not finite in {_where(~x.isfinite())}; remove those data")
    return x


def write_observations(path: str | Path, observations: Observations, x: Tensor | None = None) -> None:
    """Write a file of observations, whole or not at all; a file of that name is replaced.

    Args:
        path: .npz, .h5 or .hdf5.
        observations: N observations and their observer.
        x: The truth (N, *S), for evaluation only.

    Raises:
        UsageError: The suffix is unsupported, or the disk refuses.
    """
    path = Path(path)
    check_suffix(path, ARCHIVES)
    observer = observations.observer
    tensors = {"obs": observations.obs, **observer.arrays(), **observer.noise.tensors(), **({} if x is None else {"x": x})}
    fields = {name: _stored(tensor) for name, tensor in tensors.items()}
    fields |= {"shape": np.array(observer.shape), "observer": observer.name, **observer.options()}
    write_atomically(path, lambda temporary: save_archive(temporary, path.suffix, fields))


def _stored(tensor: Tensor) -> np.ndarray:
    """Masks as bytes, integers as they are, all else as float32."""
    kept = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.float() if tensor.is_floating_point() else tensor
    return kept.detach().cpu().numpy()


def _find(path: Path, names: list[str], accepted: tuple[str, ...]) -> str:
    """The first accepted name that is there, else the only array that has no other meaning."""
    others = [name for name in names if name not in {"x", "observer", "shape", *NOISE_KEYS} and not is_parameter(name)]
    found = [name for name in accepted if name in names] or (others if len(others) == 1 else [])
    if not found:
        raise UsageError(f"{path}: cannot tell which array holds the data, it has {', '.join(names) or 'none'}; call it '{accepted[0]}'")
    return found[0]


def _load(path: Path, observer: str | None) -> tuple[type[Observer], dict[str, np.ndarray]]:
    """The observer's class, and all that a file of observations says, x excepted, which is not even opened."""
    with open_archive(path, ARCHIVES) as file:
        names = array_names(file)
        stated = load_array(path, file, "observer") if "observer" in names and observer is None else None
        obs = _find(path, names, OBS)
        kind = _observer(path, observer, stated)
        wanted = {name: name for name in names if name in {"shape", *NOISE_KEYS} or is_parameter(name, kind)}
        return kind, {key: load_array(path, file, name) for key, name in {**wanted, "obs": obs}.items()}


def _float(path: Path, name: str, array: np.ndarray, uint8_range: bool) -> Tensor:
    """float32, from float of any kind, or from uint8 where that is allowed."""
    if array.dtype == np.uint8 and uint8_range:
        return _numbers(path, name, array) / 255
    if array.dtype.kind in "iub":
        hint = "uint8 is divided by 255 with --uint8-range" if name == "obs" else "uint8 would be divided by 255"
        raise UsageError(f"{path}: {name} holds {array.dtype}, whose scale is not known; {hint}, anything else must be stored as float32")
    return _numbers(path, name, array)


def _numbers(path: Path, name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise UsageError(f"{path}: {name} holds {array.dtype}, expected real numbers; store it as float32")
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _observer(path: Path, wanted: str | None, stated: np.ndarray | None) -> type[Observer]:
    """The class that was asked for, else the one that the file names; only the former may be code that is not installed."""
    if wanted is None and stated is None:
        raise UsageError(f"{path}: does not say which observer made it; pass --observer, one of {', '.join(sorted(REGISTRY))}")
    try:
        return find_installed(str(parameter(path, "observer", stated))) if wanted is None else find(wanted)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; correct the file, or override it with --observer") from error


def _noise(path: Path, fields: Mapping[str, np.ndarray], override: float | None) -> Noise:
    remedy = "set it with --noise-std, a positive standard deviation in units of obs"
    found = {key: fields[key] for key in NOISE_KEYS if key in fields} if override is None else {"noise_std": np.array(float(override))}
    if not found:
        raise UsageError(f"{path}: has no noise_std; {remedy}")
    tensors = {key: _numbers(path, key, value) for key, value in found.items()}
    if set(tensors) == {"noise_std"}:
        bad = ~((tensors["noise_std"] > 0) & tensors["noise_std"].isfinite())
        if bad.any():
            raise UsageError(f"{path}: noise_std is {tensors['noise_std'][bad].flatten()[0].item():g} in {_where(bad)}; {remedy}")
    return noise_of(tensors)


def _shape(path: Path, fields: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """S as the file says it; () where it does not."""
    value = np.atleast_1d(fields.get("shape", np.zeros(0, int)))
    if value.ndim != 1 or value.dtype.kind not in "iu" or (value < 1).any():
        raise UsageError(f"{path}: shape is {value.tolist()}, expected positive integers; correct it, or pass --shape")
    return tuple(value.tolist())


def _check_size(path: Path, obs: Tensor) -> None:
    got = tuple(obs.shape)
    if obs.numel() == 0:
        raise UsageError(f"{path}: obs is empty, shape {got}; give at least 2 observations")
    if obs.ndim < 2:
        raise UsageError(f"{path}: obs has shape {got}, expected (N, ...); reshape scalars to (N, 1)")
    if len(obs) < 2:
        raise UsageError(f"{path}: obs holds one observation, shape {got}; a distribution needs at least 2, better thousands")


def _check_fit(obs: Tensor, observer: Observer) -> None:
    """Refuse obs that the observer cannot have made."""
    got, wanted = tuple(obs.shape), ", ".join(map(str, observer.obs_shape))
    if got[1:] != observer.obs_shape:
        raise ValueError(f"obs has shape {got}, expected (N, {wanted}) from observer '{observer.name}' of x {observer.shape}")
    for name, array in {**observer.arrays(), **observer.noise.tensors()}.items():
        if array.ndim and array.shape[0] not in (1, len(obs)):
            raise ValueError(f"{name} has shape {tuple(array.shape)}, expected a leading axis of 1 or {len(obs)} as in obs {got}")


def _without_nan(obs: Tensor, observer: Observer) -> Observer:
    missing = obs.isnan() & observer.observed()
    return observer.without(missing) if missing.any() else observer


def _blank(path: Path, obs: Tensor, observer: Observer) -> Observations:
    """Set obs to 0 where nothing is observed, and refuse what is left if no prior can be learned from it."""
    seen = observer.observed().expand(obs.shape)
    values = obs[seen]
    if not values.numel():
        raise UsageError(f"{path}: nothing is observed, obs {tuple(obs.shape)} is NaN or hidden throughout; check what wrote the file")
    if values.isinf().any():
        raise UsageError(f"{path}: obs is infinite in {_where(obs.isinf() & seen)}; write NaN where nothing was observed")
    if (values == values[0]).all():
        raise UsageError(f"{path}: obs is {values[0].item():g} in all observed places; check what wrote the file")
    return Observations(torch.where(seen, obs, 0.0), observer)


def _where(marked: Tensor) -> str:
    """How many entries are marked, and where the first one is."""
    first = tuple(marked.nonzero()[0].tolist())
    return f"{int(marked.sum())} of {marked.numel()} places" + (f", the first at {first}" if first else "")
