"""What a screen tries on each cell. Gene i is called GENEi; its token is 4 + i."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genescale.perturbation.editing.edit_sets import EditSet, read_sets
from genescale.perturbation.editing.requests import EditOptions, EditRequest
from genescale.platform.errors import InputError, UnknownGeneError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

VOCABULARY = Vocabulary.build(
    [f"ENSG{i:011d}" for i in range(30)],
    np.ones(30),
    symbols=[f"GENE{i}" for i in range(30)],
    window=20,
    name="tiny",
    special=("<pad>", "<mask>", "<cls>", "<eos>"),
    aliases={"OLD7": f"ENSG{7:011d}"},
)
CELL = np.array([2, 9, 5, 7, 3])


def gene_id(*numbers: int) -> str:
    return "+".join(f"ENSG{number:011d}" for number in numbers)


def asked(edits: EditSet, tokens_t: np.ndarray = CELL) -> list[tuple[int, ...]]:
    return [request.genes for request in edits.of_cell(tokens_t)]


def test_genes_are_named_by_id_symbol_alias_and_together() -> None:
    edits = EditSet.of_genes(["GENE3", gene_id(5), "old7", "gene1+GENE2"], VOCABULARY)
    assert edits.names == (gene_id(3), gene_id(5), gene_id(7), gene_id(1, 2))
    assert asked(edits) == [(7,), (9,), (11,), (5, 6)]
    assert edits.symbol((5, 6)) == "GENE1+GENE2"
    assert edits.edit_id((5, 6)) == gene_id(1, 2)


def test_an_absent_gene_is_asked_of_every_cell() -> None:
    assert asked(EditSet.of_genes(["GENE20"], VOCABULARY)) == [(24,)]


def test_an_unknown_gene_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownGeneError, match="GENE1"):
        EditSet.of_genes(["GENE1X"], VOCABULARY)
    with pytest.raises(InputError, match="at least one edit"):
        EditSet.of_genes([], VOCABULARY)
    with pytest.raises(InputError, match="a gene stands twice"):
        EditSet.of_genes([f"GENE7+{gene_id(7)}"], VOCABULARY)


def test_the_same_edit_in_other_words_is_made_once_and_told() -> None:
    edits = EditSet.of_genes(["GENE7", "OLD7", "GENE1+GENE2", "GENE2+GENE1"], VOCABULARY)
    assert edits.names == (gene_id(7), gene_id(1, 2))
    assert edits.merged == ("OLD7", "GENE2+GENE1")
    ordered = EditSet.of_genes(["GENE1+GENE2", "GENE2+GENE1"], VOCABULARY, EditOptions(kind="overexpress"))
    assert len(ordered.names) == 2  # which of two genes comes first is part of an overexpression


def test_every_gene_of_a_cell_in_rank_order() -> None:
    edits = EditSet.of_all(VOCABULARY, EditOptions(kind="inhibit", quartiles=2))
    assert edits.of_cell(CELL) == [EditRequest(kind="inhibit", genes=(gene,), quartiles=2) for gene in (9, 5, 7)]
    assert edits.most_edits(3) == 3


def test_pairs_come_with_their_singles() -> None:
    edits = EditSet.of_pairs(["GENE1", "GENE2", "GENE3", "GENE2"], VOCABULARY)
    assert asked(edits) == [(5,), (6,), (7,), (5, 6), (5, 7), (6, 7)]
    with pytest.raises(InputError, match="two different genes"):
        EditSet.of_pairs(["GENE7", "OLD7"], VOCABULARY)


def test_an_anchor_goes_with_every_other_gene_of_the_cell() -> None:
    edits = EditSet.of_anchor("GENE1", VOCABULARY)
    assert asked(edits) == [(5,), (9,), (7,), (5, 9), (5, 7)]
    assert len(asked(edits)) <= edits.most_edits(3)


def test_a_cell_without_the_anchor_is_asked_for_it_alone_unless_it_can_be_inserted() -> None:
    without = np.array([2, 9, 7, 3])
    assert asked(EditSet.of_anchor("GENE1", VOCABULARY), without) == [(5,)]
    over = EditSet.of_anchor("GENE1", VOCABULARY, EditOptions(kind="overexpress"))
    assert asked(over, without) == [(5,), (9,), (7,), (5, 9), (5, 7)]


def test_named_sets_are_edited_together_and_tell_what_the_vocabulary_lacks() -> None:
    edits = EditSet.of_sets({"first": ["GENE1", "NOSUCH", "GENE3"], "second": ["OLD7"]}, VOCABULARY)
    assert edits.names == ("first", "second")
    assert asked(edits) == [(5, 7), (11,)]
    assert edits.left_out == {"first": ("NOSUCH",)}
    assert (edits.edit_id((5, 7)), edits.gene_id((5, 7)), edits.symbol((5, 7))) == ("first", gene_id(1, 3), "first")
    with pytest.raises(InputError, match="set lost: none of its 1 genes"):
        EditSet.of_sets({"first": ["GENE1"], "lost": ["NOSUCH"]}, VOCABULARY)


def test_sets_are_read_from_the_forms_people_have(tmp_path: Path) -> None:
    store = Store(StorageSettings())
    (tmp_path / "sets.json").write_text(json.dumps({"a": ["GENE1", "GENE2"], "b": ["GENE3"]}))
    (tmp_path / "sets.gmt").write_text("a\tnone\tGENE1\tGENE2\nb\tnone\tGENE3\n")
    (tmp_path / "a.txt").write_text("GENE1\nGENE2\n")
    both = {"a": ["GENE1", "GENE2"], "b": ["GENE3"]}
    assert read_sets(str(tmp_path / "sets.json"), store) == both
    assert read_sets(str(tmp_path / "sets.gmt"), store) == both
    assert read_sets(str(tmp_path / "a.txt"), store) == {"a": both["a"]}
    assert read_sets(f"{tmp_path / 'sets.json'}#:a;without=gene2", store) == {"a": ["GENE1"]}


def test_replace_knows_which_genes_have_a_rank() -> None:
    options = EditOptions(kind="replace", target_ranks={5: 2, 9: 0})
    every = EditSet.of_all(VOCABULARY, options)
    assert [(request.genes, request.ranks) for request in every.of_cell(CELL)] == [((9,), (0,)), ((5,), (2,))]
    assert every.without_rank(CELL) == 1
    with pytest.raises(InputError, match="GENE3 stands in no cell of the other state"):
        EditSet.of_genes(["GENE1", "GENE3"], VOCABULARY, options)


def test_the_identity_tells_edit_sets_apart() -> None:
    made = [
        EditSet.of_all(VOCABULARY),
        EditSet.of_all(VOCABULARY, EditOptions(kind="inhibit")),
        EditSet.of_all(VOCABULARY, EditOptions(kind="inhibit", quartiles=2)),
        EditSet.of_genes(["GENE1"], VOCABULARY),
        EditSet.of_anchor("GENE1", VOCABULARY),
        EditSet.of_sets({"GENE1": ["GENE1"]}, VOCABULARY),
    ]
    assert len({json.dumps(edits.identity) for edits in made}) == len(made)
