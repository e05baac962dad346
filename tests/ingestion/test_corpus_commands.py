"""`genescale corpus …` as a user runs it: what is printed, as text and as JSON, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.ingestion.corpus_commands import corpus as command
from genescale.platform.errors import AlreadyExistsError, CorpusError, SettingsError


@pytest.fixture
def two(empty: Corpus, planted: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Corpus:
    """The corpus at version 2 with datasets a and b; the working folder holds it as `corpus`."""
    monkeypatch.chdir(tmp_path)
    corpus = planted.add(empty, "a", [planted.cells(10, 1), planted.cells(20, 2)], files={"report.json": b"{}"})
    return planted.add(corpus, "b", [planted.cells(30, 3)])


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run an action: (exit status, text); with `--json` the parsed output."""

    def run(*arguments: str) -> tuple[int, Any]:
        capsys.readouterr()
        status = command(list(arguments))
        out = capsys.readouterr().out
        return status, json.loads(out) if "--json" in arguments else out

    return run


def test_show(two: Corpus, run: Any) -> None:
    status, text = run("show", "corpus")
    assert status == 0
    for expected in (
        f"{two.uri}@2",
        "60 in 3 parts",
        "layout      datasets, schema 2",
        "60 genes, window 64",
        "/atlas/b",
    ):
        assert expected in text
    _, facts = run("show", "corpus@1", "--json")
    assert (facts["version"], facts["cells"], facts["parts"], facts["layout"]) == (1, 30, 2, "datasets")
    assert facts["tokens"] == sum(cell.size for cell in two.tokens(range(30)))
    (dataset,) = facts["datasets"]
    assert dataset["size_bytes"] == facts["size_bytes"] == sum(file.size_bytes for file in two.files[:2])
    assert (dataset["dataset_id"], dataset["source"], dataset["counts_slot"]) == ("a", "/atlas/a.h5ad", "X")
    assert dataset["files"] == ["report.json"]
    assert facts["columns"]["input_ids"].startswith("list<element: uint16")


def test_history_and_remove(two: Corpus, run: Any, planted: Any) -> None:
    planted.add(two, "b", [planted.cells(4, 9)], etag="2", replace=True)
    status, removed = run("remove", "corpus", "a", "--json")
    assert (status, removed) == (0, {"removed": "a", "uri": two.uri, "version": 4, "cells": 4})
    _, records = run("history", "corpus", "--json")
    assert [(r["version"], r["operation"]) for r in records] == [
        (4, "remove"), (3, "ingest"), (2, "ingest"), (1, "ingest"), (0, "create"),
    ]  # fmt: skip
    _, text = run("history", "corpus")
    assert [line.split()[3] for line in text.splitlines()[2:]] == ["remove", "replace", "ingest", "ingest", "create"]
    with pytest.raises(CorpusError, match="no dataset 'a'"):
        run("remove", "corpus", "a")


def test_diff(two: Corpus, run: Any, planted: Any) -> None:
    planted.add(two.remove("a"), "b", [planted.cells(4, 9)], recipe={"min_genes": 9}, replace=True)
    status, text = run("diff", "corpus@2", "corpus")
    assert status == 1
    assert "60 cells" in text
    assert "(-56)" in text
    assert "min_genes: None -> 9" in text
    status, facts = run("diff", "corpus@1", "corpus@1", "--json")
    assert (status, facts["unchanged"], facts["changed"]) == (0, ["a"], [])


def test_verify(two: Corpus, run: Any) -> None:
    status, text = run("verify", "corpus")
    assert status == 0
    assert "everything is as it was recorded" in text
    path = Path(two.parts[1].uri)
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(bytes(data))
    status, text = run("verify", "corpus")
    assert status == 1
    assert f"fault     {path}: a page" in text
    assert "row group 0, column" in text
    status, facts = run("verify", "corpus", "--json")
    assert (status, facts["ok"], len(facts["faults"]), facts["faults"][0]["uri"]) == (1, False, 1, str(path))
    status, text = run("verify", "corpus", "--against-source", "--sample", "5")
    assert status == 1
    assert "not compared" in text


def test_gc(two: Corpus, run: Any, planted: Any) -> None:
    part = planted.parts(two, "late", [planted.cells(5, 5)])[0]
    status, text = run("gc", "corpus")
    assert status == 0
    assert "deleted 0 files" in text
    assert "within the grace period" in text
    _, text = run("gc", "corpus", "--older-than", "0s", "--dry-run")
    assert part.path in text
    assert "would delete 1 files" in text
    status, facts = run("gc", "corpus@1", "--older-than", "0s", "--json")
    assert (status, facts["size_bytes"], len(facts["deleted"])) == (0, part.size_bytes, 1)
    assert Corpus.open("corpus", two.store).n_cells == 60
    with pytest.raises(SettingsError, match="--older-than"):
        run("gc", "corpus", "--older-than", "soon")


def test_compact_shuffle_and_export(two: Corpus, run: Any, planted: Any, ray_local: None) -> None:
    status, text = run("compact", "corpus", "--dataset", "a")
    assert status == 0
    assert "merged 2 parts" in text
    assert "nothing to merge" in run("compact", "corpus")[1]
    status, facts = run("shuffle", "corpus", "--output", "mixed", "--seed", "4", "--part-cells", "20", "--json")
    assert (status, facts["cells"], facts["datasets"], facts["seed"]) == (0, 60, ["a", "b"], 4)
    assert "nothing to do" in run("shuffle", "corpus", "--output", "mixed")[1]
    mixed = Corpus.open("mixed", two.store)
    assert planted.content(mixed) == planted.content(two)
    assert "layout      shuffled" in run("show", "mixed")[1]
    assert run("diff", "corpus", "mixed")[0] == 0, "the same datasets from the same sources"
    assert run("verify", "mixed")[0] == 0
    status, facts = run("export", "mixed@1", "flat", "--format", "parquet", "--dataset", "b", "--json")
    assert (status, facts["cells"]) == (0, 30)
    with pytest.raises(AlreadyExistsError, match="not empty"):
        run("export", "mixed", "flat", "--format", "parquet")
    assert "exported 60 cells" in run("export", "mixed", "hf", "--format", "huggingface")[1]


@pytest.mark.parametrize(
    "arguments",
    [[], ["show"], ["burn", "corpus"], ["export", "corpus", "x"], ["shuffle", "corpus"], ["diff", "corpus"]],
)
def test_what_is_missing_is_said(arguments: list[str], two: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    assert stopped.value.code == 2
    assert "usage: genescale corpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    "action", ["show", "history", "diff", "verify", "remove", "compact", "shuffle", "gc", "export"]
)
def test_every_action_explains_itself(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command([action, "--help"])
    assert stopped.value.code == 0
    assert "--json" in capsys.readouterr().out
