"""Files of strangers: whatever they hold, a reader reads them or refuses them in one line, runs nothing of theirs, takes no memory for lies."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import SMALL, here, refused, vectors  # noqa: F401

import emdiff.archive
from emdiff.cli import main
from emdiff.errors import UsageError
from emdiff.finished import latest_prior
from emdiff.observations import read_data, read_observations
from emdiff.posterior import run_walk
from emdiff.prior import Prior, build_network, load_prior, save_prior
from emdiff.reading import check_configs, read_json, read_yaml
from emdiff.scale import Scale

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def fuzz():
    """scripts/fuzz.py."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("fuzz", SCRIPTS / "fuzz.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("name", ["npz", "h5", "npy", "truth", "truth-h5", "prior", "config", "metrics", "lock", "features"])
def test_damaged_files_of_every_kind_are_read_or_refused(fuzz, name, tmp_path):
    bench = fuzz.Bench(name, tmp_path, tmp_path / "failures")
    fuzz.mutate(bench, 12 if name in ("metrics", "config") else 60, seed=7)
    assert bench.counts["failed"] == 0 < bench.counts["refused"], [p.read_text() for p in (tmp_path / "failures").glob("*.txt")]


def test_the_fuzzer_sees_what_is_wrong(fuzz, tmp_path):
    """It would be of no use if it could not fail."""
    bench = fuzz.Bench("npy", tmp_path, tmp_path / "failures")
    for error in (ValueError("x"), MemoryError(), SystemExit(0)):
        bench.read = lambda path, error=error: (_ for _ in ()).throw(error)
        bench.run(b"kept")
    assert bench.counts == {"failed": 3} and len(list((tmp_path / "failures").glob("*.txt"))) == 3


def zipped(name="obs.npy", shape=(10, 3), dtype="<f4", compress=zipfile.ZIP_STORED, content=b"\0" * 120):
    """An .npz whose header says what it likes."""
    file, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), header.getvalue() + content, compress)
    return file.getvalue()


def of_h5(write):
    """An HDF5 file."""
    file = io.BytesIO()
    with h5py.File(file, "w") as archive:
        write(archive)
    return file.getvalue()


def virtual(archive):
    """Data that lie in another file."""
    layout = h5py.VirtualLayout((5, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/hosts", "obs", (5, 3))
    archive.create_virtual_dataset("obs", layout)


ARCHIVES = {
    "bomb": ("a.npz", lambda: zipped(shape=(10**6, 5), compress=zipfile.ZIP_DEFLATED, content=bytes(20 * 10**6)), "0.02 GB of memory and"),
    "lie": ("a.npz", lambda: zipped(shape=(10**12, 5)), "more than the file can hold"),
    "negative": ("a.npz", lambda: zipped(shape=(-2, -15)), "declares shape (-2, -15)"),
    "wide": ("a.npz", lambda: zipped(dtype="<U90000"), "more than the file can hold"),
    "objects": ("a.npz", lambda: zipped(dtype="|O"), "pickled"),
    "lzma": ("a.npz", lambda: zipped(compress=zipfile.ZIP_LZMA), "numpy does not write"),
    "traversal": ("a.npz", lambda: zipped(name="../../escape.npy"), "noise_std"),
    "terminal": ("a.npz", lambda: zipped(name="\x1b[2Jx.txt"), "it has none"),
    "external link": ("a.h5", lambda: of_h5(lambda f: f.__setitem__("obs", h5py.ExternalLink("/etc/hosts", "/obs"))), "is a link"),
    "external data": ("a.h5", lambda: of_h5(lambda f: f.create_dataset("obs", (5, 3), "u1", external=[("/etc/hosts", 0, 15)])), "another file"),
    "virtual": ("a.h5", lambda: of_h5(virtual), "another file"),
    "chunks": (
        "a.h5",
        lambda: of_h5(lambda f: f.create_dataset("obs", (5, 3), "f4", chunks=(10**5, 10**3), maxshape=(None, None))),
        "packed in a way",
    ),
    "sparse": ("a.h5", lambda: of_h5(lambda f: f.create_dataset("obs", (10**12, 3), "f4", chunks=(10, 3))), "more than the file can hold"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_lying_archives_are_refused_before_anything_is_allocated(case, tmp_path, monkeypatch):
    name, content, words = ARCHIVES[case]
    path = tmp_path / name
    path.write_bytes(content())
    monkeypatch.setattr(emdiff.archive, "free_memory", lambda: 1e6)
    with pytest.raises(UsageError) as error:
        read_observations(path, observer="identity")
    assert words in str(error.value) and str(error.value).isprintable()
    assert not (tmp_path.parent.parent / "escape.npy").exists()


def test_a_machine_has_a_known_amount_of_memory():
    assert 1e7 < emdiff.archive.free_memory() < 1e15


@pytest.mark.parametrize("content", [b"!!python/object/apply:os.system ['touch PWNED']", b"a: &x [1]\nb: *x", b"[" * 60, b"a: 1\nb: !x 2", b"- 1"])
def test_yaml_holds_plain_values_only(content, capsys):
    Path("c.yaml").write_bytes(content)
    with pytest.raises(UsageError, match="c.yaml"):
        read_yaml(Path("c.yaml"))
    assert "c.yaml" in refused(capsys, "fit", "--config", "c.yaml")
    vectors()
    Path("w.yaml").write_bytes(content)
    assert "walk" in refused(capsys, "fit", "--observations", "obs.npz", "--walk", "w.yaml") and not Path("PWNED").exists()


def test_a_configuration_names_no_class_but_a_recipe(capsys):
    Path("c.yaml").write_text("data: a.npz\nnoise_std: 1\nout: o.npz\nobserver: {class_path: antigravity.X}\n")
    assert "antigravity.X" in refused(capsys, "observe", "--config", "c.yaml") and "antigravity" not in sys.modules
    Path("d.yaml").write_text("observer: {class_path: mask, init_args: {keep: 0.5}}\n")
    check_configs(["observe", "--config", "d.yaml"])


def test_what_is_no_plain_small_file_is_not_waited_for():
    os.mkfifo("pipe")
    Path("long.json").write_text("{" + " " * (1 << 24) + "}")
    Path("deep.json").write_text("[" * 100_000)
    for name in ("pipe", "long.json", "deep.json", "."):
        with pytest.raises(UsageError, match=name):
            read_json(Path(name))
    with pytest.raises(UsageError, match="plain file"):
        check_configs(["--config=/dev/zero"])


NETWORK = {"kind": "mlp", "width": 8, "blocks": 1}
LIES = {
    "wide": {"network": {"kind": "mlp", "width": 10**9, "blocks": 1}},
    "deep": {"network": {"kind": "mlp", "width": 8, "blocks": 10**9}},
    "unlike its arrays": {"network": {"kind": "mlp", "width": 9000, "blocks": 9000 // 1000}},
    "vast data": {"shape": [10**6, 10**6]},
    "negative data": {"shape": [-3]},
    "no spread": {"scale": [0.0, 0.0]},
    "infinite": {"scale": [0.0, 1e999]},
    "no level": {"tau_last": float("nan")},
    "another program": {"network": {"kind": "os.system", "width": 8}},
    "a list": {"network": [1]},
}


@pytest.mark.parametrize("lie", LIES)
def test_priors_that_lie_are_refused(lie, tmp_path):
    path = tmp_path / "p.safetensors"
    save_prior(path, Prior(build_network((3,), **NETWORK), Scale(0.0, 1.0), (3,), 0.1, NETWORK))
    load_prior(path)
    about = {"emdiff": "0", "network": NETWORK, "shape": [3], "scale": [0.0, 1.0], "tau_last": 0.1}
    save_file(load_file(path), path, {"emdiff": json.dumps(about | LIES[lie])})
    with pytest.raises(UsageError, match="not a prior"):
        load_prior(path)


@pytest.mark.parametrize("maps", [False, True])
def test_a_prior_whose_maps_meant_something_else_is_refused(maps, tmp_path):
    """Before format 2, a U-Net with maps was modulated by them; one without computes what it always did."""
    path, network = tmp_path / "p.safetensors", {"kind": "unet", "widths": [4], "patch": 1, "maps": maps}
    save_prior(path, Prior(build_network((8, 8), **network), Scale(0.0, 1.0), (8, 8), 0.1, network))
    load_prior(path)
    save_file(load_file(path), path, {"emdiff": json.dumps({"network": network, "shape": [8, 8], "scale": [0.0, 1.0], "tau_last": 0.1})})
    if maps:
        with pytest.raises(UsageError, match="train it again"):
            load_prior(path)
    else:
        load_prior(path)


def test_a_prior_of_infinite_weights_is_refused(tmp_path):
    net = build_network((3,), **NETWORK)
    next(net.parameters()).data[0] = torch.nan
    save_prior(tmp_path / "p.safetensors", Prior(net, Scale(0.0, 1.0), (3,), 0.1, NETWORK))
    with pytest.raises(UsageError, match="not finite"):
        load_prior(tmp_path / "p.safetensors")


def test_a_run_folder_of_a_stranger(capsys):
    vectors()
    main(["fit", "--observations", "obs.npz", "--iters", "1", "--out", "run", *SMALL])
    data = read_observations("obs.npz")
    config = Path("run/config.yaml")
    good = config.read_text()
    for bad in ("levels: many", "levels: 100000000", "step: os.system", "tau_last: .nan", "unknown: 3", "steps: -4"):
        config.write_text(good.replace("walk:\n", f"walk:\n  {bad}\n", 1) if bad.split(":")[0] == "unknown" else replaced(good, bad))
        with pytest.raises(UsageError, match="config.yaml"):
            run_walk(Path("run"), data, "cpu")
    config.write_text(good)
    for bad in ('{"iter": "../../x"}', '{"iter": 1e400}', "[1]"):
        Path("run/best.json").write_text(bad)
        with pytest.raises(UsageError, match="best.json"):
            latest_prior(Path("run"))
    Path("run/best.json").unlink()
    secret = Path("secret.txt")
    secret.write_text("my secret")
    for name in ("run/figures/samples_001.png", "run/figures/rows_001.png"):
        Path(name).unlink()
    Path("run/figures/samples_001.png").symlink_to(secret.resolve())
    Path("run/figures/rows_001.png").write_text("my secret")
    main(["report", "--run", "run"])
    import base64

    page = Path("run/report.html").read_text()
    assert "my secret" not in page and base64.b64encode(b"my secret").decode() not in page and "data:image/png" in page


def replaced(text: str, line: str) -> str:
    """A configuration with one line of its walk replaced."""
    name = line.split(":")[0]
    before, walk = text.split("walk:\n")
    return before + "walk:\n" + "\n".join(f"  {line}" if row.strip().startswith(f"{name}:") else row for row in walk.split("\n"))


def test_what_is_written_goes_to_no_link_of_a_stranger(tmp_path):
    """Replacing a file that is a link replaces the link."""
    from emdiff.files import write_text

    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "link").is_symlink()


def test_npy_headers_that_lie_are_refused(tmp_path):
    for shape in ((-1, 5), (10**15, 5), (10**30, 2)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(80))
        with pytest.raises(UsageError, match="a.npy"):
            read_data(tmp_path / "a.npy")
