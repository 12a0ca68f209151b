"""What scripts/fuzz.py feeds: the readers of emdiff, valid files for each, and ways to damage them."""

from __future__ import annotations

import io
import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

TOKENS = [b"-1", b"0", b"1e999", b"nan", b"99999999999", b"4294967296", b"1" * 400, b"'O'", b"'|V0'", b"'<U999999999'", b"'V4000000000'", b"None",
          b"../../etc/passwd", b"\x00", b"[" * 50, b"{" * 2000, b"&a [*a]", b"!!python/x:a", b"- " * 40, b"\xff\xfe", b"\x1b[2J", b"\n"]  # fmt: skip


def archives(suffix: str) -> list[bytes]:
    """Valid files of observations."""
    import torch

    from emdiff.observations import Observations, write_observations
    from observers import build

    draw, found = np.random.default_rng(0), []
    arrays = {"identity": {}, "mask": {"mask": draw.random((5, 2, 3)) < 0.6}, "projection": {"matrix": draw.normal(size=(5, 4, 6)).astype("f4")}}
    for name, given in arrays.items():
        O = (4,) if name == "projection" else (2, 3)
        made = build(name, (2, 3), {k: torch.from_numpy(v) for k, v in given.items()}, torch.full((5,), 0.7))
        data = Observations(torch.where(made.observed(), torch.from_numpy(draw.normal(size=(5, *O)).astype("f4")), 0.0), made)
        with tempfile.TemporaryDirectory() as folder:
            write_observations(Path(folder) / f"a{suffix}", data, torch.zeros(5, 2, 3))
            found.append((Path(folder) / f"a{suffix}").read_bytes())
    if suffix == ".npz":
        packed = io.BytesIO()
        np.savez_compressed(packed, obs=np.eye(6, dtype="f4") + 1, observer="identity", noise_std=0.7)
        found.append(packed.getvalue())
    return found


def arrays_npy() -> list[bytes]:
    """Valid .npy files, among them one whose header is of version 2."""
    found = []
    for values, version in (
        (np.arange(12, dtype="f4").reshape(3, 4), (1, 0)),
        (np.ones((2, 2, 2), ">f8", order="F"), (2, 0)),
        (np.eye(3, dtype="u1"), None),
    ):
        file = io.BytesIO()
        np.lib.format.write_array(file, values, version)
        found.append(file.getvalue())
    return found


def priors() -> list[bytes]:
    """Valid priors."""
    import torch

    from emdiff.prior import Prior, build_network, save_prior
    from emdiff.scale import Scale

    found = []
    for shape, network in (((9, 8), {"kind": "unet", "widths": [4, 8], "patch": 1}), ((3,), {"kind": "mlp", "width": 8, "blocks": 1})):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            save_prior(Path(folder) / "p.safetensors", Prior(build_network(shape, **network), Scale(3.0, 2.0), shape, 0.1, network))
            found.append((Path(folder) / "p.safetensors").read_bytes())
    return found


CONFIG = b"""observations: obs.npz
out: run
iters: 3
shape: [2, 3]
relax: 0
walk: {tau_first: null, tau_last: 0.1, tau_relax: 0.25, levels: 6, steps: 0, delta: 1.0, gamma: 1.0, step: sachs, iterations: 3, batch: 500, pool: 0}
train:
  steps: 20
  rate: 0.002
"""
METRICS = b'{"iter": 1, "chi2": 0.98, "sample_std": 1.1, "bound": 9.0, "over_relaxed": false, "start": "gaussian", "seconds": 3}'
LOCK = b'{"pid": 1, "host": "elsewhere", "began": 1.5e9, "birth": 12}'


def read_config(path: Path) -> None:
    """All that reads a run's config.yaml, and --config."""
    from emdiff.changes import differences
    from emdiff.observations import read_observations
    from emdiff.posterior import run_walk
    from emdiff.reading import check_configs

    data = read_observations(OBSERVATIONS)
    folder = path.parent
    check_configs(["fit", f"--config={path}"])
    differences(folder, {"iters": 3, "walk": {"levels": 6}}, {"emdiff": "0", "torch": "0", "observations_sha256": ""}, {}, {})
    run_walk(folder, data, "cpu")


def read_metrics(path: Path) -> None:
    """All that reads the figures of a round, best.json and about.json."""
    from emdiff.finished import latest_prior, round_metrics
    from emdiff.report import page_of, render

    folder = path.parent
    (folder / "start").mkdir(exist_ok=True)
    (folder / "round_001").mkdir(exist_ok=True)
    for copy in ("start/metrics.json", "round_001/metrics.json", "best.json", "about.json"):
        shutil.copyfile(path, folder / copy)
    (folder / "round_001" / "prior.safetensors").touch()
    render(page_of(folder, round_metrics(folder)))
    latest_prior(folder)


def read_lock(path: Path) -> None:
    """The lock of a run folder, which every case leaves as it was or takes."""
    from emdiff.lock import Lock

    Lock(path.parent, say=lambda line: None).release()


def target(name: str) -> tuple[str, list[bytes], Callable[[Path], object]]:
    """A file's name, valid contents of it, and what reads it."""
    from emdiff.features import feature_module
    from emdiff.observations import read_data, read_observations, read_truth
    from emdiff.prior import load_prior

    torch_file = lambda path: feature_module(str(path), None)  # noqa: E731 (refused unread)
    found = {
        "npz": ("a.npz", lambda: archives(".npz"), read_observations),
        "h5": ("a.h5", lambda: archives(".h5"), read_observations),
        "npy": ("a.npy", arrays_npy, read_data),
        "truth": ("a.npz", lambda: archives(".npz"), read_truth),
        "truth-h5": ("a.h5", lambda: archives(".h5"), read_truth),
        "prior": ("p.safetensors", priors, load_prior),
        "config": ("config.yaml", lambda: [CONFIG], read_config),
        "metrics": ("m.json", lambda: [METRICS], read_metrics),
        "lock": ("lock", lambda: [LOCK], read_lock),
        "features": ("f.pt", lambda: archives(".npz"), torch_file),
    }[name]
    return found[0], found[1](), found[2]


TARGETS = ("npz", "h5", "npy", "truth", "truth-h5", "prior", "config", "metrics", "lock", "features")
OBSERVATIONS = Path("obs.npz")


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """A valid file after one to six kinds of damage."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        i, kind = draw.randrange(len(content) + 1), draw.randrange(8)
        if kind == 0:
            content[i : i + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            content[i : i + 4] = struct.pack("<I", draw.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, draw.randrange(2**32))))
        elif kind == 2:
            content[i : i + 8] = struct.pack("<Q", draw.choice((0, 2**63, 2**64 - 1, 2**40, len(content))))
        elif kind == 3:
            del content[i : i + draw.choice((1, 4, 64, 10**6))]
        elif kind == 4:
            content[i:i] = draw.choice(TOKENS)
        elif kind == 5:
            other = draw.choice(seeds)
            j = draw.randrange(len(other))
            content[i : i + 64] = other[j : j + 64]
        elif kind == 6:
            content[i:i] = content[i : i + draw.choice((8, 100))]
        else:
            digits = [k for k, c in enumerate(content) if 48 <= c <= 57]
            k = draw.choice(digits) if digits else i
            content[k : k + 1] = draw.choice(TOKENS)
        if not content:
            break
    return bytes(content)
