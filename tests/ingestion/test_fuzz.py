"""Damaged files of every format end in a clear error or the right tokens, never in a crash, a hang or wrong tokens."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "fuzz"
KINDS = ("h5ad-csr", "h5ad-csc", "h5ad-dense", "h5ad-plain", "zarr2-zip", "zarr3-zip", "loom", "tenx", "mtx")
PROCESSES = 2
FIRST_ANSWER_S, ANSWER_S = 120, 20
N_CELLS = 120
CLEAR = {"atlas", "not_counts", "storage", "not_found", "limit"}


class Server:
    """A process that answers JSON lines; started again when it crashed or had to be ended."""

    def __init__(self, script: str) -> None:
        self._command = [sys.executable, str(FOLDER / script)]
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer, or {"dead": how} when there is none."""
        with self._lock:
            fresh = self._process is None
            process = self._process = self._process or subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], FIRST_ANSWER_S if fresh else ANSWER_S)
            line = process.stdout.readline() if ready else ""
            if line:
                return dict(json.loads(line))
            self._end()
            return {"dead": f"crashed with {process.returncode}" if ready else f"hung for {ANSWER_S} s"}

    def _end(self) -> None:
        if self._process:
            self._process.kill() if self._process.poll() is None else None
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._end()


class Bench:
    """Reads damaged files in processes of their own, and judges what came of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.originals: dict[str, Path] = {}
        self.whole: dict[str, dict[str, str]] = {}
        self.second = Server("second_reader.py")
        self.readers: SimpleQueue[Server] = SimpleQueue()
        for _ in range(PROCESSES):
            self.readers.put(Server("worker.py"))

    def prepare(self) -> None:
        """Write the valid files and read them both ways."""
        script = (
            "import sys; from pathlib import Path; from originals import KINDS, write_original\n"
            "print({kind: str(write_original(kind, Path(sys.argv[1]))) for kind in KINDS})"
        )
        raw = self.folder / "raw"
        raw.mkdir()
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(raw)], cwd=FOLDER, check=True, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        self.originals = {kind: Path(path) for kind, path in eval(done.stdout.splitlines()[-1]).items()}
        for kind in KINDS:
            path = self.originals[kind]
            read = self._read({"path": str(path), "folder": str(self.folder / "c"), "kind": kind})
            assert "rows" in read, (kind, read)
            second = self.second.ask({"kind": kind, "path": str(path)})
            assert read["rows"] == second["rows"], kind
            assert len(read["rows"]) == N_CELLS
            self.whole[kind] = read["rows"]

    def _read(self, job: dict[str, Any]) -> dict[str, Any]:
        reader = self.readers.get()
        try:
            return reader.ask(job)
        finally:
            self.readers.put(reader)

    def judge(self, kind: str, seed: int) -> tuple[str, str]:
        """What became of one damaged file: `refused`, `same`, `right`, or a finding and its description."""
        out = self.folder / f"{kind}-{seed}"
        path = out / self.originals[kind].name
        out.mkdir()
        job = {"kind": kind, "seed": seed, "original": str(self.originals[kind]), "path": str(path)}
        read = self._read({**job, "folder": str(out / "corpus")})
        found, what = self._judged(kind, path, read)
        shutil.rmtree(out)
        return found, f"{kind} seed {seed} ({read.get('mutation', '?')}): {found}: {what}" if what else ""

    def _judged(self, kind: str, path: Path, read: dict[str, Any]) -> tuple[str, str]:
        if "dead" in read:
            return "dead", read["dead"]
        if "broken" in read:
            return "broken", read["message"]
        if "refused" in read:
            clear = read["refused"] in CLEAR and path.name.partition(".")[0] in read["message"]
            return ("refused", "") if clear else ("unclear", f"[{read['refused']}] {read['message']}")
        if read["rows"] == self.whole[kind]:
            return "same", ""
        second = self.second.ask({"kind": kind, "path": str(path)})
        if second.get("rows") == read["rows"]:
            return "right", ""
        wrong = {n for n in read["rows"] if second.get("rows", {}).get(n) != read["rows"][n]}
        other = second.get("failed") or second.get("dead") or f"{len(second['rows'])} rows, {len(wrong)} differ"
        return "wrong", f"{len(read['rows'])} rows were read; the second reader: {other}"

    def close(self) -> None:
        self.second.close()
        while not self.readers.empty():
            self.readers.get().close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    found = Bench(tmp_path_factory.mktemp("fuzz"))
    try:
        found.prepare()
        yield found
    finally:
        found.close()


def judged(bench: Bench, seeds: range, kinds: tuple[str, ...] = KINDS) -> Counter[str]:
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = list(pool.map(lambda job: bench.judge(*job), [(kind, seed) for seed in seeds for kind in kinds]))
    findings = [text for found, text in results if found not in ("refused", "same", "right")]
    assert not findings, f"{len(findings)} findings\n" + "\n".join(findings[:40])
    return Counter(found for found, _ in results)


def test_a_handful_of_damaged_files(bench: Bench) -> None:
    outcomes = judged(bench, range(7))
    assert sum(outcomes.values()) == 63
    assert outcomes["refused"] > 10, "the damage was real"


# Damage that once made a library turn in a circle, ask for 16 GB, or raise what nobody expected.
FOUND_BEFORE = (
    ("loom", 1_042), ("loom", 1_249), ("h5ad-dense", 1_007), ("h5ad-dense", 1_063), ("h5ad-dense", 1_080),
    ("zarr3-zip", 1_234), ("tenx", 20_366),
)  # fmt: skip


def test_damage_that_was_a_finding_once(bench: Bench) -> None:
    findings = [text for kind, seed in FOUND_BEFORE for found, text in [bench.judge(kind, seed)] if text]
    assert not findings, "\n".join(findings)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_damaged_files(bench: Bench, kind: str) -> None:
    """2,250 files over all kinds."""
    outcomes = judged(bench, range(1_000, 1_250), (kind,))
    assert sum(outcomes.values()) == 250
    assert min(outcomes["refused"], outcomes["same"] + outcomes["right"]) > 10, outcomes
