"""Files that hypothesis builds for scripts/fuzz.py: well-formed containers whose headers and values lie."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import h5py
import numpy as np
from fuzz_targets import CONFIG, LOCK, METRICS
from hypothesis import strategies as st
from safetensors.numpy import save

NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**63, -(2**63), 10**30]), st.integers())
SHAPES = st.lists(NUMBERS, max_size=5).map(tuple)
DTYPES = [
    "<f4",
    ">f8",
    "<f2",
    "|u1",
    "<i8",
    "|b1",
    "|O",
    "|V0",
    "|S0",
    "|V2000000000",
    "<U7",
    "<c8",
    "<M8[s]",
    "<f16",
    "(3,)f4",
    [("a", "<f4"), ("\n", "|u1")],
]
DESCR = st.one_of(st.sampled_from(DTYPES), st.text(max_size=12), st.none(), NUMBERS)
NAMES = st.one_of(
    st.sampled_from(["obs", "observer", "noise_std", "shape", "mask", "matrix", "x", "../../obs", "/etc/obs", "arr_0"]), st.text(max_size=20)
)


@st.composite
def npy(draw: Any) -> bytes:
    """An .npy file with any header."""
    header = {"descr": draw(DESCR), "fortran_order": draw(st.sampled_from([False, True, None, 3])), "shape": draw(SHAPES)}
    text = draw(st.one_of(st.just(repr(header)), st.text(max_size=80))).encode(errors="replace")
    magic = draw(st.sampled_from([b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"\x93NUMPY\x09\x00"]))
    length = len(text).to_bytes(2 if magic[6] == 1 else 4, "little")
    return magic + length + text + draw(st.binary(max_size=200))


def good(draw: Any) -> bytes:
    """A valid .npy file of small numbers or text."""
    value = draw(st.one_of(st.lists(st.floats(width=32), min_size=1, max_size=12), st.sampled_from(["identity", "mask", "projection", 0.7, [2, 3]])))
    array = np.array(value, None if isinstance(value, str) else "f4")
    file = io.BytesIO()
    np.lib.format.write_array(file, array.reshape(2, -1) if array.size % 2 == 0 and array.ndim else array)
    return file.getvalue()


@st.composite
def npz(draw: Any) -> bytes:
    """A zip of such files, under any names, packed in any way."""
    file, kinds = io.BytesIO(), [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]
    with zipfile.ZipFile(file, "w") as archive:
        for name in draw(st.lists(NAMES, max_size=5, unique=True)):
            content = draw(npy()) if draw(st.booleans()) else good(draw)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy".replace("\0", "")), content, draw(st.sampled_from(kinds)))
    return file.getvalue()


@st.composite
def h5(draw: Any) -> bytes:
    """An HDF5 file with sparse, packed, linked, external and virtual data of any shape."""
    file = io.BytesIO()
    with h5py.File(file, "w") as archive:
        for name in draw(st.lists(NAMES, max_size=4, unique=True)):
            shape, kind = draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 10**6, 10**12]), max_size=4).map(tuple)), draw(st.integers(0, 8))
            try:
                if kind == 0:
                    archive[name] = h5py.ExternalLink("/etc/passwd", "/obs")
                elif kind == 1:
                    archive[name] = h5py.SoftLink("/obs")
                elif kind == 2:
                    archive.create_dataset(name, shape, "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
                elif kind == 3:
                    layout = h5py.VirtualLayout(shape, "f4")
                    layout[:] = h5py.VirtualSource("/etc/hosts", "obs", shape)
                    archive.create_virtual_dataset(name, layout)
                elif kind == 4:
                    archive.create_group(name)
                elif kind == 5:
                    archive.create_dataset(name, shape, draw(st.sampled_from(["f4", "i8", "S5", "u1"])), chunks=True, compression="gzip")
                elif kind == 6:
                    archive.create_dataset(name, (2, 3), h5py.vlen_dtype(np.int32))
                elif kind == 7:
                    archive[name] = draw(st.text(max_size=30))
                else:
                    archive[name] = np.array(draw(st.lists(st.floats(width=32), min_size=4, max_size=4)), "f4").reshape(2, 2)
            except (ValueError, OSError, TypeError, RuntimeError, KeyError):
                continue
    return file.getvalue()


LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=10), st.sampled_from(["unet", "mlp", "sachs"]))
VALUES = st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)), max_leaves=8
)


@st.composite
def changed(draw: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Known values, some of them replaced, missing, or joined by others."""
    value = {k: draw(changed(v)) if isinstance(v, dict) else draw(VALUES) if draw(st.integers(0, 4)) == 0 else v for k, v in known.items()}
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=2)):
        value.pop(name, None)
    return value | draw(st.dictionaries(st.text(max_size=6), VALUES, max_size=2))


@st.composite
def prior(draw: Any) -> bytes:
    """A safetensors file with any description and a few arrays."""
    network = draw(st.sampled_from([{"kind": "unet", "widths": [4, 8], "patch": 1}, {"kind": "mlp", "width": 8, "blocks": 1}]))
    about = draw(changed({"emdiff": "0", "network": network, "shape": [3], "scale": [0.0, 1.0], "tau_last": 0.1}))
    arrays = {f"w{i}": np.zeros(n, "f4") for i, n in enumerate(draw(st.lists(st.integers(0, 5), max_size=3)))}
    return save(arrays, {"emdiff": json.dumps(about)})


def contents(name: str) -> st.SearchStrategy[bytes]:
    """Files for a target."""
    if name in ("npz", "truth", "features"):
        return npz()
    if name in ("h5", "truth-h5"):
        return h5()
    if name == "config":
        import yaml

        return st.one_of(
            changed(yaml.safe_load(CONFIG)).map(lambda v: yaml.safe_dump(v).encode()), st.text(max_size=100).map(lambda t: t.encode(errors="replace"))
        )
    if name in ("metrics", "lock"):
        return changed(json.loads(METRICS if name == "metrics" else LOCK)).map(lambda v: json.dumps(v).encode())
    return {"npy": npy, "prior": prior}[name]()
