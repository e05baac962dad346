"""What jobs compute: screens, embeddings of corpora and files, how they go on and fail, and their tracked runs."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import StorageError, TrackingError
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.storage import Store
from genescale.serving.in_process import InProcessModel
from genescale.serving.jobs.embedding import ACCOUNT
from genescale.serving.jobs.tracked import JobRun
from genescale.training.embedder import Embedder
from tests.serving.jobs_side import Side, jobs_config, local_desk, serving_config, side_of


class AwayTracker(MemoryTracker):
    """A tracker that refuses, or that never answers."""

    def __init__(self, *, hangs: bool) -> None:
        super().__init__()
        self.hangs = hangs

    @contextmanager
    def run(self, *arguments: Any, **more: Any) -> Iterator[Any]:
        if self.hangs:
            threading.Event().wait(60)
        raise TrackingError("away.")
        yield


@pytest.fixture
def tracker() -> MemoryTracker:
    return MemoryTracker()


@pytest.fixture
def data(tmp_path: Path, reference_corpus: Corpus, counts_ng: np.ndarray) -> Path:
    """What jobs may read: a corpus, an .h5ad of raw counts, and one of numbers that are no counts."""
    folder = tmp_path / "data"
    shutil.copytree(reference_corpus.uri, folder / "corpus")
    var = pd.DataFrame(index=[f"ENSG{at:011d}" for at in range(counts_ng.shape[1])])
    obs = pd.DataFrame(index=[f"cell-{at}" for at in range(len(counts_ng))])
    # A cell without any count is one that no model can see.
    padded_ng, more = np.vstack([counts_ng, np.zeros_like(counts_ng[:1])]), pd.DataFrame(index=[*obs.index, "empty"])
    anndata.AnnData(sp.csr_matrix(padded_ng.astype(np.float32)), more, var).write_h5ad(folder / "heart.h5ad")
    anndata.AnnData(sp.csr_matrix(np.log1p(counts_ng)), obs, var).write_h5ad(folder / "logged.h5ad")
    return folder


@pytest.fixture
def make(tmp_path: Path, data: Path, bundle: Bundle, embedder: Embedder) -> Callable[..., Any]:
    """A service that takes jobs, with a tracker."""

    @contextmanager
    def made(tracker: MemoryTracker, **changes: Any) -> Iterator[Side]:
        config = serving_config(jobs_config(tmp_path, **changes))
        with local_desk(config, tracker) as desk:
            yield side_of(bundle, InProcessModel(embedder), desk, config)

    return made


def result(side: Side, job: dict[str, Any], file: str = "") -> bytes:
    return side.ask("GET", f"{job['url']}/result" + (f"?file={file}" if file else "")).content


def done(side: Side, body: dict[str, Any]) -> dict[str, Any]:
    answer = side.post(body)
    assert answer.status_code == 202, answer.text
    job = side.ended(answer.json()["id"])
    assert job["state"] == "succeeded", job
    return job


def test_a_whole_corpus_is_embedded(
    make: Any, tracker: MemoryTracker, data: Path, reference_corpus: Corpus, embedder: Embedder
) -> None:
    with make(tracker) as side:
        job = done(side, {"kind": "embed", "source": str(data / "corpus"), "layer": "last"})
        table = pl.read_parquet(io.BytesIO(result(side, job)))
    cells = reference_corpus.tokens(range(reference_corpus.n_cells))
    expected_nd = embedder.embed_cells(cells, layer="last", pooling="mean_genes")
    np.testing.assert_allclose(np.stack(table["embedding"].to_list()), expected_nd, rtol=1e-5, atol=1e-6)
    assert table["cell_id"].to_list() == reference_corpus.cells(["cell_id"]).column("cell_id").to_pylist()
    assert [one["name"] for one in job["files"]] == ["embeddings.parquet", "manifest.json"]
    run = tracker.runs[job["run"]]
    assert (run.status, run.tags["genescale.job"], run.params["kind"]) == ("FINISHED", job["id"], "embed")
    assert run.metrics["cells"] == [(0, 90.0)]


def test_an_atlas_file_is_ranked_and_embedded(
    make: Any, tracker: MemoryTracker, data: Path, expected_nd: np.ndarray
) -> None:
    with make(tracker) as side:
        job = done(side, {"kind": "embed", "source": str(data / "heart.h5ad")})
        table = pl.read_parquet(io.BytesIO(result(side, job)))
        account = json.loads(result(side, job, "cells.json"))
    assert (account["read"], account["kept"], account["dropped"]) == (24, 23, {"empty_cell": 1})
    assert table["cell_id"].to_list() == [f"cell-{at}" for at in range(len(expected_nd))]
    np.testing.assert_allclose(np.stack(table["embedding"].to_list()), expected_nd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "code", "says"),
    [("logged.h5ad", "not_counts", "counts"), ("absent.h5ad", "invalid_input", "nothing that can be read")],
)
def test_what_cannot_be_read_fails_and_says_why(
    make: Any, tracker: MemoryTracker, data: Path, tmp_path: Path, source: str, code: str, says: str
) -> None:
    with make(tracker) as side:
        job = side.ended(side.post({"kind": "embed", "source": str(data / source)}).json()["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", code)
        assert says in job["error"]["message"]
        assert str(tmp_path / "jobs") not in json.dumps(job)
        refused = side.ask("GET", f"{job['url']}/result")
        assert (refused.status_code, refused.json()["error"]["details"]) == (409, {"state": "failed"})
        assert tracker.runs[job["run"]].status == "FAILED"


def test_a_screen_gives_shifts_effects_and_a_report(make: Any, tracker: MemoryTracker, data: Path) -> None:
    asked = {
        "kind": "screen",
        "corpus": str(data / "corpus"),
        "cells": {"where": "cell_type = 'b'", "max_cells": 5},
        "edits": {"genes": ["GENE1", "GENE2+GENE3"], "controls": 2},
    }
    with make(tracker) as side:
        job = done(side, asked)
        shifts = pl.read_parquet(io.BytesIO(result(side, job)))
        effects = pl.read_parquet(io.BytesIO(result(side, job, "effects.parquet")))
        page = side.ask("GET", f"{job['url']}/result?file=report.html")
    assert shifts.filter(pl.col("role") == "edit").height == 10
    assert shifts["cell_type"].unique().to_list() == ["b"]
    assert set(effects["symbol"]) == {"GENE1", "GENE2+GENE3"}
    assert page.headers["content-disposition"].startswith("attachment")
    assert job["progress"]["done"] == job["progress"]["total"] == 10
    run = tracker.runs[job["run"]]
    assert (run.status, run.metrics["pairs"]) == ("FINISHED", [(0, 10.0)])
    assert "screen/_plan.json" in run.files


def test_a_job_goes_on_where_it_was_interrupted(
    make: Any, tracker: MemoryTracker, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells are a part: what is kept of the first attempt is not computed by the second."""
    from genescale.serving.answering.answers import Answers

    cells = [{"counts": {"GENE1": 3, "GENE2": 2, f"GENE{at + 3}": 1}} for at in range(6)]
    asked = {"kind": "perturbations", "cells": cells, "edits": [{"kind": "delete", "genes": ["GENE1"]}] * 100}
    monkeypatch.setattr("genescale.serving.jobs.perturbing.PAIRS_PER_PART", 200)
    asked_of, real = [], Answers.perturbations
    reached, go_on = threading.Event(), threading.Event()

    async def counted(self: Answers, sent: Any, *more: Any) -> bytes:
        asked_of.append(len(json.loads(sent.body)["cells"]))
        if len(asked_of) == 2:
            reached.set()
            go_on.wait(20)
        return await real(self, sent, *more)

    monkeypatch.setattr(Answers, "perturbations", counted)
    with make(tracker) as side:
        job_id = side.post(asked).json()["id"]
        assert reached.wait(20)
        threading.Timer(0.3, go_on.set).start()
    with make(tracker) as side:
        job = side.ended(job_id)
        whole = json.loads(result(side, job, "answer.json"))
    assert (job["state"], job["attempt"], len(whole["cells"])) == ("succeeded", 2, 6)
    # The second part was finished after the stop was asked for; whichever, the first was not computed again.
    assert len(asked_of) in (3, 4)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_tracker_that_is_away_costs_the_job_nothing(
    make: Any, data: Path, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genescale.serving.jobs.tracked.LAST_WAIT_S", 0.1)
    with make(AwayTracker(hangs=hangs)) as side:
        job = done(side, {"kind": "embed", "source": str(data / "corpus")})
    assert job["run"] is None


def test_a_cancelled_job_ends_and_its_run_says_so(
    make: Any, tracker: MemoryTracker, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is held where its model is loaded until its end is asked for."""
    held = threading.Event()
    real = Bundle.weights
    monkeypatch.setattr(Bundle, "weights", lambda self: (held.wait(20), real(self))[1])
    with make(tracker) as side:
        job_id = side.post({"kind": "embed", "source": str(data / "corpus")}).json()["id"]
        side.until(lambda job: job["progress"]["unit"] == "cells", job_id)
        assert side.ask("POST", f"/v1/jobs/{job_id}/cancel").json()["cancelling"]
        held.set()
        job = side.ended(job_id)
    assert job["state"] == "cancelled"
    assert [run.status for run in tracker.runs.values()] == ["KILLED"]


def test_an_account_that_was_cut_off_is_made_again(
    make: Any, tracker: MemoryTracker, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is gone between the commit of the ranked cells and the word of what became of the others."""
    write, failures = Store.write, [StorageError("away.")]

    def cut_off(self: Store, uri: str, *arguments: Any, **more: Any) -> Any:
        if uri.endswith(ACCOUNT) and failures:
            raise failures.pop()
        return write(self, uri, *arguments, **more)

    monkeypatch.setattr(Store, "write", cut_off)
    with make(tracker) as side:
        job = done(side, {"kind": "embed", "source": str(data / "heart.h5ad")})
        account = json.loads(result(side, job, "cells.json"))
    assert (job["attempt"], account["read"], account["kept"]) == (2, 24, 23)


def test_a_run_ends_although_the_tracker_was_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genescale.serving.jobs.tracked.MOST_WAITING", 2)
    monkeypatch.setattr("genescale.serving.jobs.tracked.LAST_WAIT_S", 0.0)
    tracker, answers = MemoryTracker(), threading.Event()

    @contextmanager
    def late() -> Iterator[Any]:
        answers.wait(10)
        with tracker.run("job") as opened:
            yield opened

    run = JobRun(late)
    for step in range(5):
        run.log_metrics({"done": step}, step=step)
    run.close()
    answers.set()
    run._thread.join(5)
    assert [one.status for one in tracker.runs.values()] == ["FINISHED"]
    assert run.dropped == 4
