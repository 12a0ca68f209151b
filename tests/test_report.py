"""The report as a reader meets it: a real Chromium opens pages of real runs, moves the slider, and listens for what leaves the page."""

import base64
import gc
import json
import shutil
import socket
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from emdiff.charts import Chart, nice_ticks, words
from emdiff.cli import main
from emdiff.evidence import PER_BLOCK, rank_chart, reconstructions, residuals
from emdiff.figures import save_samples
from emdiff.finished import round_metrics
from emdiff.meanings import meaning
from emdiff.report import gallery_frames, page_of, render, write_report
from emdiff.strips import RESIDUAL, palette

SMALL = ["--train.steps", "20", "--train.start-steps", "30", "--walk.levels", "6", "--wandb", "off", "--device", "cpu"]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
)
HOSTILE = "</pre></title></style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs Chromium: apt install chromium chromium-driver"
)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A run of two iterations on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("images")
    np.savez(folder / "x.npz", x=(load_digits().images[:100] / 16).astype("float32"))
    main(["observe", "--data", f"{folder}/x.npz", "--noise-std", "0.25", "--out", f"{folder}/obs.npz"])
    main(["fit", "--observations", f"{folder}/obs.npz", "--iters", "2", "--out", f"{folder}/run", *SMALL])
    return folder / "run"


@pytest.fixture(scope="session")
def vectors(tmp_path_factory):
    """A run of one iteration on 3-vectors, without a truth."""
    folder = tmp_path_factory.mktemp("vectors")
    x = np.random.default_rng(0).standard_normal((200, 3)) @ np.diag([1, 2, 0.5]) + 5
    np.savez(folder / "obs.npz", obs=x.astype("float32"), observer="identity", noise_std=0.4)
    main(["fit", "--observations", f"{folder}/obs.npz", "--iters", "1", "--out", f"{folder}/run", *SMALL])
    return folder / "run"


def evaluated(run: Path, to: Path, last: int, **changes) -> Path:
    """A copy of a run with an evaluation of its real samples, in the format that `emdiff evaluate` writes; changes are keys of metrics.json."""
    shutil.copytree(run, to)
    samples = np.stack([np.load(to / f"round_{k:03d}/samples.npy") for k in range(1, last + 1)])
    with np.load(run.parent / "obs.npz") as file:
        obs, truth, noise = file["obs"], file["x"] if "x" in file.files else None, float(file["noise_std"])
    mean, std, residual = samples.mean(0), samples.std(0), (obs - samples[-1]) / noise
    chi2, levels = np.square(residual).reshape(len(obs), -1).mean(1), np.linspace(0.1, 0.9, 9)
    arrays = {"mean": mean[:64], "std": std[:64], "residual": residual[:64], "obs": obs[:64], "chi2": chi2}
    if truth is not None:
        inside = [np.mean(np.abs(truth - mean) < 2 * level * std) for level in levels]
        ranks = (samples < truth).sum(0)[:, 3, 3]
        arrays |= {"truth": truth[:64], "rank_counts": np.bincount(ranks, minlength=last + 1), "coverage_levels": levels, "coverage": inside}
        arrays |= {"tarp_levels": levels, "tarp_coverage": inside}
    metrics = {
        "observations": "obs.npz", "observations_count": len(obs), "samples": last, "iter": last, "seed": 0, "best_iteration": last,
        "figures": {"chi2": float(chi2.mean()), "coverage_80": 0.61, "mean_drift": None, "novel_figure": 3.25}, "floors": {"chi2": 1.0},
        "verdict": {"level": "warn", "text": "A sentence.", "reasons": ["first reason", "second reason"]}, **changes,
    }  # fmt: skip
    (to / "evaluation").mkdir()
    (to / "evaluation/metrics.json").write_text(json.dumps(metrics))
    np.savez(to / "evaluation/arrays.npz", **arrays)
    return to


class Reader:
    """A Chromium that keeps its logs."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def open(self, page: Path, width: int = 1280, scheme: str = "light", media: str = "") -> None:
        """Open a page, forgetting what was logged before."""
        colour = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": colour})
        size = {"width": width, "height": 812, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri())

    def requests(self) -> list[str]:
        """Addresses asked for since the page was opened."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def run(self, code: str, *arguments):
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {code}", *arguments)

    def find(self, selector: str) -> list:
        """All elements that match."""
        return self.driver.find_elements("css selector", selector)

    def shown(self, gallery: str) -> list[str]:
        """Sources of the pictures of a gallery that can be seen."""
        return [image.get_attribute("src") for image in self.find(f"[data-gallery={gallery}] img") if image.is_displayed()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """One Chromium for all tests."""
    pytest.importorskip("selenium", reason='needs selenium: pip install -e ".[test]"')
    reader = Reader(tmp_path_factory.mktemp("profile"))
    yield reader
    reader.driver.quit()


def picture(run: Path, name: str, k: int) -> str:
    """The data URI of a picture of the run folder."""
    return "data:image/png;base64," + base64.b64encode((run / f"figures/{name}_{k:03d}.png").read_bytes()).decode()


@needs_browser
def test_the_slider_steps_through_the_iterations(images, tmp_path, reader):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    reader.open(write_report(images, tmp_path / "r.html"))
    slider, said = reader.find("#iteration")[0], reader.find("#announce")[0]
    assert slider.aria_role == "slider" and slider.accessible_name == "EM iteration" and said.get_attribute("aria-live") == "polite"

    def at(k, words):
        assert said.text == words and slider.get_attribute("aria-valuetext") == words
        assert reader.shown("samples") == [picture(images, "samples", k)] and reader.shown("rows") == [picture(images, "rows", k)]
        assert reader.shown("prior") == ([picture(images, "prior", k)] if k else [])
        value = json.loads((images / f"{f'round_{k:03d}' if k else 'start'}/metrics.json").read_text())["chi2"]
        assert reader.find(".chart .now")[0].text == f"iteration {k}: {value:.4g}"

    at(2, "iteration 2 of 2")
    slider.send_keys(Keys.ARROW_LEFT)
    at(1, "iteration 1 of 2")
    slider.send_keys(Keys.HOME)
    at(0, "start, iteration 0 of 2")
    reader.find("[data-step='1']")[0].click()
    at(1, "iteration 1 of 2")
    ActionChains(reader.driver).move_to_element_with_offset(slider, slider.size["width"] // 2 - 2, 0).click().perform()
    at(2, "iteration 2 of 2")


@needs_browser
@pytest.mark.parametrize("kind", ["images", "vectors"])
@pytest.mark.parametrize("with_evaluation", [False, True])
def test_nothing_is_asked_of_the_network_and_nothing_fails(kind, with_evaluation, request, tmp_path, reader):
    run = request.getfixturevalue(kind)
    run = evaluated(run, tmp_path / "run", 2 if kind == "images" else 1) if with_evaluation else run
    reader.open(write_report(run, tmp_path / "r.html"))
    reader.find("[data-step='-1']")[0].click()
    assert reader.run("[...document.images].every(i => i.complete && (i.naturalWidth > 0 || i.closest('[hidden]')))")
    assert reader.driver.get_log("browser") == []
    asked = reader.requests()
    assert asked and all(url.startswith(("file://", "data:")) for url in asked), asked
    text = reader.find("body")[0].text
    assert ("A sentence." in text and "second reason" in text and "novel_figure" in text) == with_evaluation
    assert ("emdiff evaluate" in text) != with_evaluation
    assert len(reader.find("#trust")) == with_evaluation and bool(reader.find(".strip img")) == (with_evaluation and kind == "images")


@needs_browser
def test_the_policy_forbids_requests_and_foreign_scripts(images, tmp_path, reader):
    """Even a script within the page reaches no server, here one that listens and would notice; and markup slipped in cannot run any.

    No frame is among it: Chromium opens a connection for one before it asks the policy, and then sends nothing over it.
    """
    reader.open(write_report(images, tmp_path / "r.html"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert reader.driver.execute_async_script(f"fetch('{address}').then(() => arguments[0](1), () => arguments[0](0))") == 0
        slipped = f"<img src={address}a.png onerror='document.title=1'><video src={address}></video><link rel=stylesheet href={address}a.css>"
        reader.run("document.body.insertAdjacentHTML('beforeend', arguments[0])", slipped)
        with pytest.raises(TimeoutError):
            server.accept()
    assert reader.run("document.title") == "run: emdiff report"
    said = [entry["message"] for entry in reader.driver.get_log("browser")]
    assert len(said) >= 4 and all("Content Security Policy" in line for line in said), said


@needs_browser
def test_hostile_names_are_text(images, tmp_path, reader):
    name = HOSTILE.replace("/", "")
    figures = {"chi2": 1.0, HOSTILE: 2.0}
    run = evaluated(
        images, tmp_path / name, 2, verdict={"level": HOSTILE, "text": HOSTILE, "reasons": [HOSTILE]}, observations=HOSTILE, figures=figures,
        versions={HOSTILE: HOSTILE},
    )  # fmt: skip
    (run / "config.yaml").write_text(f"observations: {HOSTILE}\n")
    (run / "about.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    path = run / "round_002/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), HOSTILE: 7.0}))
    reader.open(write_report(run))
    assert reader.run("document.title") == f"{name}: emdiff report" and reader.find("h1")[0].text == name
    assert len(reader.find("script")) == 1 and not reader.find("img[src=x]") and reader.driver.get_log("browser") == []
    assert reader.find("body")[0].text.count(HOSTILE) >= 8


@needs_browser
@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_a_phone_scrolls_down_only(kind, request, tmp_path, reader):
    run = evaluated(request.getfixturevalue(kind), tmp_path / ("long" * 30), 2 if kind == "images" else 1, observations="path" * 60)
    reader.open(write_report(run), width=375)
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert reader.run("[innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    table = "document.querySelector('[aria-label=\"All values over iterations\"]')"
    assert reader.run(f"{table}.scrollWidth > {table}.clientWidth") and reader.run(f"getComputedStyle({table}).overflowX") == "auto"


CONTRAST = """(() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] !== 0) return c; }
    return [255, 255, 255]; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), out = [];
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.getClientRects().length || e.closest('title')) continue;
    const own = getComputedStyle(e), a = light(rgb(e.closest('svg') ? own.fill : own.color)), b = light(behind(e));
    out.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walk.currentNode.data.trim()]); }
  return out; })()"""


@needs_browser
@pytest.mark.parametrize("level", ["good", "warn", "bad", "none"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast_and_all_pictures_have_words(scheme, level, images, tmp_path, reader):
    run = evaluated(images, tmp_path / "run", 2, verdict={"level": level, "text": "words"})
    reader.open(write_report(run), scheme=scheme)
    reader.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = reader.run(CONTRAST)
    assert len(found) > 100 and min(found)[0] >= 4.5, min(found)
    assert (reader.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") == (scheme == "light")
    assert reader.run("[...document.querySelectorAll('img')].every(i => i.alt) && [...document.querySelectorAll('svg')].every(s => s.ariaLabel)")


@needs_browser
def test_print_shows_the_last_iteration_and_no_controls(images, tmp_path, reader):
    reader.open(write_report(images, tmp_path / "r.html"), media="print")
    reader.run("document.querySelectorAll('[data-step]')[0].click()")
    assert reader.shown("samples") == [picture(images, "samples", 2)] and not reader.find("#iteration")[0].is_displayed()
    main(["report", "--run", str(images), "--out", str(tmp_path / "p.html"), "--pdf", str(tmp_path / "p.pdf")])
    content = (tmp_path / "p.pdf").read_bytes()
    assert content.startswith(b"%PDF") and content.count(b"/Type /Page\n") >= 2


def test_pages_of_an_unfinished_run_grow(vectors, tmp_path):
    run = shutil.copytree(vectors, tmp_path / "run")
    whole = write_report(run).read_text()
    shutil.rmtree(run / "round_001")
    start = write_report(run).read_text()
    assert "the start only" in start and "1 iteration," in whole and 'max="0"' in start and 'max="1"' in whole
    assert not list(run.glob("*.tmp"))


def test_pages_of_a_long_fit_do_not_pile_up(images):
    """Nothing keeps a page alive once it is written, though the cycles of a template are only found by the garbage collector."""

    class Text(str):
        pass

    page = page_of(images, round_metrics(images))
    page["config"] = Text("levels: 3\n" + "#" * 10)
    seen = weakref.ref(page["config"])
    gc.disable()
    try:
        assert "levels: 3" in render(page)
        del page
        assert seen() is None
    finally:
        gc.enable()


def test_a_page_is_quick_and_small(tmp_path):
    (tmp_path / "figures").mkdir()
    save_samples(tmp_path / "one.png", torch.rand(64, 28, 28, generator=torch.Generator().manual_seed(0)), "noise, the worst case for PNG")
    for k in range(11):
        folder = tmp_path / (f"round_{k:03d}" if k else "start")
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"iter": k, "chi2": 1.0 + 0.01 * k, "seconds": 10.0}))
        for name in ("samples", "prior", "rows"):
            shutil.copy(tmp_path / "one.png", tmp_path / f"figures/{name}_{k:03d}.png")
    clock = time.process_time()
    page = write_report(tmp_path)
    assert time.process_time() - clock < 1.0 and page.stat().st_size < 15e6
    galleries, thinned = gallery_frames(tmp_path, round_metrics(tmp_path))
    assert not thinned and [len(gallery.frames) for gallery in galleries] == [11, 11, 11]
    for path in (tmp_path / "figures").glob("*.png"):
        path.write_bytes(b"\x89PNG" + bytes(1_000_000))
    assert write_report(tmp_path).stat().st_size < 15e6
    kept = [frame.k for frame in gallery_frames(tmp_path, round_metrics(tmp_path))[0][0].frames]
    assert kept[0] == 0 and kept[-1] == 10 and len(kept) < 11


def test_all_that_evaluate_finds_is_shown_in_words(images, tmp_path):
    """The page of a run that the real `emdiff evaluate` judged: verdict, every figure with a meaning, every chart and picture."""
    run = shutil.copytree(images, tmp_path / "run")
    main(["evaluate", "--run", f"{run}", "--observations", f"{images.parent}/obs.npz", "--samples", "4", "--prior-samples", "50", "--device", "cpu"])
    found = json.loads((run / "evaluation/metrics.json").read_text())
    page = page_of(run, round_metrics(run))
    shown = {name: value for table in page["tables"] for name, value, *_ in table["rows"]}
    assert shown == {name: value for name, value in found["figures"].items() if value is not None} and len(shown) > 25
    assert all(meaning(name).label != name for name in shown)
    assert page["verdict"] == found["verdict"] and found["verdict"]["text"] in write_report(run).read_text()
    assert len(page["calibration"]) == 4 and len(page["residual_rows"]) == 2
    assert [row.label for row in page["blocks"][0].rows] == ["observation", "truth", "one sample", "mean", "std", "residual / noise"]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_a_broken_evaluation_is_named_and_does_not_stop_the_page(content, vectors, tmp_path):
    run = evaluated(vectors, tmp_path / "run", 1)
    (run / "evaluation/arrays.npz").write_bytes(content)
    (run / "evaluation/metrics.json").write_text('{"figures": {"chi2"')
    text = write_report(run).read_text()
    assert text.count("cannot be read (") >= 2 and "arrays.npz" in text and "run `emdiff evaluate` again" in text


@pytest.mark.parametrize("metrics", [{}, [], {"figures": [1], "verdict": "good", "floors": None}, {"verdict": {"reasons": "one"}, "iter": "x"}])
def test_an_evaluation_may_lack_anything(metrics, images, tmp_path):
    run = evaluated(images, tmp_path / "run", 2)
    (run / "evaluation/metrics.json").write_text(json.dumps(metrics))
    for missing in ("mean", "residual", "chi2", "rank_counts", "std"):
        with np.load(run / "evaluation/arrays.npz") as file:
            kept = {name: file[name] for name in file.files if name != missing}
        np.savez(run / "evaluation/arrays.npz", **kept)
        assert "Not evaluated" in write_report(run).read_text()


BAD = {
    "no run": (["--run", "nowhere"], ["nowhere", "no such run"]),
    "no round": (["--run", "empty"], ["empty", "no finished round"]),
    "broken round": (["--run", "broken"], ["broken/start/metrics.json", "remove"]),
    "a folder below a file": (["--run", "run", "--out", "file/r.html"], ["file/r.html", "--out"]),
    "a page that is a folder": (["--run", "run", "--out", "folder.html"], ["folder.html", "--out"]),
    "not a page": (["--run", "run", "--out", "r.txt"], ["--out", "r.txt", ".html"]),
    "not a PDF": (["--run", "run", "--pdf", "r.ps"], ["--pdf", "r.ps", ".pdf"]),
    "no browser": (["--run", "run", "--pdf", "r.pdf"], ["--pdf", "Chromium", "install"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, vectors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    for folder in ("empty", "broken/start", "folder.html", "run"):
        Path(folder).mkdir(parents=True)
    Path("file").touch()
    Path("broken/start/metrics.json").write_text("{")
    shutil.copytree(vectors / "start", "run/start")
    flags, wanted = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(["report", *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and all(word in lines[0] for word in wanted), lines
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".html", ".pdf") and path.is_file()]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_on_the_axis_and_read_differently(low, length):
    high = low + max(length, 1e-6 * abs(low))
    ticks = nice_ticks(low, high)
    room = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 12 and low - room <= ticks[0] and ticks[-1] <= high + room
    assert len(set(words(ticks))) == len(ticks)


def test_charts_are_linear_and_upright():
    chart = Chart("t", (2.0, 4.0), (-1.0, 3.0))
    (x0, y0), (x1, y1), (xm, ym) = chart.at(2, -1), chart.at(4, 3), chart.at(2.5, 0)
    assert x0 < x1 and y0 > y1
    np.testing.assert_allclose([xm, ym], [x0 + (x1 - x0) / 4, y0 + (y1 - y0) / 4])


@pytest.mark.parametrize("entries", [1, 20])
def test_the_band_of_ranks_holds_uniform_counts(entries):
    """95 % of uniform counts fall within the band that is drawn, also where all entries of a datum have one rank; and it is no wider than that."""
    counts = entries * np.random.default_rng(1).multinomial(340, np.full(17, 1 / 17))
    chart = rank_chart(counts, 340)
    law = next(mark for mark in chart.marks if mark.kind == "law")
    bottom, top = (float(law.points.split()[i].split(",")[1]) for i in (0, 2))
    low, high = binom.ppf([0.025, 0.975], 340, 1 / 17) * entries
    np.testing.assert_allclose([bottom, top], [chart.at(0, low)[1], chart.at(0, high)[1]], atol=0.06)
    tops = [mark.box[1] for mark in chart.marks if mark.kind == "bar"]
    assert np.argmin(tops) == np.argmax(counts) and np.mean([top <= y <= bottom for y in tops]) > 0.8


def test_colours_of_residuals_are_white_at_zero_and_opposite_at_the_ends():
    colours = palette(RESIDUAL).astype(int)
    assert colours[127].min() > 240 and colours[0][2] > colours[0][0] + 80 and colours[255][0] > colours[255][2] + 80


@pytest.mark.parametrize("unseen", [np.nan, 0.0])
def test_unseen_entries_do_not_enter_the_residual_maps(unseen):
    """A mask that hides 70 % leaves the z-scores of the mean standard normal; counting hidden zeros would shrink them by half."""
    rng = np.random.default_rng(0)
    residual = np.where(rng.random((40, 6, 5)) < 0.3, rng.standard_normal((40, 6, 5)), unseen)
    residual[:, 2, 2] = unseen
    rows, chart = residuals({"residual": residual})
    assert len(rows) == 2 and chart is None and (rows[0].picture.width, rows[0].picture.height) == (5, 6)
    assert residuals({"residual": np.full((4, 7), np.nan)}) == ([], None)
    flat = residuals({"residual": residual.reshape(40, 30)})[1]
    heights = [float(point.split(",")[1]) for point in next(mark for mark in flat.marks if mark.kind == "line").points.split()]
    unit = flat.at(0, 0)[1] - flat.at(0, 1)[1]
    assert len(heights) == 29 and np.std(heights) / unit == pytest.approx(1, abs=0.3)


def test_the_worst_data_are_those_with_the_largest_chi2():
    rng = np.random.default_rng(0)
    arrays = {"mean": rng.random((20, 4)), "std": rng.random((20, 4)), "chi2": rng.random(50)}
    worst = reconstructions(arrays)[1]
    assert [chart.title for chart in worst.charts] == [f"datum {i}" for i in np.argsort(-arrays["chi2"][:20])[:PER_BLOCK]]
