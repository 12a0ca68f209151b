#!/usr/bin/env python
r"""Feed damaged and hostile files to every reader of emdiff and count what happens.

    python scripts/fuzz.py                                       # 100,000 cases and more, all targets, all engines
    python scripts/fuzz.py --target h5 --engine mutate --cases 5000 --seed 1

Engines: `mutate` damages valid files (bits, lengths, numbers in headers, pieces of other files); `hypothesis` builds files from drawn headers and
values; `atheris` (extra `fuzz`) lets libFuzzer look for new branches of emdiff, numpy's header parser, zipfile and yaml. A case passes if the file
is read, or refused by a `UsageError` of one printable line. Anything else fails, its file kept under --failures: another exception, a case over
SLOW seconds, a worker that dies or needs over MEMORY bytes. Workers are processes of their own: a C library's crash counts too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzz_targets
from fuzz_targets import TARGETS

SLOW = 5.0
"""Seconds after which a case counts as failed."""

MEMORY = 1 << 29
"""Bytes that a worker may need beyond what it needs for valid files."""

ENGINES = {"mutate": 11_000, "hypothesis": 1_500, "atheris": 4_000}
"""Engines, and the cases of each target."""


class Bench:
    """Runs cases of one target in a folder of its own, and keeps what failed.

    Args:
        name: The target.
        folder: Where its files lie.
        failures: Where files that failed are kept.
    """

    def __init__(self, name: str, folder: Path, failures: Path) -> None:
        from emdiff.errors import UsageError

        self.refusal, self.name, self.failures, self.counts = UsageError, name, failures, Counter[str]()
        os.chdir(folder)
        fuzz_targets.OBSERVATIONS.write_bytes(fuzz_targets.archives(".npz")[0])
        file, self.seeds, self.read = fuzz_targets.target(name)
        self.path = folder / "case" / file
        self.path.parent.mkdir(exist_ok=True)
        for seed in self.seeds:
            self.run(seed)
        self.valid, self.counts = self.counts["read"], Counter()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(self, content: bytes) -> None:
        """One case: read, refused in one line, or failed."""
        self.path.write_bytes(content)
        clock, outcome, why = time.perf_counter(), "read", ""
        try:
            with contextlib.redirect_stdout(None):
                self.read(self.path)
        except self.refusal as error:
            outcome = "refused" if str(error).isprintable() else "failed"
            why = str(error)
        except BaseException as error:
            outcome, why = "failed", f"{type(error).__name__}: {error}"
        if time.perf_counter() - clock > SLOW:
            outcome, why = "failed", f"{time.perf_counter() - clock:.1f} s"
        if outcome == "failed":
            self.failures.mkdir(parents=True, exist_ok=True)
            kept = self.failures / f"{self.name}-{self.counts['failed']}-{os.getpid()}"
            kept.write_bytes(content)
            kept.with_suffix(".txt").write_text(why)
        self.counts[outcome] += 1

    def growth(self) -> int:
        """Bytes of memory needed beyond what the valid files needed."""
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory)


def mutate(bench: Bench, cases: int, seed: int) -> None:
    """Damaged copies of valid files."""
    draw = random.Random(f"{bench.name}/{seed}")
    for _ in range(cases):
        bench.run(fuzz_targets.mutated(bench.seeds, draw))


def draw_structured(bench: Bench, cases: int, seed: int) -> None:
    """Files built by hypothesis."""
    import hypothesis
    from fuzz_strategies import contents

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(contents(bench.name))
    def case(content: bytes) -> None:
        if sum(bench.counts.values()) < cases:
            bench.run(content)

    case()


def guide_by_coverage(bench: Bench, cases: int, seed: int) -> None:
    """libFuzzer, which does not return: after the last case the worker says its counts and ends."""
    import atheris

    corpus = bench.path.parent.parent / "corpus"
    corpus.mkdir()
    for i, content in enumerate(bench.seeds):
        (corpus / str(i)).write_bytes(content)

    def case(content: bytes) -> None:
        bench.run(content)
        if sum(bench.counts.values()) >= cases:
            summary(bench)
            shutil.rmtree(corpus.parent, ignore_errors=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=0", "-verbosity=0", str(corpus)], case)
    atheris.Fuzz()


def summary(bench: Bench) -> None:
    """One line for the parent, on stdout."""
    counts = bench.counts
    print(f"\nCOUNTS {counts['read']} {counts['refused']} {counts['failed']} {bench.growth()} {bench.valid} {len(bench.seeds)}", flush=True)


RUN: dict[str, Callable[[Bench, int, int], None]] = {"mutate": mutate, "hypothesis": draw_structured, "atheris": guide_by_coverage}


def work(name: str, engine: str, cases: int, seed: int, failures: Path) -> None:
    """A worker: one target, one engine."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["emdiff", "observers", "zipfile", "yaml", "numpy.lib.format", "numpy.lib._format_impl"]):
            import emdiff.report  # noqa: F401
    if engine == "hypothesis":
        import fuzz_strategies  # noqa: F401 (its memory is not the readers')
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, ignore_cleanup_errors=True) as folder:
        bench = Bench(name, Path(folder), failures)
        RUN[engine](bench, cases, seed)
        summary(bench)


def main() -> int:
    """All targets under all engines, a table, and status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="this target only; may be given again")
    parser.add_argument("--engine", choices=tuple(ENGINES), action="append", help="this engine only; may be given again")
    parser.add_argument("--cases", type=int, help="cases of each target under each engine; by default " + str(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for files that failed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.target[0], args.engine[0], args.cases, args.seed, args.failures)
        return 0
    total, lost = Counter[str](), 0
    print(f"{'target':<10}{'engine':<12}{'cases':>8}{'read':>8}{'refused':>9}{'failed':>8}{'MB':>7}{'s':>7}")
    for name in args.target or TARGETS:
        for engine in args.engine or ENGINES:
            cases, clock = args.cases or ENGINES[engine], time.perf_counter()
            command = [sys.executable, __file__, "--worker", "--target", name, "--engine", engine, "--cases", str(cases)]
            command += ["--seed", str(args.seed), "--failures", str(args.failures.resolve())]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120 + 0.1 * cases)
                line = next((text for text in done.stdout.splitlines() if text.startswith("COUNTS")), None)
                why = f"worker ended with status {done.returncode}"
            except subprocess.TimeoutExpired:
                line, why = None, "worker hung"
            if line is None:
                lost += 1
                print(f"{name:<10}{engine:<12}  {why}", flush=True)
                continue
            read, refused, failed, growth, valid, seeds = map(int, line.split()[1:])
            failed += growth > MEMORY
            total.update(cases=read + refused + failed, read=read, refused=refused, failed=failed)
            assert valid == seeds or name in ("lock", "features", "metrics"), f"{name}: {seeds - valid} valid files were refused"
            figures = f"{read + refused + failed:8}{read:8}{refused:9}{failed:8}{growth / 1e6:7.0f}{time.perf_counter() - clock:7.1f}"
            print(f"{name:<10}{engine:<12}{figures}", flush=True)
    print(
        f"seed {args.seed}: {total['cases']} cases, {total['read']} read, {total['refused']} refused, {total['failed']} failed, {lost} workers lost"
    )
    return int(bool(total["failed"] or lost))


if __name__ == "__main__":
    sys.exit(main())
