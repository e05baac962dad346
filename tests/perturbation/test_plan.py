"""Plans: which cells, which edits, how they are cut; and what is refused before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.perturbation import plan as plans
from genescale.perturbation.screening.plan import ScreenConfig, choose_cells, cut_units, make_plan
from genescale.platform.bundle import Bundle
from genescale.platform.errors import (
    CorpusError,
    GenescaleError,
    InputError,
    LimitError,
    SettingsError,
    UnknownGeneError,
)
from genescale.platform.settings import build


def test_units_are_consecutive_and_bounded() -> None:
    assert cut_units(np.array([4, 4, 4, 20, 1, 1]), 10).tolist() == [0, 0, 1, 2, 3, 3]


def test_cells_are_chosen_by_column_and_drawn_by_seed(corpus: Corpus) -> None:
    everything = choose_cells(corpus, ScreenConfig(genes=("GENE1",)))
    assert everything["cell"].to_list() == list(range(24))
    monocytes = choose_cells(corpus, ScreenConfig(genes=("GENE1",), where=("cell_type=monocyte", "donor_id=donor-0")))
    assert monocytes["cell_id"].to_list() == ["cell-1"]

    def drawn(seed: int) -> list[int]:
        return choose_cells(corpus, ScreenConfig(genes=("GENE1",), max_cells=6, seed=seed))["cell"].to_list()

    assert drawn(1) == drawn(1) == sorted(set(drawn(1)))
    assert len(drawn(1)) == 6
    assert drawn(1) != drawn(2)


def test_the_most_detected_genes_are_taken_ties_by_token(framed_bundle: Bundle, corpus: Corpus) -> None:
    plan = make_plan(framed_bundle, corpus, ScreenConfig(select="top_detected", top=5))
    special = set(framed_bundle.vocabulary.special.values())
    counts: dict[int, int] = {}
    for tokens in corpus.tokens(range(24)):
        for token in set(tokens.tolist()) - special:
            counts[token] = counts.get(token, 0) + 1
    best = sorted(counts, key=lambda token: (-counts[token], token))[:5]
    assert [edit[0] for edit in plan.edits] == best
    assert plan.n_pairs == 24 * 5


def test_a_plan_is_the_same_plan_again_and_another_one_for_other_numbers(framed_bundle: Bundle, corpus: Corpus) -> None:
    config = ScreenConfig(genes=("GENE1", "GENE2"), max_cells=5)
    digest = make_plan(framed_bundle, corpus, config).digest
    assert make_plan(framed_bundle, corpus, config).digest == digest
    faster = ScreenConfig(genes=("GENE1", "GENE2"), max_cells=5, tokens_per_batch=99, device="cpu")
    assert make_plan(framed_bundle, corpus, faster).digest == digest
    for changed in (
        ScreenConfig(genes=("GENE2", "GENE1"), max_cells=5),
        ScreenConfig(genes=("GENE1", "GENE2"), max_cells=5, seed=1),
        ScreenConfig(genes=("GENE1", "GENE2"), max_cells=5, layer="last"),
        ScreenConfig(genes=("GENE1", "GENE2"), max_cells=5, kind="overexpress"),
    ):
        assert make_plan(framed_bundle, corpus, changed).digest != digest
    assert make_plan(framed_bundle, corpus, config, goal=np.ones(32)).digest != digest


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        ({"genes": ["GENE_1"]}, UnknownGeneError, "Did you mean 'GENE1'"),
        ({"genes": ["GENE1", "ENSG00000000001"]}, SettingsError, "listed twice"),
        ({"genes": ["GENE1"], "where": ["cell_typ=x"]}, CorpusError, "Did you mean 'cell_type'"),
        ({"genes": ["GENE1"], "where": ["cell_type=t_cell"]}, CorpusError, "The corpus has b_cell, monocyte"),
        ({"genes": ["GENE1"], "where": ["cell_type"]}, SettingsError, "column=value"),
        ({"genes": ["GENE1"], "gene_shifts": "listed", "affected": ["GENE99"]}, UnknownGeneError, "GENE99"),
    ],
)
def test_what_the_corpus_or_model_lacks_is_named(
    framed_bundle: Bundle, corpus: Corpus, config: dict[str, object], kind: type[GenescaleError], said: str
) -> None:
    with pytest.raises(kind, match=said):
        make_plan(framed_bundle, corpus, build(ScreenConfig, config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "genes"),
        ({"genes": ["GENE1"], "select": "detected"}, "genes"),
        ({"genes": ["GENE1"], "gene_shifts": "listed"}, "affected"),
        ({"genes": ["GENE1"], "affected": ["GENE2"]}, "affected"),
        ({"genes": ["GENE1"], "max_cells": -1}, "max_cells"),
        ({"genes": ["GENE1"], "tokens_per_unit": 0}, "tokens_per_unit"),
        ({"genes": ["GENE1"], "maxcells": 1}, "Did you mean 'max_cells'"),
        ({"genes": ["GENE1"], "measure": "mean"}, "measure"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        build(ScreenConfig, config)


def test_kinds_of_later_releases_are_refused() -> None:
    with pytest.raises(InputError, match="not available yet"):
        ScreenConfig(kind="inhibit", genes=("GENE1",))  # type: ignore[arg-type]


def test_per_gene_shifts_stay_bounded(framed_bundle: Bundle, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_GENE_PAIRS", 100)
    with pytest.raises(LimitError, match="60 edits times 60 affected"):
        make_plan(framed_bundle, corpus, ScreenConfig(select="detected", gene_shifts="all"))
    make_plan(framed_bundle, corpus, ScreenConfig(genes=("GENE1",), gene_shifts="all"))


def test_a_model_of_another_vocabulary_is_refused(bare_bundle: Bundle, corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="vocabulary"):
        make_plan(bare_bundle, corpus, ScreenConfig(genes=("GENE1",)))


def test_a_goal_of_another_width_is_refused_before_any_work(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="embeddings have 32 values"):
        make_plan(framed_bundle, corpus, ScreenConfig(genes=("GENE1",)), goal=np.ones(31))
