r"""Clean data by name, file or folder, handed out in batches: x (B, *S), float32, in the user's units, uint8 divided by 255.

| what | found where | S |
|---|---|---|
| digits | scikit-learn, which ships it | (8, 8), in [0, 1] |
| mnist, fashion_mnist | ROOT/NAME.npz (train_images, train_labels), else torchvision's files under ROOT | (28, 28) |
| cifar10 | likewise | (3, 32, 32) |
| FILE .npy | memory-mapped, such as the 70,000 images of FFHQ-256; (N, H, W, 3) is taken as channels last | (H, W) or (3, H, W) |
| FILE .npz, .h5 | `train_images`, `x`, `images`, `data`, `arr_0` or the only array | as stored |
| FOLDER | PNG, JPEG, ... below it, all of one size; read when asked for | (H, W), (3, H, W) |

ROOT is --root, else the environment's EMDIFF_DATA, else ./data. Nothing is ever downloaded unless the caller says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emdiff.archive import array_names, declared, load_array, open_archive
from emdiff.errors import UsageError
from emdiff.files import sha256
from emdiff.observations import read_data
from emdiff.rows import Rows

NAMES = ("mnist", "cifar10", "fashion_mnist", "digits")
TORCHVISION = {"mnist": "MNIST", "cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


def in_units(stored: Tensor) -> Tensor:
    """Data in the user's units, float32, from what is stored: uint8 divided by 255."""
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored.float()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Clean data.

    Attributes:
        name: What to call it.
        count: N.
        shape: S.
        rows: Indices (B,) -> data (B, *S), uint8 or float.
        identity: Hex digest that is the same for the same data.

    >>> Dataset("two", 2, (1,), lambda i: np.array([[0], [255]], np.uint8)[i], "").read(torch.tensor([1]))
    tensor([[1.]])
    """

    name: str
    count: int
    shape: tuple[int, ...]
    rows: Callable[[np.ndarray], np.ndarray]
    identity: str

    def __len__(self) -> int:
        return self.count

    def stored(self) -> Rows:
        """The data as they are stored, uint8 or float, (N, *S)."""
        at = lambda index: np.arange(self.count)[index] if isinstance(index, slice) else index.numpy()  # noqa: E731
        return Rows((self.count, *self.shape), lambda index: torch.from_numpy(np.ascontiguousarray(self.rows(at(index)))))

    def read(self, index: Tensor) -> Tensor:
        """Data at indices (B,): (B, *S), float32, on the CPU; uint8 is divided by 255."""
        return in_units(self.stored()[index.cpu()])

    def first(self, count: int | None) -> Dataset:
        """The first `count` data; all for None."""
        return self if count is None else Dataset(self.name, min(count, self.count), self.shape, self.rows, f"{self.identity}:{count}")

    def part(self, index: Tensor) -> Dataset:
        """The data at indices (n,), int64, as a data set."""
        chosen = index.numpy()
        identity = f"{self.identity}:{hashlib.sha256(chosen.tobytes()).hexdigest()}"
        return Dataset(self.name, len(chosen), self.shape, lambda at: self.rows(chosen[at]), identity)

    def split(self, apart: int, generator: torch.Generator) -> tuple[Dataset, Dataset]:
        """All data but `apart` random ones (N - apart, *S), and these (apart, *S), each in the order in which they are stored."""
        order = torch.randperm(self.count, generator=generator)
        return self.part(order[apart:].sort().values), self.part(order[:apart].sort().values)


def open_dataset(data: str, root: str | None = None, download: bool = False, count: int | None = None) -> Dataset:
    """Clean data by name, file or folder.

    Args:
        data: One of NAMES, or a path.
        root: Folder of files for names; None for the environment's EMDIFF_DATA, else ./data.
        download: Let torchvision fetch what is not there.
        count: Take the first so many.

    Raises:
        UsageError: if the data are not there, cannot be read, or are fewer.
    """
    path = Path(data)
    if data in NAMES:
        found = _digits() if data == "digits" else _named(data, Path(root or os.environ.get("EMDIFF_DATA", "data")), download)
    elif path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() == ".npy" and path.is_file():
        found = _mapped(path)
    elif path.is_file():
        x = read_data(path).numpy()
        found = Dataset(path.stem, len(x), tuple(x.shape[1:]), x.__getitem__, sha256(path))
    else:
        raise UsageError(f"--data {data}: there is no such file or folder; give one, or a name: {', '.join(NAMES)}")
    if count is not None and not 2 <= count <= len(found):
        raise UsageError(f"--count is {count}; {data} holds {len(found)} data, give 2 to {len(found)}")
    return found.first(count)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("--data digits: needs scikit-learn; pip install scikit-learn") from error
    x = (load_digits().images / 16).astype(np.float32)
    return Dataset("digits", len(x), (8, 8), x.__getitem__, "digits")


def _named(name: str, root: Path, download: bool) -> Dataset:
    """ROOT/NAME.npz, else torchvision's files."""
    archive = root / f"{name}.npz"
    if archive.is_file():
        with open_archive(archive, (".npz",)) as file:
            if "train_images" not in array_names(file):
                raise UsageError(f"{archive}: has no train_images, it has {', '.join(array_names(file))}; store the images under that name")
            return _array(name, load_array(archive, file, "train_images"), sha256(archive))
    try:
        import torchvision
    except ImportError as error:
        raise UsageError(
            f"--data {name}: {archive} is not there, and to read torchvision's files torchvision is missing; pip install 'emdiff[datasets]', "
            "or put the archive there"
        ) from error
    try:
        stored = getattr(torchvision.datasets, TORCHVISION[name])(str(root), train=True, download=download)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"--data {name}: neither {archive} nor torchvision's files are under {root}; put either there, name it with --root or EMDIFF_DATA, "
            "or allow fetching with --download true"
        ) from error
    return _array(name, np.asarray(stored.data), f"torchvision:{name}:{len(stored.data)}")


def _array(name: str, images: np.ndarray, identity: str) -> Dataset:
    """Images in an array, channels last or first or none."""
    last = images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3)
    shape = (images.shape[-1], *images.shape[1:3]) if last else images.shape[1:]
    if images.ndim < 2 or len(images) < 2:
        raise UsageError(f"{name}: holds an array of shape {images.shape}, expected (N, ...) with at least two data")
    rows = (lambda i: images[i].transpose(0, 3, 1, 2)) if last else images.__getitem__
    return Dataset(name, len(images), tuple(shape), rows, identity)


def _mapped(path: Path) -> Dataset:
    """An .npy file, of which only the rows asked for are read."""
    with open_archive(path, (".npy",)) as file:
        declared(path, file, "arr_0")
        images = file["arr_0"]
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise UsageError(f"{path}: holds {images.dtype}, whose scale is not known; store uint8 images (0..255) or float32")
    about = f"{path.stat().st_size}:{images.shape}:{images.dtype}"
    sample = np.ascontiguousarray(images[:: max(1, len(images) // 64)][:64]).tobytes()
    return _array(path.stem, images, hashlib.sha256(about.encode() + sample).hexdigest())


def _folder(path: Path) -> Dataset:
    """Pictures below a folder, in the order of their names; grey if the first one is."""
    from PIL import Image, UnidentifiedImageError

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise UsageError(f"--data {path}: holds {len(files)} pictures; give a folder with at least two, {', '.join(PICTURES)}")
    with Image.open(files[0]) as picture:
        size, mode = picture.size, "L" if picture.mode in ("1", "L", "I;16", "LA") else "RGB"

    def load(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert(mode))
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"{file}: cannot be read as a picture ({error}); remove it or save it again") from error
        if pixels.shape[1::-1] != size:
            raise UsageError(f"{file}: is {pixels.shape[1]} x {pixels.shape[0]}, the first picture {size[0]} x {size[1]}; bring all to one size")
        return pixels if mode == "L" else pixels.transpose(2, 0, 1)

    shape = (size[1], size[0]) if mode == "L" else (3, size[1], size[0])
    listing = "\n".join(f"{p.relative_to(path)}:{p.stat().st_size}" for p in files)
    return Dataset(path.name, len(files), shape, lambda i: np.stack([load(files[j]) for j in i]), hashlib.sha256(listing.encode()).hexdigest())
