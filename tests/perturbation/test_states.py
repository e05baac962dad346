"""States: means of labelled cells, saved and read back, and movements toward them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.editing.median_ranks import median_ranks, median_ranks_of_corpus
from genescale.perturbation.readouts.states import States
from genescale.perturbation.readouts.states_command import states as states_command
from genescale.platform.bundle import Bundle
from genescale.platform.errors import CorpusError, InputError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder

MakeCell = Callable[[Vocabulary, list[int]], np.ndarray]
B_CELLS, MONOCYTES, UNLABELLED = range(0, 24, 3), range(1, 24, 3), range(2, 24, 3)


@pytest.fixture
def store() -> Store:
    return Store(StorageSettings())


def two_states(**options: object) -> States:
    vectors = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    wanted = {"names": ("ill", "well"), "vectors_sd": vectors, "goal": "well", "start": "ill", **options}
    return States(**wanted)  # type: ignore[arg-type]


def test_a_state_is_the_plain_mean_of_its_cells(framed: Embedder, corpus: Corpus) -> None:
    made = States.of_corpus(framed, corpus, "cell_type", start="monocyte", goal="b_cell", layer="last")
    assert made.names == ("monocyte", "b_cell")
    assert (made.cells, made.without_label, made.left_out) == ((8, 8), 8, {"monocyte": 0, "b_cell": 0})
    for vector_d, members in zip(made.vectors_sd, (MONOCYTES, B_CELLS), strict=True):
        embeddings_nd = framed.embed_cells(corpus.tokens(list(members)), layer="last")
        np.testing.assert_allclose(vector_d, embeddings_nd.mean(axis=0), atol=1e-6)


def test_all_labels_are_states_when_none_is_named(framed_bundle: Bundle, corpus: Corpus) -> None:
    made = States.of_corpus(framed_bundle, corpus, "cell_type", where="donor_id <> 'donor-0'", pooling="cls")
    assert (made.names, made.goal, made.pooling) == (("b_cell", "monocyte"), "", "cls")
    assert sum(made.cells) + made.without_label == 20


def test_the_draw_of_a_state_does_not_depend_on_the_others(framed: Embedder, corpus: Corpus) -> None:
    alone = States.of_corpus(framed, corpus, "cell_type", goal="b_cell", max_cells=3, seed=7)
    beside = States.of_corpus(framed, corpus, "cell_type", start="monocyte", goal="b_cell", max_cells=3, seed=7)
    assert alone.vectors_sd[0].tolist() == beside.vectors_sd[1].tolist()
    assert (alone.cells, alone.left_out) == ((3,), {"b_cell": 5})
    other = States.of_corpus(framed, corpus, "cell_type", goal="b_cell", max_cells=3, seed=8)
    assert alone.vectors_sd[0].tolist() != other.vectors_sd[0].tolist()


def test_a_set_of_cells_is_a_state(framed: Embedder, corpus: Corpus) -> None:
    cells = {"b": corpus.tokens(list(B_CELLS)), "m": corpus.tokens(list(MONOCYTES))}
    made = States.of_cells(framed, cells, goal="b")
    labelled = States.of_corpus(framed, corpus, "cell_type")
    np.testing.assert_allclose(made.vectors_sd, labelled.vectors_sd, atol=1e-7)
    with pytest.raises(InputError, match="state none: there are no cells"):
        States.of_cells(framed, {"none": []})


@pytest.mark.parametrize(
    ("column", "options", "said"),
    [
        ("cell_typ", {}, "Did you mean 'cell_type'"),
        ("cell_type", {"goal": "monocytes"}, "Did you mean 'monocyte'"),
        ("cell_type", {"goal": "b_cell", "where": "cell_type = 'monocyte'"}, "no cell among those where"),
        ("tissue", {}, "no cell has a tissue"),
    ],
)
def test_labels_that_are_not_there_are_refused(
    framed: Embedder, corpus: Corpus, column: str, options: dict[str, str], said: str
) -> None:
    with pytest.raises(CorpusError, match=said):
        States.of_corpus(framed, corpus, column, **options)  # type: ignore[arg-type]


def test_a_state_named_twice_is_refused(framed: Embedder, corpus: Corpus) -> None:
    with pytest.raises(SettingsError, match="named twice"):
        States.of_corpus(framed, corpus, "cell_type", goal="b_cell", alternatives=["b_cell"])


def test_a_corpus_of_another_vocabulary_is_refused(bare: Embedder, corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="was made with vocabulary"):
        States.of_corpus(bare, corpus, "cell_type")


def test_a_movement_is_the_difference_of_cosines() -> None:
    moved = two_states().toward(np.array([1.0, 1.0, 0.0]), np.array([2.0, 0.0, 0.0]))
    np.testing.assert_allclose(moved, [np.sqrt(0.5) - 1, np.sqrt(0.5)])
    many = two_states().toward(np.eye(3), np.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(many, [[0, 0], [-1, 1], [-1, 0]])


vectors = hnp.arrays(np.float64, 3, elements=st.floats(-5, 5).filter(lambda x: x == 0 or abs(x) > 1e-3))


@settings(max_examples=100, deadline=None)
@given(vectors, vectors, st.floats(0.1, 10))
def test_going_back_undoes_a_movement_and_length_does_not_count(a: np.ndarray, b: np.ndarray, scale: float) -> None:
    if not a.any() or not b.any():
        return
    there, back = two_states().toward(a, b), two_states().toward(b, a)
    np.testing.assert_allclose(there, -back, atol=1e-12)
    np.testing.assert_allclose(two_states().toward(a * scale, b), there, atol=1e-12)
    assert (np.abs(there) <= 2).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": ("ill", "ill")}, "different names"),
        ({"names": ("ill",)}, "1 states have vectors of shape"),
        ({"goal": "wel"}, "Did you mean 'well'"),
        ({"goal": "ill"}, "both start and goal"),
        ({"vectors_sd": np.array([[1.0, np.nan], [1.0, 0.0]])}, "state ill: the vector holds values"),
        ({"vectors_sd": np.array([[1.0, 1.0], [0.0, 0.0]])}, "state well: the vector holds values"),
        ({"layer": "first"}, "'first' is no layer"),
    ],
)
def test_states_that_cannot_be_compared_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        two_states(**options)


def test_states_are_saved_and_read_back(tmp_path: Path, store: Store) -> None:
    uri = str(tmp_path / "states.parquet")
    made = two_states(layer="last", pooling="cls", model_digest="a" * 64, cells=(7, 9))
    made.save(uri, store)
    read = States.load(uri, store)
    assert read.vectors_sd.tolist() == made.vectors_sd.tolist()
    for name in ("names", "goal", "start", "layer", "pooling", "model_digest", "cells"):
        assert getattr(read, name) == getattr(made, name)
    turned = States.load(uri, store, start="well", goal="ill")
    assert (turned.start, turned.goal) == ("well", "ill")


def test_states_of_another_model_layer_or_pooling_are_refused() -> None:
    made = two_states(model_digest="a" * 64)
    fitting = {"width": 3, "layer": "second_to_last", "pooling": "mean_genes", "model_digest": "a" * 64}
    made.check_fits(**fitting)  # type: ignore[arg-type]
    for name, value in (("layer", "last"), ("pooling", "cls"), ("model_digest", "b" * 64), ("width", 4)):
        with pytest.raises(InputError, match="Make them again"):
            made.check_fits(**{**fitting, name: value})  # type: ignore[arg-type]


def test_files_that_hold_no_states_are_refused(tmp_path: Path, store: Store) -> None:
    text, other, mixed = (tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet"))
    text.write_text("no Parquet")
    pl.DataFrame({"state": ["ill"]}).write_parquet(other)
    two_states().save(str(mixed), store)
    pl.read_parquet(mixed).with_columns(layer=pl.Series(["last", "second_to_last"])).write_parquet(mixed)
    for path, said in ((text, "no Parquet file"), (other, "no column 'role'"), (mixed, "several models, layers")):
        with pytest.raises(InputError, match=said):
            States.load(str(path), store)


def test_the_command_writes_states_and_says_how_far_apart_they_are(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "out" / "states.parquet")
    arguments = [str(framed_bundle.folder), "--corpus", corpus.uri, "--column", "cell_type", "--output", uri]
    assert states_command([*arguments, "--start", "monocyte", "--goal", "b_cell", "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    read = States.load(uri, store)
    assert (read.start, read.goal, read.model_digest) == ("monocyte", "b_cell", framed_bundle.digest)
    assert [row["role"] for row in said["states"]] == ["start", "goal"]
    assert said["states"][0]["cosines"]["b_cell"] == pytest.approx(float(read.cosines_ss[0, 1]))
    assert said["without_label"] == 8
    assert states_command([*arguments, "--device", "cpu"]) == 0
    assert "8 selected cells are in none of these states" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="not a layer"):
        states_command([*arguments, "--layer", "first"])


def test_median_ranks_count_the_cells_that_have_the_gene(framed: Embedder, make_cell: MakeCell) -> None:
    vocabulary = framed.vocabulary
    cells = [make_cell(vocabulary, genes) for genes in ([7, 8, 9], [8, 7], [8, 9, 7], [8, 7, 9])]
    ranks = {vocabulary.token(f"GENE{gene}"): rank for gene, rank in ((7, 1), (8, 0), (9, 2))}
    assert median_ranks(cells, vocabulary) == ranks
    assert set(median_ranks(cells, vocabulary, min_cells=4)) == {vocabulary.token("GENE7"), vocabulary.token("GENE8")}
    with pytest.raises(InputError, match="no cells"):
        median_ranks([], vocabulary)


def test_median_ranks_of_a_state_are_those_of_its_cells(corpus: Corpus) -> None:
    wanted = median_ranks(corpus.tokens(list(MONOCYTES)), corpus.vocabulary)
    assert median_ranks_of_corpus(corpus, "cell_type", "monocyte") == wanted
    assert median_ranks_of_corpus(corpus, "cell_type", "monocyte", max_cells=2) != wanted
