"""Plans: which cells, which edits, how they are cut; and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.screening import plan as plans
from genescale.perturbation.screening.cells import choose_cells
from genescale.perturbation.screening.plan import Plan, make_plan
from genescale.perturbation.screening.spec import CellsConfig, ScreenConfig, spec_of
from genescale.perturbation.screening.units import auto_tokens_per_unit, cut_pieces
from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    CorpusError,
    GenescaleError,
    InputError,
    LimitError,
    SettingsError,
    UnknownGeneError,
)
from genescale.platform.storage import Store

ADDRESSES = {"model": "m", "corpus": "c", "output": "o"}


def config_of(**sections: Any) -> ScreenConfig:
    """A config as a TOML file would hold it."""
    return spec_of({**ADDRESSES, **sections}).config


@pytest.fixture
def planned(framed_bundle: Bundle, corpus: Corpus, local_store: Store) -> Any:
    """The plan of a screen that is written as in a TOML file."""

    def plan(**sections: Any) -> Plan:
        return make_plan(framed_bundle, corpus, config_of(**sections), store=local_store)

    return plan


@settings(deadline=None, max_examples=50)
@given(
    cells=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40), st.floats(0, 30)), min_size=1, max_size=20),
    size=st.integers(1, 300),
)
def test_pieces_cover_every_edit_once_within_the_budget(cells: list[tuple[int, int, float]], size: int) -> None:
    own_n, edits_n, per_edit_n = (np.array(column) for column in zip(*cells, strict=True))
    pieces = cut_pieces(own_n, edits_n, per_edit_n.astype(float), size)
    covered = [(row, at) for row, a, b in pieces.select("row", "start", "stop").iter_rows() for at in range(a, b)]
    assert covered == [(row, at) for row, n in enumerate(edits_n.tolist()) for at in range(n)]
    assert set(pieces["row"]) == set(range(len(cells)))
    assert sorted(set(pieces["unit"])) == list(range(pieces["unit"].max() + 1))  # type: ignore[operator]
    for (unit,), rows in pieces.group_by("unit"):
        if rows["tokens"].sum() > size + len(rows):
            one = rows.row(0, named=True)
            assert len(rows) == 1, f"unit {unit} passes the budget with several pieces"
            # Edits that cost nothing gain nothing from a unit of their own.
            assert one["stop"] - one["start"] <= 1 or per_edit_n[one["row"]] == 0


def test_a_cell_is_split_only_when_it_passes_a_unit_and_may_be() -> None:
    own_n, edits_n, per_edit_n = np.array([10, 10, 10]), np.array([3, 20, 2]), np.array([10.0, 10.0, 10.0])
    pieces = cut_pieces(own_n, edits_n, per_edit_n, 100)
    assert pieces.select("unit", "row", "start", "stop").rows() == [
        (0, 0, 0, 3),
        (1, 1, 0, 9),
        (2, 1, 9, 18),
        (3, 1, 18, 20),
        (3, 2, 0, 2),
    ]
    whole = cut_pieces(own_n, edits_n, per_edit_n, 100, split=False)
    assert whole.select("unit", "row", "stop").rows() == [(0, 0, 3), (1, 1, 20), (2, 2, 2)]


def test_units_suit_the_size_of_the_screen_and_the_device() -> None:
    assert auto_tokens_per_unit(1_000, on_gpu=False) < auto_tokens_per_unit(10**8, on_gpu=False) <= 262_144
    assert auto_tokens_per_unit(10**12, on_gpu=True) > auto_tokens_per_unit(10**12, on_gpu=False)


def test_cells_are_chosen_by_condition_and_drawn_by_seed(corpus: Corpus) -> None:
    everything, left_out = choose_cells(corpus, CellsConfig())
    assert everything["cell"].to_list() == list(range(24))
    assert left_out == {}
    where = "cell_type = 'monocyte' AND donor_id = 'donor-0'"
    monocytes, left_out = choose_cells(corpus, CellsConfig(where=where))
    assert monocytes["cell_id"].to_list() == ["cell-1"]
    assert left_out == {"not in where": 23}

    def drawn(seed: int, **more: Any) -> tuple[pl.DataFrame, dict[str, int]]:
        return choose_cells(corpus, CellsConfig(max_cells=3, seed=seed, **more))

    once, left_out = drawn(1)
    assert once["cell"].to_list() == drawn(1)[0]["cell"].to_list() == sorted(set(once["cell"]))
    assert left_out == {"not drawn": 21}
    assert once["cell"].to_list() != drawn(2)[0]["cell"].to_list()
    of_donors, _ = drawn(1, max_cells_per="donor_id")
    assert set(of_donors.group_by("donor_id").len()["len"]) == {3}
    of_types, left_out = drawn(1, max_cells_per="cell_type")
    assert dict(of_types.group_by("cell_type").len().iter_rows()) == {"b_cell": 3, "monocyte": 3}
    assert left_out == {"without cell_type": 8, "not drawn": 10}


def test_the_most_detected_genes_are_taken_ties_by_token(framed_bundle: Bundle, corpus: Corpus, planned: Any) -> None:
    plan = planned(edits={"top": 5})
    special = set(framed_bundle.vocabulary.special.values())
    counts: dict[int, int] = {}
    for tokens in corpus.tokens(range(24)):
        for token in set(tokens.tolist()) - special:
            counts[token] = counts.get(token, 0) + 1
    best = sorted(counts, key=lambda token: (-counts[token], token))[:5]
    assert [edit.genes[0] for edit in plan.edits.listed] == best
    assert plan.n_pairs == 24 * 5


def test_edits_that_no_cell_needs_cost_nothing(planned: Any) -> None:
    # Gene 0 stands in half of the cells, gene 1 in all; each edit of a cell that has it costs one pass.
    plan = planned(edits={"genes": ["GENE0", "GENE1"], "controls": 0})
    assert plan.cells["n_changed"].to_list() == [2] * 12 + [1] * 12
    assert planned(edits={"genes": ["GENE0"], "kind": "overexpress"}).cells["n_changed"].sum() == 24


def test_genes_sets_and_pairs_come_together(planned: Any, tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text(json.dumps({"both": ["GENE1", "GENE2"], "more": ["GENE3", "NOGENE"]}))
    named = {"genes": ["GENE1"], "pairs": ["GENE1", "GENE2"], "sets": str(tmp_path / "sets.json")}
    plan = planned(edits=named)
    assert [edit.symbol for edit in plan.edits.listed] == ["GENE1", "GENE2", "GENE1+GENE2", "both", "more"]
    assert plan.left_out["genes of sets, not in the vocabulary"] == 1


def test_genes_are_moved_to_their_median_rank_in_other_cells(corpus: Corpus, planned: Any) -> None:
    plan = planned(edits={"genes": ["GENE1"], "kind": "replace", "ranks_of": "donor_id = 'donor-2'"})
    token = corpus.vocabulary.token("GENE1")
    ranks = sorted(cell.tolist().index(token) - 1 for cell in corpus.tokens(range(8, 12)))
    (request,) = plan.edits.of_cell(corpus.tokens([0])[0])
    assert request.ranks == (ranks[1],)


def test_a_plan_is_the_same_plan_again_and_another_one_for_other_numbers(planned: Any) -> None:
    base: dict[str, Any] = {"edits": {"genes": ["GENE1", "GENE2"]}, "cells": {"max_cells": 5}}
    digest = planned(**base).digest
    assert planned(**base).digest == digest
    faster = {"tokens_per_batch": 99, "device": "cpu", "workers": 3}
    assert planned(**base, compute=faster).digest == digest
    for changed in (
        {"edits": {"genes": ["GENE2", "GENE1"]}},
        {"edits": {"genes": ["GENE1", "GENE2"], "controls": 9}},
        {"edits": {"genes": ["GENE1", "GENE2"], "kind": "overexpress"}},
        {"cells": {"max_cells": 5, "seed": 1}},
        {"readouts": {"layer": "last"}},
        {"readouts": {"gene_shifts": "all"}},
    ):
        assert planned(**{**base, **changed}).digest != digest


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        ({"edits": {"genes": ["GENE_1"]}}, UnknownGeneError, "Did you mean 'GENE1'"),
        ({"edits": {"anchor": "GENE_1"}}, UnknownGeneError, "Did you mean 'GENE1'"),
        ({"edits": {"genes": ["GENE1"], "not_controls": ["GEN2"]}}, UnknownGeneError, "GEN2"),
        ({"edits": {"pairs": ["GENE1"]}}, InputError, "two different genes"),
        ({"edits": {"genes": ["GENE1"]}, "cells": {"where": "cell_typ = 'x'"}}, CorpusError, "'cell_type'"),
        ({"edits": {"genes": ["GENE1"]}, "cells": {"where": "cell_type = 't_cell'"}}, CorpusError, "none of the 24"),
        (
            {"edits": {"genes": ["GENE1"]}, "cells": {"max_cells": 1, "max_cells_per": "donor"}},
            CorpusError,
            "'donor_id'",
        ),
        ({"edits": {"genes": ["GENE1"]}, "readouts": {"gene_shifts": ["GENE99"]}}, UnknownGeneError, "GENE99"),
        (
            {"edits": {"genes": ["GENE1"], "kind": "replace", "ranks_of": "donor_id = 'x'"}},
            CorpusError,
            "none of the 24",
        ),
    ],
)
def test_names_that_do_not_fit_are_refused(
    sections: dict[str, Any], kind: type[GenescaleError], said: str, planned: Any
) -> None:
    with pytest.raises(kind, match=said):
        planned(**sections)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "no edit is named"),
        ({"edits": {}}, "no edit is named"),
        ({"edits": {"gene": ["A"]}}, "edits: unknown key 'gene'. Did you mean 'genes'"),
        ({"edit": {"genes": ["A"]}}, "unknown key 'edit'. Did you mean 'edits'"),
        ({"edits": {"genes": ["A"], "all": True}}, "'all' stands alone, but genes is given too"),
        ({"edits": {"all": True, "top": 3}}, "stands alone"),
        ({"edits": {"genes": ["A"], "controls": -1}}, "controls is -1"),
        ({"edits": {"genes": ["A"], "quartiles": 2}}, "quartiles and rank are for inhibit and activate"),
        ({"edits": {"genes": ["A"], "kind": "replace"}}, "ranks_of"),
        ({"edits": {"genes": ["A"], "kind": "overexpress", "refill": True}}, "only a deletion can refill"),
        ({"edits": {"all": True}, "cells": {"max_cells_per": "donor_id"}}, "max_cells_per needs max_cells"),
        ({"edits": {"all": True}, "readouts": {"gene_shifts": ["all", "A"]}}, "gene_shifts is"),
        ({"edits": {"all": True}, "readouts": {"top_k": 5}}, "gene shifts, which are not recorded"),
        ({"edits": {"all": True}, "readouts": {"states": {"column": "disease"}}}, "a goal or alternatives"),
        ({"edits": {"all": True}, "readouts": {"states": {"file": "x", "goal": "y"}}}, "'file' stands alone"),
        ({"edits": {"genes": ["A"]}, "two_pass": {}}, "a first pass scores the deletion of every gene"),
        ({"edits": {"all": True}, "compute": {"device": "gpu"}}, "'gpu' is not one of"),
    ],
)
def test_specs_that_contradict_themselves_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        config_of(**sections)


def test_refills_need_cells_that_are_whole(corpus: Corpus, planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(edits={"all": True, "refill": True}).n_pairs == sum(
        len(cell) - 2 for cell in corpus.tokens(range(24))
    )
    whole = Corpus.cells

    def cropped(self: Corpus, columns: Any, **more: Any) -> Any:
        table = whole(self, columns, **more)
        if "n_genes" not in columns:
            return table
        return table.set_column(0, "n_genes", [[n + (at < 3) for at, n in enumerate(table["n_genes"].to_pylist())]])

    monkeypatch.setattr(Corpus, "cells", cropped)
    with pytest.raises(InputError, match="3 of the 24 cells have more genes than the window"):
        planned(edits={"all": True, "refill": True})


def test_gene_shifts_stay_bounded(planned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_GENE_PAIRS", 100)
    with pytest.raises(LimitError, match=r"60 edits times 60 affected genes may be 3,600 pairs.*top_k"):
        planned(edits={"all": True}, readouts={"gene_shifts": "all"})
    planned(edits={"all": True}, readouts={"gene_shifts": "all", "top_k": 1})
    planned(edits={"genes": ["GENE1"], "controls": 0}, readouts={"gene_shifts": "all"})
    monkeypatch.setattr(plans, "MAX_OBSERVATIONS", 100)
    with pytest.raises(LimitError, match="observations"):
        planned(edits={"all": True}, readouts={"gene_shifts": "all", "top_k": 1})


def test_a_model_of_another_vocabulary_is_refused(bare_bundle: Bundle, corpus: Corpus, local_store: Store) -> None:
    with pytest.raises(CorpusError, match="vocabulary"):
        make_plan(bare_bundle, corpus, config_of(edits={"genes": ["GENE1"]}), store=local_store)
