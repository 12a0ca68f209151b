"""Clean data by name, file and folder; nothing is ever downloaded unasked."""

import socket

import numpy as np
import pytest
import torch
from PIL import Image

from emdiff.datasets import open_dataset
from emdiff.errors import UsageError
from emdiff.train import Standardised, measure_scale

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty folder, no EMDIFF_DATA, and no network: a download would fail the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMDIFF_DATA", raising=False)

    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def read(dataset):
    return dataset.read(torch.arange(len(dataset)))


def test_bytes_become_zero_to_one_and_floats_stay():
    np.save("grey.npy", GREY)
    np.savez("wide.npz", x=(5 * RNG.standard_normal((4, 3))).astype("float32"))
    torch.testing.assert_close(read(open_dataset("grey.npy")), torch.from_numpy(GREY) / 255)
    with np.load("wide.npz") as file:
        torch.testing.assert_close(read(open_dataset("wide.npz")), torch.from_numpy(file["x"]))


def test_an_npy_of_images_is_mapped_and_channels_last_are_brought_forward():
    """As FFHQ-256 is stored: (N, H, W, 3) uint8, of which only the rows asked for are read."""
    np.save("colour.npy", COLOUR)
    data = open_dataset("colour.npy")
    assert data.shape == (3, 6, 5) and isinstance(data.rows.__closure__[0].cell_contents, np.memmap)
    torch.testing.assert_close(data.read(torch.tensor([4, 1])), torch.from_numpy(COLOUR[[4, 1]]).permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("pixels,shape", [(GREY, (6, 5)), (COLOUR, (3, 6, 5))])
def test_a_folder_of_pictures_in_the_order_of_their_names(pixels, shape, tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "pictures" / ("deep" if i > 4 else ".") / f"{i}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    data = open_dataset("pictures")
    expected = torch.from_numpy(pixels) / 255
    torch.testing.assert_close(read(data), expected if pixels.ndim == 3 else expected.permute(0, 3, 1, 2))
    assert data.shape == shape and len(data) == 7


def test_names_are_read_from_local_files_of_either_kind(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    np.savez("a/mnist.npz", train_images=GREY, train_labels=np.zeros(7))
    data = open_dataset("mnist", root="a")
    torch.testing.assert_close(read(data), torch.from_numpy(GREY) / 255)
    monkeypatch.setenv("EMDIFF_DATA", "a")
    assert open_dataset("mnist").identity == data.identity and open_dataset("mnist", count=3).identity != data.identity
    write_torchvision_mnist(tmp_path / "b")
    torch.testing.assert_close(read(open_dataset("fashion_mnist", root="b")), torch.from_numpy(GREY) / 255)


def write_torchvision_mnist(root):
    """The raw files that torchvision.datasets.FashionMNIST looks for."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    header = lambda magic, sizes: b"".join(int(n).to_bytes(4, "big") for n in (magic, *sizes))
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header(2051, GREY.shape) + GREY.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header(2049, GREY.shape[:1]) + bytes(len(GREY)))


def test_the_digits_ship_with_scikit_learn():
    x = read(open_dataset("digits"))
    assert x.shape == (1797, 8, 8) and float(x.min()) == 0 and float(x.max()) == 1


def bad(tmp_path):
    """Data that are refused, and words of the message."""
    np.save("int.npy", GREY.astype(np.int32))
    np.save("one.npy", GREY[:1])
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY nonsense")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sizes").mkdir()
    Image.fromarray(GREY[0]).save("sizes/a.png")
    Image.fromarray(GREY[0][:3]).save("sizes/b.png")
    (tmp_path / "torn").mkdir()
    Image.fromarray(GREY[0]).save("torn/a.png")
    (tmp_path / "torn" / "b.png").write_bytes(b"no picture")
    (tmp_path / "strange").mkdir()
    np.savez("strange/cifar10.npz", images=GREY)
    return [("int.npy", None, "uint8"), ("one.npy", None, "two data"), ("broken.npy", None, "cannot be read"), ("empty", None, "at least two"),
            ("sizes", None, "one size"), ("torn", None, "b.png"), ("nowhere.npz", None, "no such file"), ("mnist", None, "--root"),
            ("cifar10", None, "download"), ("cifar10", "strange", "train_images")]  # fmt: skip


def test_what_is_not_there_or_not_readable_is_refused_in_one_line(tmp_path):
    for data, root, word in bad(tmp_path):
        with pytest.raises(UsageError, match=word) as error:
            read(open_dataset(data, root))
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--count"):
        open_dataset("digits", count=5000)


def test_scale_and_flips():
    """Standardised data have mean 0 and variance 1; half of them are mirrored, whole images at a time."""
    np.save("grey.npy", np.repeat(GREY, 300, axis=0))
    data = open_dataset("grey.npy")
    scale = measure_scale(data)
    index = torch.arange(len(data))
    plain, mirrors = Standardised(data, scale), Standardised(data, scale, flips=True)
    x = plain.batch(plain.read(index), torch.Generator().manual_seed(0))
    assert torch.equal(mirrors.unflipped().batch(mirrors.read(index), torch.Generator()), x)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4) and float(x.var()) == pytest.approx(1, abs=1e-3)
    flipped = mirrors.batch(mirrors.read(index), torch.Generator().manual_seed(0))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (flipped == x).flatten(1).all(1)).all()) and float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.05)
    assert measure_scale(open_dataset("digits"))[:2] == pytest.approx((0.30526, 0.37603), abs=1e-4)


def test_data_set_aside_are_the_others() -> None:
    """A split gives each datum to one of two data sets, at random and in order; read by index and by slice."""
    data = open_dataset("digits")
    rest, apart = data.split(97, torch.Generator().manual_seed(0))
    stored = [part.stored()[: len(part)] for part in (rest, apart)]
    assert len(apart) == 97 and len(rest) == len(data) - 97 and stored[1].shape == (97, 8, 8)
    assert torch.equal(apart.read(torch.tensor([5, 3])), apart.read(torch.arange(97))[[5, 3]])
    together = torch.cat(stored).flatten(1)
    whole = data.stored()[: len(data)].flatten(1)
    assert torch.equal(together.double().sort(0).values, whole.double().sort(0).values)
    at = [int((whole == row).all(1).nonzero()[0]) for row in stored[1].flatten(1)]
    assert at == sorted(at) and at[0] < 100 and at[-1] > len(data) - 100
