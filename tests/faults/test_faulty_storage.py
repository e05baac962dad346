"""Object storage that fails: a run ends ingested or with a clear failure, and the next one makes it whole."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.pipeline import IngestConfig, ingest
from genescale.platform.errors import CorpusError, GenescaleError, StorageError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("ray_local")
FAULTS = ("500", "503", "close", "cut", "delay", "lost")
CLEAR = ("storage", "corpus")
CELLS = {"a": 60, "b": 25, "c": 30}
CONFIG = IngestConfig(unit_nonzeros=1_200)
Rows = dict[str, dict[int, str]]


class Case:
    """Three atlases in a bucket, seen directly and through the endpoint that fails."""

    def __init__(self, endpoint: Any, direct: Store, bucket: str, vocabulary: Vocabulary, rows_of: Any) -> None:
        self.endpoint, self.direct, self.bucket, self.vocabulary, self.rows_of = (
            endpoint, direct, bucket, vocabulary, rows_of,
        )  # fmt: skip
        self.store = Store(endpoint.settings)
        self.expected: Rows = {}
        self.requests = 0

    def ingest(self, uri: str) -> Any:
        return ingest([f"{self.bucket}/raw/*.h5ad"], uri, vocabulary=self.vocabulary, store=self.store, config=CONFIG)

    def new_corpus(self) -> str:
        return f"{self.bucket}/corpus-{uuid.uuid4().hex[:8]}"

    def seen(self, uri: str) -> Rows:
        """What a reader finds now; every dataset of it must be whole."""
        try:
            corpus = Corpus.open(uri, self.direct)
        except CorpusError:
            return {}
        found: Rows = self.rows_of(corpus)
        assert found == {name: self.expected[name] for name in found}, "a reader met half a source"
        return found

    def disturbed(self, uri: str) -> bool:
        """A run under the rule that is set; true when every source was ingested. It may end with a clear error only."""
        readers = Readers(self, uri)
        try:
            report = self.ingest(uri)
        except GenescaleError as error:
            ended = error
        else:
            ended = None
        finally:
            readers.stop()
        if ended is not None:
            assert ended.code in CLEAR
            assert self.bucket in str(ended), "an error says where"
            return False
        for source in report.of("refused"):
            assert source.failure.code in CLEAR, source.failure
            assert self.bucket in source.failure.message
        return bool(report.ok)

    def check(self, uri: str) -> bool:
        """Ingest under faults, then without: whole in the end. Returns whether the faults were overcome at once."""
        overcome = self.disturbed(uri)
        assert self.endpoint.failed, "no request was hit"
        seen = self.seen(uri)
        assert not overcome or seen == self.expected
        self.endpoint.reset()
        report = self.ingest(uri)
        assert report.ok, [source.failure for source in report.of("refused")]
        assert self.seen(uri) == self.expected
        assert {source.dataset_id for source in report.of("already_committed")} == set(seen)
        return overcome


class Readers:
    """A thread that opens the corpus again and again while a run writes to it."""

    def __init__(self, case: Case, uri: str) -> None:
        self._case, self._uri, self._done = case, uri, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            while not self._done.wait(0.3):
                self._case.seen(self._uri)
        except BaseException as error:  # noqa: BLE001 (handed to the test, in stop)
            self._error = error

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        if self._error:
            raise self._error


@pytest.fixture(scope="module")
def case(
    faulty_endpoint: Any,
    s3_settings: StorageSettings,
    vocabulary: Vocabulary,
    write_h5ad: Callable[[Path, int, int], Path],
    rows_of: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    store, bucket = Store(s3_settings), f"s3://test-{uuid.uuid4().hex[:12]}"
    store.create_bucket(bucket)
    folder = tmp_path_factory.mktemp("raw")
    for seed, (name, n_cells) in enumerate(CELLS.items()):
        store.upload(write_h5ad(folder / f"{name}.h5ad", n_cells, seed), f"{bucket}/raw/{name}.h5ad")
    case, uri = Case(faulty_endpoint, store, bucket, vocabulary, rows_of), f"{bucket}/undisturbed"
    faulty_endpoint.reset()
    assert case.ingest(uri).ok
    case.requests = len(faulty_endpoint.requests)
    case.expected = rows_of(Corpus.open(uri, store))
    assert {name: len(rows) for name, rows in case.expected.items()} == CELLS
    return case


def spread(total: int, points: int) -> list[int]:
    """Request numbers over the whole of a run; the number of its requests varies a little."""
    return sorted({round(0.9 * total * i / max(1, points - 1)) for i in range(points)})


def is_commit(request: Any) -> bool:
    return bool(request.method == "PUT" and "/_delta_log/" in request.path)


def test_the_endpoint_fails_as_told(case: Case, calm: Any) -> None:
    uri = f"{case.bucket}/raw/a.h5ad"
    whole = case.direct.read(uri)
    for kind in FAULTS:
        calm.fail(kind, first=0)
        assert case.store.read(uri) == whole, f"one {kind} is overcome"
        assert [fault for _, fault in calm.failed] == [kind]
        calm.fail(kind, first=0, times=100)
        with pytest.raises(StorageError, match="raw/a"):
            case.store.read(uri)
        assert len(calm.failed) >= 3


@pytest.mark.parametrize(
    ("kind", "share"),
    [pytest.param(kind, (i + 0.5) / 6, marks=[pytest.mark.slow] if i % 2 else []) for i, kind in enumerate(FAULTS)],
)
def test_one_fault_is_overcome(case: Case, calm: Any, kind: str, share: float) -> None:
    calm.fail(kind, round(0.9 * share * case.requests))
    assert case.check(case.new_corpus()), "a single fault refused a source"


@pytest.mark.parametrize("kind", ["500", "lost"])
def test_a_commit_whose_answer_fails(case: Case, calm: Any, kind: str) -> None:
    """A commit may have happened although the writer was told that it failed: it counts once all the same."""
    calm.fail(kind, 1, wanted=is_commit)
    assert case.check(case.new_corpus())


def test_writes_of_a_part_that_never_succeed(case: Case, calm: Any) -> None:
    parts_never_written(case, calm, "500")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "500"])
def test_writes_of_a_part_that_never_succeed_in_any_way(case: Case, calm: Any, kind: str) -> None:
    parts_never_written(case, calm, kind)


def parts_never_written(case: Case, calm: Any, kind: str) -> None:
    uri = case.new_corpus()
    # One dataset's parts only: the others must be committed by the run that fails for this one.
    calm.fail(kind, 0, times=10_000, wanted=lambda r: r.method == "PUT" and "dataset_id=b/" in r.path)
    if kind == "cut":
        # The answer to a write has no body that could be cut: it is nothing but an answer.
        assert case.disturbed(uri)
        return
    assert not case.disturbed(uri)
    assert set(case.seen(uri)) == {"a", "c"}
    calm.reset()
    assert case.ingest(uri).ok
    assert case.seen(uri) == case.expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["500", "503", "close", "delay", "lost"])
@pytest.mark.parametrize("first", range(4))
def test_every_commit_fails_once_or_for_long(case: Case, calm: Any, kind: str, first: int) -> None:
    for times in (1, 3, 40):
        calm.fail(kind, first, times, wanted=is_commit)
        case.check(case.new_corpus())


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("times", [1, 12])
def test_faults_at_many_points(case: Case, calm: Any, kind: str, times: int) -> None:
    for first in spread(case.requests, 10):
        calm.fail(kind, first, times)
        case.check(case.new_corpus())
