"""What a screen found of a planted truth: shifts with a known answer must be judged so, and noise must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from genescale.ingestion.simulate import SimulateConfig, draw_cells
from genescale.ingestion.simulate_network import plant_network, truth_of
from genescale.platform.errors import InputError
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.demo.estimates import rank_auc
from genescale.serving.demo.truth import TruthResult, evaluate_truth, screen_edits
from genescale.serving.demo.verdicts import headline, verdicts
from genescale.training.model import Encoder, new_model, pack
from genescale.training.recipe import EncoderShape

REGULATORS = [f"R{at}" for at in range(8)]
UNRELATED = [f"U{at}" for at in range(30)]


def planted() -> dict[str, Any]:
    """Eight regulators with four direct and four indirect targets each; R0 and R1, R2 and R3 … are pairs."""
    edges, pairs = [], []
    for regulator in REGULATORS:
        edges += [
            {"regulator": regulator, "target": f"D{regulator}{j}", "class": "direct", "via": ""} for j in range(4)
        ]
        edges.append({"regulator": regulator, "target": f"M{regulator}", "class": "direct", "via": ""})
        for j in range(4):
            target = f"I{regulator}{j}"
            edges.append({"regulator": f"M{regulator}", "target": target, "class": "direct", "via": ""})
            edges.append({"regulator": regulator, "target": target, "class": "indirect", "via": f"M{regulator}"})
    for at in range(0, 8, 2):
        pairs.append({"regulators": [REGULATORS[at], REGULATORS[at + 1]], "targets": [f"C{at}{j}" for j in range(3)]})
    genes = {e["target"] for e in edges} | {g for p in pairs for g in p["targets"]} | set(REGULATORS)
    return {
        "regulators": REGULATORS,
        "mediators": [f"M{regulator}" for regulator in REGULATORS],
        "edges": edges,
        "pairs": pairs,
        "unrelated": UNRELATED,
        "genes": [{"id": gene, "role": "x"} for gene in sorted(genes)]
        + [{"id": gene, "role": "background" if at >= 5 else "housekeeping"} for at, gene in enumerate(UNRELATED)],
    }


def screened(
    truth: dict[str, Any],
    *,
    direct: float = 0.0,
    indirect: float = 0.0,
    shared_single: float = 0.0,
    shared_both: float = 0.0,
    labile_targets: float = 0.0,
    seed: int = 0,
    controls: int = 8,
    pairs: bool = True,
) -> pl.DataFrame:
    """Shifts as a screen would give them: a base for all, noise, and the effects asked for."""
    noise = np.random.default_rng(seed)
    reach = {(e["regulator"], e["target"]): e["class"] for e in truth["edges"]}
    targets = {e["target"] for e in truth["edges"]}
    shared = {gene: pair["regulators"] for pair in truth["pairs"] for gene in pair["targets"]}
    rows = []
    for edit in screen_edits(truth, controls=controls, pairs=pairs):
        parts = edit.split("+")
        for gene in (g["id"] for g in truth["genes"]):
            if gene in parts:
                continue
            shift = 0.02 * len(parts) + noise.normal(0, 0.002)
            shift += labile_targets * (gene in targets)
            for part in parts:
                shift += {"direct": direct, "indirect": indirect, None: 0.0}[reach.get((part, gene))]
            hit = len(set(shared.get(gene, [])) & set(parts))
            shift += {0: 0.0, 1: shared_single, 2: shared_both}[hit]
            rows.append((edit, gene, 40, shift))
    return pl.DataFrame(rows, schema=["gene_id", "affected_gene_id", "n_cells", "mean_shift"], orient="row")


def ordering(result: TruthResult, more: str, less: str) -> Any:
    return next(one for one in result.orderings if (one.more, one.less) == (more, less))


def test_a_planted_order_is_found_with_its_size() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, direct=0.02, indirect=0.01), truth)
    assert result.n_regulators == 8
    # Eight background genes and the four housekeeping genes of the control pairs.
    assert result.n_controls == 12
    assert result.share_ordered_raw == result.share_ordered_matched == 1.0
    for more, less in (("direct", "indirect"), ("indirect", "unrelated")):
        found = ordering(result, more, less)
        assert found.raw.above_zero
        assert found.matched.above_zero
        assert found.raw.low < found.raw.mean < found.raw.high
    # The mediator is a direct target too: 5 direct and 4 indirect targets of each of 8 regulators.
    assert result.classes["direct"].n_pairs == 40
    assert result.classes["indirect"].n_pairs == 32
    assert result.classes["direct"].shift.mean == pytest.approx(0.04, abs=0.002)
    # A shift of 0.04 where control deletions give 0.02 is one doubling.
    assert result.classes["direct"].fold.mean == pytest.approx(1.0, abs=0.1)
    assert result.classes["unrelated"].fold.mean == pytest.approx(0.0, abs=0.1)
    assert ordering(result, "direct", "unrelated").auc_raw > 0.99
    assert headline(result).startswith("direct > indirect > unrelated: found (100 % of 8 regulators")
    assert [sentence.startswith("Found") for sentence in verdicts(result)] == [True, True, True, False]


def test_noise_alone_is_not_found() -> None:
    truth = planted()
    found = 0
    for seed in range(10):
        result = evaluate_truth(screened(truth, seed=seed), truth)
        found += sum(one.raw.above_zero + one.matched.above_zero for one in result.orderings)
        assert ordering(result, "direct", "unrelated").auc_raw == pytest.approx(0.5, abs=0.15)
    # A 95 % interval lies above 0 by chance in one of 40 cases, a little more often with eight regulators.
    assert found <= 10
    assert "not found" in headline(evaluate_truth(screened(truth), truth))


def test_genes_that_every_deletion_moves_are_no_evidence_for_a_regulator() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, labile_targets=0.03), truth)
    assert ordering(result, "direct", "unrelated").raw.above_zero
    assert not ordering(result, "direct", "unrelated").matched.above_zero
    assert not any(sentence.startswith("Found") for sentence in verdicts(result))
    assert result.classes["direct"].fold.mean == pytest.approx(0.0, abs=0.1)


def test_an_effect_that_targets_own_stability_hides_is_found_against_controls() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, direct=0.008, indirect=0.004, labile_targets=-0.012), truth)
    assert ordering(result, "direct", "unrelated").raw.below_zero
    assert ordering(result, "direct", "unrelated").matched.above_zero
    assert "unrelated: found (" in headline(result)


def test_an_effect_as_small_as_without_learning_is_not_called_found() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, direct=0.002), truth)
    assert ordering(result, "direct", "unrelated").matched.above_zero
    assert "not found" in headline(result)
    assert any("no larger than without learning" in sentence for sentence in verdicts(result))


def test_an_untrained_encoder_finds_nothing() -> None:
    network = plant_network(SimulateConfig(seed=1, cells_per_file=800, background=40))
    truth = truth_of(network)
    counts_ng = draw_cells(network, 0).counts.toarray()
    shares_ng = np.where(counts_ng > 0, counts_ng / counts_ng.sum(axis=1, keepdims=True), np.nan)
    vocabulary = Vocabulary.build(network.gene_ids, np.nanmedian(shares_ng, axis=0), window=256, name="test")
    token_g = vocabulary.map_ids(network.gene_ids)
    cells = [
        rank_value_tokens(token_g[row > 0], row[row > 0], vocabulary).input_ids.astype(np.int64) for row in counts_ng
    ]
    shape = EncoderShape(width=32, layers=2, heads=2, feed_forward=64)
    encoder = new_model(shape.for_vocabulary(vocabulary), seed=1, attention="auto").eval().encoder
    result = evaluate_truth(deletion_shifts(encoder, cells, vocabulary, screen_edits(truth)), truth)
    assert result.n_regulators == len(truth["regulators"])
    assert not any(sentence.startswith("Found") for sentence in verdicts(result))
    assert "not found" in headline(result)


@torch.no_grad()
def deletion_shifts(
    encoder: Encoder, cells: list[np.ndarray], vocabulary: Vocabulary, edits: tuple[str, ...]
) -> pl.DataFrame:
    """The table of a screen, from its definition."""
    tables = []
    for edit in edits:
        genes = [vocabulary.token(gene) for gene in edit.split("+")]
        having = [cell for cell in cells if np.isin(genes, cell).any()]
        kept = [~np.isin(cell, genes) for cell in having]
        before = encoder(pack(having))[torch.from_numpy(np.concatenate(kept))]
        after = encoder(pack([cell[keep] for cell, keep in zip(having, kept, strict=True)]))
        shift = 1 - torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        tokens = np.concatenate([cell[keep] for cell, keep in zip(having, kept, strict=True)])
        tables.append(pl.DataFrame({"gene_id": edit, "token": tokens, "shift": shift.numpy()}))
    return (
        pl.concat(tables)
        .filter(~pl.col("token").is_in(list(vocabulary.special.values())))
        .group_by("gene_id", "token")
        .agg(n_cells=pl.len(), mean_shift=pl.col("shift").mean())
        .with_columns(affected_gene_id=pl.col("token").map_elements(vocabulary.gene_of_token, return_dtype=pl.String))
    )


def test_a_reversed_order_is_called_so() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, direct=-0.01), truth)
    assert ordering(result, "direct", "indirect").raw.below_zero
    assert any(sentence.startswith("The opposite was found") for sentence in verdicts(result))
    assert not any(sentence.startswith("Found: deleting a regulator moves its direct") for sentence in verdicts(result))


@pytest.mark.parametrize(
    ("single", "both", "beyond_larger"), [(0.01, 0.04, True), (0.0, 0.04, True), (0.02, 0.02, False)]
)
def test_pairs_are_compared_with_their_single_deletions(single: float, both: float, beyond_larger: bool) -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, shared_single=single, shared_both=both), truth)
    assert result.pairs is not None
    assert result.pairs.both.n == 4
    # Two deletions move everything by 0.04 and one by 0.02: what counts is what comes on top.
    assert result.pairs.both.mean == pytest.approx(np.log2(1 + both / 0.04), abs=0.15)
    assert result.pairs.larger_single.mean == pytest.approx(np.log2(1 + single / 0.02), abs=0.2)
    assert result.pairs.beyond_larger.above_zero is beyond_larger
    texts = [text for text in verdicts(result) if "stronger single deletion" in text]
    assert [text.startswith("Found") for text in texts] == [beyond_larger]


def test_pairs_without_an_effect_are_not_found() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth), truth)
    assert result.pairs is not None
    assert not result.pairs.both.above_zero
    assert not any(text.startswith("Found") for text in verdicts(result) if "of a pair" in text)


def test_cells_with_one_gene_of_a_pair_do_not_make_its_joint_deletion_look_strong() -> None:
    truth = planted()
    shared = [gene for pair in truth["pairs"] for gene in pair["targets"]]
    # Genes other than the shared targets meet a joint deletion mostly in cells that have only one of its genes.
    half = screened(truth).with_columns(
        mean_shift=pl.when(pl.col("gene_id").str.contains("R.*[+]R") & ~pl.col("affected_gene_id").is_in(shared))
        .then(pl.col("mean_shift") - 0.02)
        .otherwise(pl.col("mean_shift"))
    )
    result = evaluate_truth(half, truth)
    assert result.pairs is not None
    assert not result.pairs.both.above_zero
    assert not result.pairs.beyond_larger.above_zero


def test_the_order_of_a_pair_does_not_matter() -> None:
    truth = planted()
    table = screened(truth, shared_both=0.04)
    turned = table.with_columns(
        gene_id=pl.col("gene_id").map_elements(lambda text: "+".join(reversed(text.split("+"))), return_dtype=pl.String)
    )
    assert evaluate_truth(turned, truth) == evaluate_truth(table, truth)


def test_a_screen_without_pairs_or_controls_says_nothing_about_them() -> None:
    truth = planted()
    result = evaluate_truth(screened(truth, direct=0.02, controls=0, pairs=False), truth)
    assert result.pairs is None
    assert result.n_controls == 0
    assert not any("pair" in sentence for sentence in verdicts(result))
    # The other regulators still are controls.
    assert result.classes["direct"].fold.mean == pytest.approx(1.0, abs=0.15)


def test_two_regulators_are_too_few_for_a_verdict() -> None:
    truth = planted()
    table = screened(truth, direct=0.02, pairs=False).filter(pl.col("gene_id").is_in(["R0", "R1", *UNRELATED]))
    result = evaluate_truth(table, truth)
    assert result.n_regulators == 2
    assert all(sentence.startswith("Not tested") for sentence in verdicts(result))


def test_genes_seen_in_few_cells_are_left_out() -> None:
    truth = planted()
    table = screened(truth, direct=0.02)
    wild = table.with_columns(
        mean_shift=pl.when(pl.col("affected_gene_id") == "DR00").then(9.0).otherwise(pl.col("mean_shift")),
        n_cells=pl.when(pl.col("affected_gene_id") == "DR00").then(2).otherwise(pl.col("n_cells")),
    )
    result = evaluate_truth(wild, truth)
    assert result.classes["direct"].n_pairs == 39
    assert result.classes["direct"].shift.mean < 0.1


def test_the_same_table_and_seed_give_the_same_result() -> None:
    truth = planted()
    table = screened(truth, direct=0.02)
    assert evaluate_truth(table, truth) == evaluate_truth(table.sample(fraction=1.0, shuffle=True, seed=1), truth)


def test_edits_are_regulators_controls_and_pairs() -> None:
    truth = planted()
    edits = screen_edits(truth, controls=5)
    assert edits[:8] == tuple(REGULATORS)
    assert set(edits[8:13]) <= set(UNRELATED[5:])
    assert edits[13:17] == ("R0+R1", "R2+R3", "R4+R5", "R6+R7")
    # Housekeeping genes, which stand in nearly every cell, singly and in pairs.
    assert edits[17:] == ("U0", "U1", "U2", "U3", "U0+U1", "U1+U2", "U2+U3")
    assert screen_edits(truth, controls=5, pairs=False) == edits[:13]


def test_an_atlas_without_housekeeping_genes_has_no_control_for_pairs() -> None:
    truth = planted()
    for gene in truth["genes"]:
        gene["role"] = "background" if gene["role"] == "housekeeping" else gene["role"]
    result = evaluate_truth(screened(truth, shared_both=0.04), truth)
    assert result.pairs is None
    assert not any("pair" in sentence for sentence in verdicts(result))


def test_a_table_that_cannot_be_judged_is_refused() -> None:
    truth = planted()
    with pytest.raises(InputError, match="lacks mean_shift"):
        evaluate_truth(screened(truth).drop("mean_shift"), truth)
    with pytest.raises(InputError, match="none of the planted regulators"):
        evaluate_truth(screened(truth).filter(pl.col("gene_id").is_in(UNRELATED)), truth)


def test_rank_auc() -> None:
    assert rank_auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert rank_auc(np.array([1.0]), np.array([1.0, 0.0])) == 0.75
    assert np.isnan(rank_auc(np.array([]), np.array([1.0])))
