"""Kill -9 at many points of an ingestion: of the driver, of workers, of a node; the next run makes it whole, once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.platform.errors import CorpusError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

CELLS = {"a": 300, "b": 200, "c": 250}
UNIT_NONZEROS = 500
COMMAND = (sys.executable, "-c", "import sys; from genescale.platform.cli import main; sys.exit(main(sys.argv[1:]))")
Rows = dict[str, dict[int, str]]


class Case:
    """Three atlases of some thirty units each, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, rows_of: Any, listing_of: Any) -> None:
        self.folder, self.vocabulary, self.rows_of, self.listing_of = folder, vocabulary, rows_of, listing_of
        self.store = Store(storage_settings())
        self.sources = str(folder / "raw" / "*.h5ad")
        self.vocabulary_file = str(folder / "vocabulary.parquet")
        self.expected: Rows = {}
        self._corpora = 0

    def new_corpus(self) -> Path:
        self._corpora += 1
        return self.folder / f"corpus{self._corpora}"

    def ingest(self, corpus: Path) -> Any:
        return ingest(
            [self.sources], str(corpus), vocabulary=self.vocabulary, store=self.store,
            config=IngestConfig(unit_nonzeros=UNIT_NONZEROS),
        )  # fmt: skip

    def seen(self, corpus: Path) -> Rows:
        """What a reader finds; every dataset of it must be whole."""
        try:
            found: Rows = self.rows_of(Corpus.open(str(corpus), self.store))
        except CorpusError:
            return {}
        assert found == {name: self.expected[name] for name in found}, "a reader met half a source"
        return found

    def make_whole(self, corpus: Path) -> None:
        """The next run finishes what a killed one left, and the one after it writes nothing and says so."""
        seen = self.seen(corpus)
        report = self.ingest(corpus)
        assert report.ok, [source.failure for source in report.of("refused")]
        assert {source.dataset_id for source in report.of("already_committed")} == set(seen)
        assert self.seen(corpus) == self.expected
        before = self.listing_of(str(corpus), self.store)
        again = self.ingest(corpus)
        assert self.listing_of(str(corpus), self.store) == before, "a second run wrote something"
        assert [source.status for source in again.sources] == ["already_committed"] * len(CELLS)
        assert (again.version, again.read) == (report.version, 0)

    def command(self, corpus: Path, *more: str) -> list[str]:
        fixed = ("--vocabulary", self.vocabulary_file, "--unit-nonzeros", str(UNIT_NONZEROS), "--json")
        return [*COMMAND, "ingest", self.sources, "--corpus", str(corpus), *fixed, *more]


def storage_settings() -> Any:
    from genescale.platform.settings import StorageSettings

    return StorageSettings()


@pytest.fixture(scope="module")
def case(
    ray_local: None,
    tmp_path_factory: pytest.TempPathFactory,
    vocabulary: Vocabulary,
    write_h5ad: Callable[[Path, int, int], Path],
    rows_of: Any,
    listing_of: Any,
) -> Case:
    folder = tmp_path_factory.mktemp("kills")
    for seed, (name, n_cells) in enumerate(CELLS.items()):
        write_h5ad(folder / "raw" / f"{name}.h5ad", n_cells, seed)
    case = Case(folder, vocabulary, rows_of, listing_of)
    case.store.write(case.vocabulary_file, vocabulary.to_parquet_bytes())
    undisturbed = folder / "undisturbed"
    assert case.ingest(undisturbed).ok
    case.expected = rows_of(Corpus.open(str(undisturbed), case.store))
    assert {name: len(rows) for name, rows in case.expected.items()} == CELLS
    assert parts_below(undisturbed) > 45, "enough units for many points to be killed at"
    return case


def parts_below(corpus: Path) -> int:
    return len(list(corpus.rglob("part-*.parquet")))


def commits_below(corpus: Path) -> int:
    return len(list((corpus / "_delta_log").glob("*.json")))


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster_address(ray_local: None) -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def kill_driver(case: Case, corpus: Path, when: Callable[[], bool], environment: dict[str, str]) -> bool:
    """Run `genescale ingest` and end it with SIGKILL as soon as `when()`; false when it finished before that."""
    process = subprocess.Popen(
        case.command(corpus),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        cwd=case.folder,
        start_new_session=True,
    )
    try:
        while process.poll() is None:
            if when():
                process.kill()
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode == -signal.SIGKILL


def after(seconds: float, start: Callable[[], bool]) -> Callable[[], bool]:
    """True that many seconds after `start()` was first true."""
    began: list[float] = []

    def reached() -> bool:
        if not began and start():
            began.append(time.monotonic())
        return bool(began) and time.monotonic() - began[0] >= seconds

    return reached


def points(corpus: Path) -> dict[str, Callable[[], bool]]:
    draws = random.Random(20240607)
    found: dict[str, Callable[[], bool]] = {
        f"{n} parts": lambda n=n: parts_below(corpus) >= n for n in (1, 3, 8, 15, 25, 33, 40, 50)
    }
    found |= {f"{n} commits": lambda n=n: commits_below(corpus) >= n for n in (1, 2, 3, 4)}
    found |= {
        f"{delay:.2f} s after the first file": after(delay, lambda: corpus.exists())
        for delay in (draws.uniform(0, 3) for _ in range(8))
    }
    return found


QUICK = ("1 parts", "2 commits")


@pytest.mark.parametrize("point", QUICK)
def test_the_driver_is_killed(case: Case, cluster_address: str, point: str) -> None:
    corpus = case.new_corpus()
    killed = kill_driver(case, corpus, points(corpus)[point], {"GENESCALE_CLUSTER__ADDRESS": cluster_address})
    assert killed, "the run was over before it could be killed"
    case.seen(corpus)
    case.make_whole(corpus)


@pytest.mark.slow
@pytest.mark.parametrize("point", [point for point in points(Path("unused")) if point not in QUICK])
def test_the_driver_is_killed_anywhere(case: Case, cluster_address: str, point: str) -> None:
    corpus = case.new_corpus()
    kill_driver(case, corpus, points(corpus)[point], {"GENESCALE_CLUSTER__ADDRESS": cluster_address})
    case.seen(corpus)
    case.make_whole(corpus)


@pytest.mark.slow
def test_the_driver_is_killed_with_the_ray_it_started(case: Case, tmp_path: Path) -> None:
    corpus = case.new_corpus()
    environment = {"GENESCALE_CLUSTER__NUM_CPUS": "2", "GENESCALE_CLUSTER__TEMP_DIR": str(tmp_path / "ray")}
    assert kill_driver(case, corpus, points(corpus)["8 parts"], environment)
    case.make_whole(corpus)


@pytest.mark.slow
def test_one_run_is_killed_again_and_again(case: Case, cluster_address: str) -> None:
    """Every run gets a little further; none doubles what an earlier one left."""
    corpus, before = case.new_corpus(), 0
    for more in (2, 20):
        target = before + more
        kill_driver(
            case, corpus, lambda target=target: parts_below(corpus) >= target,
            {"GENESCALE_CLUSTER__ADDRESS": cluster_address},
        )  # fmt: skip
        before = parts_below(corpus)
        case.seen(corpus)
    case.make_whole(corpus)


# --- workers ----------------------------------------------------------------------------------------------------------


def working_processes() -> list[int]:
    """Ray workers below this process that run a task of Ray Data now."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode(errors="replace")
            except (OSError, IndexError):
                continue

    def ours(pid: int) -> bool:
        while pid > 1:
            if pid == os.getpid():
                return True
            pid = parents.get(pid, 0)
        return False

    return [pid for pid, title in titles.items() if title.startswith("ray::") and "Map" in title and ours(pid)]


@pytest.fixture
def worker_killer() -> Iterator[Callable[[Callable[[], bool], int], threading.Thread]]:
    """`start(when, kills)` ends so many working Ray processes, one after the other, as soon as `when()`."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def start(when: Callable[[], bool], kills: int) -> Any:
        def run() -> None:
            while not done.is_set() and kill.left:
                if when() and (found := working_processes()):
                    # It may have ended by itself since it was seen.
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(found[0], signal.SIGKILL)
                        kill.left -= 1
                    done.wait(0.4)
                time.sleep(0.01)

        kill = type("Kill", (), {"left": kills})()
        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return kill

    yield start
    done.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kills", [1, 4])
def test_workers_are_killed(case: Case, worker_killer: Any, kills: int) -> None:
    corpus = case.new_corpus()
    killer = worker_killer(lambda: parts_below(corpus) >= 2, kills)
    report = case.ingest(corpus)
    assert killer.left == 0, "too few workers could be killed"
    assert report.ok, [source.failure for source in report.of("refused")]
    assert case.seen(corpus) == case.expected, "the run itself makes up for its dead workers"
    case.make_whole(corpus)


def test_workers_are_killed_while_files_are_inspected(case: Case, worker_killer: Any) -> None:
    corpus = case.new_corpus()
    killer = worker_killer(lambda: True, 1)
    assert case.ingest(corpus).ok
    assert killer.left == 0
    assert case.seen(corpus) == case.expected


# --- a node -----------------------------------------------------------------------------------------------------------


def lose_a_node(case: Case, tmp_path: Path, kill_at: int) -> None:
    corpus = case.new_corpus()
    job = {
        "sources": [case.sources], "corpus": str(corpus), "vocabulary": case.vocabulary_file,
        "unit_nonzeros": UNIT_NONZEROS, "kill_at": kill_at,
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(tmp_path / "job.json")],
        capture_output=True, text=True, timeout=170, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4_000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["ended"] == -signal.SIGKILL, "the node was not killed in mid-run"
    assert [source["status"] for source in told["report"]["sources"]] == ["ingested"] * 3, told["report"]
    assert case.seen(corpus) == case.expected
    case.make_whole(corpus)


@pytest.mark.slow
def test_a_node_is_lost(case: Case, tmp_path: Path) -> None:
    lose_a_node(case, tmp_path, kill_at=15)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [0, 5, 30, 45])
def test_a_node_is_lost_anywhere(case: Case, tmp_path: Path, kill_at: int) -> None:
    lose_a_node(case, tmp_path, kill_at)
