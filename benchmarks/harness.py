"""What every benchmark shares: processor time, medians of repeats in turn, rows of claims, one JSON file.

A claim has a value and, where it has one, a bar; a ratio is of two medians taken in turn in one run on one machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPEATS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One claim: `ratio` compares `value` with `baseline`; `holds` is None where nothing is promised."""

    claim: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    bar: str = ""
    holds: bool | None = None
    note: str = ""


def at_least(claim: str, value: float, unit: str, bar: float, *, note: str = "") -> Row:
    return Row(claim=claim, value=value, unit=unit, bar=f"≥ {bar:g}", holds=value >= bar, note=note)


def at_most(claim: str, value: float, unit: str, bar: float, *, note: str = "") -> Row:
    return Row(claim=claim, value=value, unit=unit, bar=f"≤ {bar:g}", holds=value <= bar, note=note)


def times_faster(claim: str, value: float, baseline: float, unit: str, bar: float, *, note: str = "") -> Row:
    """Rates of ours and of the baseline, and at least how many times as fast ours has to be."""
    ratio = value / baseline
    return Row(
        claim=claim, value=value, unit=unit, baseline=baseline, ratio=ratio, bar=f"≥ {bar:g} ×", holds=ratio >= bar,
        note=note,
    )  # fmt: skip


def measured(claim: str, value: float, unit: str, *, note: str = "") -> Row:
    return Row(claim=claim, value=value, unit=unit, note=note)


@dataclasses.dataclass
class Spent:
    """Seconds of a piece of work: of all processors (own threads and finished children), and on the wall."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


@contextlib.contextmanager
def spending() -> Iterator[Spent]:
    spent, cpu, wall = Spent(), _cpu_s(), time.perf_counter()
    yield spent
    spent.cpu_s, spent.wall_s = _cpu_s() - cpu, time.perf_counter() - wall


def _cpu_s() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def in_turn(works: Mapping[str, Callable[[], Any]], repeats: int = REPEATS) -> dict[str, Spent]:
    """Median processor and wall seconds of each piece of work; all run once in every round, so noise meets all."""
    seen: dict[str, list[Spent]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            with spending() as spent:
                work()
            seen[name].append(spent)
    return {
        name: Spent(statistics.median(s.cpu_s for s in rounds), statistics.median(s.wall_s for s in rounds))
        for name, rounds in seen.items()
    }


def peak_rss_bytes() -> int:
    """Largest memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parser(about: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--quick", action="store_true", help="under a minute: smaller inputs, the slow parts left out")
    made.add_argument("--output", type=Path, help="where the JSON goes (default benchmarks/results/NAME.json)")
    return made


def finish(name: str, rows: Sequence[Row], packages: Sequence[str], *, quick: bool, output: Path | None = None) -> int:
    """Print the table, write the JSON, and return the exit status: 1 when a bar is missed."""
    path = output or RESULTS / f"{name}{'-quick' if quick else ''}.json"
    facts = {
        "benchmark": name,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "commit": commit(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_table(rows)
    missed = [row.claim for row in rows if row.holds is False]
    print(f"\n{facts['hardware']['processor']}, {facts['hardware']['cores']} cores; {path}")
    if missed:
        print(f"{len(missed)} bars missed: {'; '.join(missed)}")
    return 1 if missed else 0


def print_table(rows: Sequence[Row]) -> None:
    head = ("claim", "value", "unit", "baseline", "ratio", "bar", "")
    cells = [
        (
            row.claim, number(row.value), row.unit, number(row.baseline), number(row.ratio), row.bar,
            {True: "holds", False: "MISSED", None: ""}[row.holds],
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    for line in [head, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def hardware() -> dict[str, Any]:
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory) / 2**20, 1),
        "system": platform.platform(),
        "load_before": load,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def commit() -> str:
    """The commit that is measured, marked when files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()
