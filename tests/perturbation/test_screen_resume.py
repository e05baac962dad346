"""A screen that is killed with signal 9, driver and worker, at several points: it continues and repeats nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.screening.plan import Plan, make_plan
from genescale.perturbation.screening.results import CELL_SHIFTS, parquet_bytes, read_screen
from genescale.perturbation.screening.screen_readouts import readouts_of
from genescale.perturbation.screening.spec import read_spec
from genescale.perturbation.screening.unit_work import UnitWorker
from genescale.platform.bundle import Bundle
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder

pytestmark = pytest.mark.slow
COMMAND = (sys.executable, "-c", "import sys; from genescale.platform.cli import main; sys.exit(main(sys.argv[1:]))")
PATIENCE_S = 180.0


class Case:
    """A screen of some sixty units at one output, started again and again."""

    def __init__(self, folder: Path, bundle: Bundle, corpus: Corpus) -> None:
        self.folder, self.out = folder, folder / "out"
        self.spec = folder / "spec.toml"
        self.spec.write_text(
            f"""
            model = "{bundle.folder}"
            corpus = "{corpus.uri}@{corpus.version}"
            output = "{self.out}"
            [edits]
            all = true
            [readouts]
            gene_shifts = "all"
            [compute]
            device = "cpu"
            tokens_per_unit = 700
            """
        )
        self.config = read_spec(self.spec).config
        (folder / "genescale.toml").write_text("[cluster]\nnum_cpus = 2\nnum_gpus = 0\n")

    @contextlib.contextmanager
    def started(self, run_in: str) -> Iterator[subprocess.Popen[bytes]]:
        """The command running; whatever it started is gone at the end."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = (self.folder / "log").open("ab")
        run = subprocess.Popen(
            [*COMMAND, "perturb", "screen", str(self.spec), "--no-report", "--json",
             "--set", f"compute.run_in={run_in}"],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        self.family: set[int] = set()
        try:
            yield run
        finally:
            self.family |= below(run.pid)
            run.kill()
            run.wait()
            if run.stdout is not None:
                run.stdout.close()
            log.close()
            until = time.monotonic() + 60
            while (alive := {pid for pid in self.family if Path(f"/proc/{pid}").exists()}) and time.monotonic() < until:
                time.sleep(0.1)
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def marks(self) -> int:
        """Units that are complete."""
        return len(list((self.out / "_units").glob("unit-*.json")))

    def wait_for(self, run: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
        """Until it has happened; fails when the command ends first."""
        until = time.monotonic() + PATIENCE_S
        while not happened():
            assert run.poll() is None, f"the command ended early:\n{(self.folder / 'log').read_text()[-2000:]}"
            assert time.monotonic() < until, "nothing happened"
            time.sleep(0.002)

    def killed_when(self, happened: Callable[[], bool], run_in: str) -> dict[str, tuple[int, str]]:
        """Start the command, kill its process at this moment, and say which files of finished units there are."""
        with self.started(run_in) as run:
            self.wait_for(run, happened)
            self.family |= below(run.pid)
            os.kill(run.pid, signal.SIGKILL)
        return self.finished_files()

    def check_whole(
        self,
        record: dict[str, Any],
        plan: Plan,
        seen: dict[str, tuple[int, str]],
        n_finished: int,
        embedder: Embedder,
        corpus: Corpus,
    ) -> None:
        """The screen is complete, what was `seen` before is untouched, and every byte is as it should be."""
        assert record["n_units_reused"] == n_finished
        assert self.marks() == record["n_units"] == plan.n_units
        now = self.finished_files()
        assert {name: now[name] for name in seen} == seen, "a finished unit was written again"
        # Every byte is what an undisturbed worker makes, and nothing else lies there.
        worker = UnitWorker(plan, embedder, readouts_of(self.config, plan, None, None))
        for unit in range(plan.n_units):
            expected = parquet_bytes(worker.run(unit, corpus.tokens).tables()[CELL_SHIFTS])
            assert (self.out / CELL_SHIFTS / f"unit-{unit:06d}.parquet").read_bytes() == expected
        rows = read_screen(str(self.out), corpus.store).cell_shifts
        assert len(rows) == plan.n_pairs == rows.select("cell_id", "edit_id").n_unique()
        left = {path.relative_to(self.out).as_posix() for path in self.out.rglob("*") if path.is_file()}
        marks = {f"_units/unit-{unit:06d}.json" for unit in range(plan.n_units)}
        assert left == {*record["parts"], *marks, "_plan.json", "_screen.json"}

    def finished_files(self) -> dict[str, tuple[int, str]]:
        """Time of change and digest of each lasting file of a finished unit."""
        found = {}
        for mark in sorted((self.out / "_units").glob("unit-*.json")):
            for name in (f"_units/{mark.name}", *json.loads(mark.read_text())["parts"]):
                # The sums behind the gene shifts go when the screen is complete.
                if not name.startswith("gene_moments/"):
                    path = self.out / name
                    found[name] = (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        return found


def below(pid: int) -> set[int]:
    """Processes that this one started, and those that they did."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            # The name, in brackets, may hold blanks.
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def workers_of(run: subprocess.Popen[bytes]) -> list[int]:
    """The Ray workers that hold a model."""
    found = []
    for pid in below(run.pid):
        with contextlib.suppress(OSError):
            if "_Worker" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@pytest.mark.timeout(900)
def test_kills_of_the_only_process_repeat_no_finished_unit(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    case = Case(tmp_path, framed_bundle, corpus)
    plan = make_plan(framed_bundle, corpus, case.config, store=local_store)
    assert plan.n_units > 50
    moments: list[Callable[[], bool]] = [
        lambda: (case.out / "_plan.json").exists(),
        lambda: case.marks() >= 5,
        lambda: case.marks() >= plan.n_units // 2,
        # All units are there and their gene shifts are being merged, or just were.
        lambda: case.marks() == plan.n_units,
    ]
    seen: dict[str, tuple[int, str]] = {}
    for moment in moments:
        after = case.killed_when(moment, "process")
        assert {name: after[name] for name in seen} == seen, "a finished unit was written again"
        seen = after
    n_finished = case.marks()
    with case.started("process") as run:
        output, _ = run.communicate(timeout=PATIENCE_S)
    case.check_whole(json.loads(output), plan, seen, n_finished, framed, corpus)


@pytest.mark.timeout(900)
def test_kills_of_driver_and_worker_on_ray_repeat_no_finished_unit(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    case = Case(tmp_path, framed_bundle, corpus)
    plan = make_plan(framed_bundle, corpus, case.config, store=local_store)
    seen = case.killed_when(lambda: case.marks() >= 5, "cluster")
    n_finished = case.marks()
    assert 0 < n_finished < plan.n_units
    # The run that goes on loses a worker on the way, and is complete all the same.
    with case.started("cluster") as run:
        case.wait_for(run, lambda: case.marks() > n_finished and bool(workers_of(run)))
        os.kill(workers_of(run)[0], signal.SIGKILL)
        output, _ = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0
    case.check_whole(json.loads(output), plan, seen, n_finished, framed, corpus)
