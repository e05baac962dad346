"""Attention in slices: the same weights as the encoder's own, and sums over them whose answers are known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from genescale.perturbation.attention.pair_sums import PairSums
from genescale.perturbation.attention.rank_profile import ALL_RANKS, RankProfile
from genescale.perturbation.attention.rank_summary import layer_summary, spread, survey_and_focus
from genescale.perturbation.attention.stream import CellGenes, Rows, attention_rows
from genescale.training.model import Encoder, EncoderConfig, new_model, pack
from tests.perturbation.conftest import tiny_vocabulary

OWN = {"norm": "pre", "activation": "geglu", "biases": False, "rank_knots": 8, "rotary_base": 10_000.0,
       "rank_neighbours": 1, "query_key_norm": True}  # fmt: skip
FRAMED = tiny_vocabulary(framed=True)


def encoder(**options: object) -> Encoder:
    config = EncoderConfig(
        vocabulary_size=FRAMED.size,
        width=16,
        layers=3,
        heads=2,
        feed_forward=32,
        positions=48,
        initializer_range=0.5,
        **options,  # type: ignore[arg-type]
    )
    return new_model(config, seed=1).encoder.eval()


def cell_of(genes: int, *, framed: bool = True) -> CellGenes:
    tokens = np.random.default_rng(genes).permutation(FRAMED.token_ids.astype(np.int64))[:genes]
    framing = (FRAMED.cls, FRAMED.eos)
    return CellGenes.of(np.array([framing[0], *tokens, framing[1]] if framed else tokens), FRAMED)


@pytest.mark.parametrize("options", [{}, OWN], ids=["published", "own"])
@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("most_weights", [40, 10**9])
def test_slices_are_the_weights_of_the_encoder(options: dict[str, object], framed: bool, most_weights: int) -> None:
    model, cell = encoder(**options), cell_of(20, framed=framed)
    seen = dict.fromkeys(range(3), 0)
    for rows in attention_rows(model, cell, most_weights=most_weights):
        whole_hss = model.attention_weights(pack([cell.tokens_s]), layer=rows.layer)[0]
        wanted_hqg = whole_hss[:, cell.places_g][:, :, cell.places_g][:, rows.first : rows.stop].clone()
        own = torch.arange(rows.stop - rows.first)
        own_hq = wanted_hqg[:, own, own + rows.first].clone()
        wanted_hqg[:, own, own + rows.first] = 0.0
        assert seen[rows.layer] == rows.first
        seen[rows.layer] = rows.stop
        torch.testing.assert_close(rows.to_others_hqg, wanted_hqg, atol=2e-6, rtol=1e-4)
        torch.testing.assert_close(rows.to_self_hq, own_hq, atol=2e-6, rtol=1e-4)
        total_hq = rows.to_others_hqg.sum(-1) + rows.to_self_hq + rows.to_special_hq
        torch.testing.assert_close(total_hq, torch.ones_like(total_hq), atol=1e-5, rtol=0)
        if not framed:
            assert float(rows.to_special_hq.max()) < 1e-5
    assert seen == dict.fromkeys(range(3), 20)


def test_memory_is_that_of_one_slice() -> None:
    model, cell = encoder(), cell_of(40)
    sizes = [rows.to_others_hqg.shape[1] for rows in attention_rows(model, cell, most_weights=5 * 2 * 42)]
    assert max(sizes) == 5
    assert sum(sizes) == 3 * 40


def profile_of(weights_hgg: torch.Tensor, n_special: int) -> RankProfile:
    """A profile of one cell in one layer whose genes look as `weights_hgg` says, in two slices."""
    heads, genes, _ = weights_hgg.shape
    cell = CellGenes(tokens_s=np.arange(genes + n_special), places_g=np.arange(n_special, genes + n_special))
    profile = RankProfile(1, heads, longest=genes)
    profile.begin(cell)
    for first, stop in ((0, 7), (7, genes)):
        part_hqg = weights_hgg[:, first:stop].clone()
        own_hq = part_hqg.diagonal(offset=first, dim1=1, dim2=2)
        to_self_hq = own_hq.clone()
        own_hq.zero_()
        special_hq = 1.0 - part_hqg.sum(-1) - to_self_hq
        entropy_hq = torch.special.entr(weights_hgg[:, first:stop]).sum(-1)
        entropy_hq = entropy_hq + n_special * torch.special.entr(special_hq / max(n_special, 1))
        profile.see(
            Rows(
                layer=0,
                first=first,
                to_others_hqg=part_hqg,
                to_self_hq=to_self_hq,
                to_special_hq=special_hq,
                entropy_hq=entropy_hq,
            )
        )
    profile.end(2.5)
    return profile


def test_a_head_that_looks_at_all_tokens_alike_is_uniform_everywhere() -> None:
    profile = profile_of(torch.full((2, 40, 40), 1 / 42), n_special=2)
    np.testing.assert_allclose(profile.between_ranks()["relative"].to_numpy(), 1.0, rtol=1e-5)
    heads = profile.heads()
    np.testing.assert_allclose(heads["looked_at_share"].to_numpy(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(heads["to_self"].to_numpy(), 1 / 42, rtol=1e-5)
    np.testing.assert_allclose(heads["to_special"].to_numpy(), 2 / 42, rtol=1e-4)
    np.testing.assert_allclose(heads["to_genes"].to_numpy(), 39 / 42, rtol=1e-5)
    assert set(heads["from_rank"]) == {"1 to 10", "11 to 30", "31 to 100", ALL_RANKS}
    assert layer_summary(profile.between_ranks(), heads)["spread_bits"][0] == pytest.approx(0.0, abs=1e-6)


def test_a_head_that_looks_at_the_first_gene_and_one_that_looks_at_the_next() -> None:
    weights_hgg = torch.zeros(2, 40, 40)
    weights_hgg[0, :, 0] = 1.0
    weights_hgg[1, torch.arange(40), (torch.arange(40) + 1) % 40] = 1.0
    profile = profile_of(weights_hgg, n_special=0)
    table = profile.between_ranks().filter(pl.col("head") == 1)
    first = table.filter(pl.col("to_rank") == "1 to 10")
    share = dict(zip(first["from_rank"], first["share"], strict=True))
    # The first gene looks at itself, which is no attention to another gene.
    assert share == pytest.approx({"1 to 10": 0.9, "11 to 30": 1.0, "31 to 100": 1.0, ALL_RANKS: 39 / 40})
    assert table.filter(pl.col("to_rank") != "1 to 10")["share"].abs().max() == 0.0
    relative = first.filter(pl.col("from_rank") == "11 to 30")["relative"][0]
    assert relative == pytest.approx(1.0 / (10 / 40), rel=1e-6)
    heads = profile.heads().filter(pl.col("from_rank") == ALL_RANKS).sort("head")
    assert heads["to_self"].to_list() == pytest.approx([1 / 40, 0.0])
    assert heads["looked_at"].to_list() == pytest.approx([1.0, 1.0])
    assert layer_summary(profile.between_ranks(), profile.heads())["spread_bits"][0] > 0.3


def test_cells_are_averaged_with_their_weights() -> None:
    profile = RankProfile(1, 1, longest=12)
    for value, weight in ((1.0, 3.0), (0.5, 1.0)):
        cell = CellGenes(tokens_s=np.arange(12), places_g=np.arange(12))
        profile.begin(cell)
        rows_hqg = torch.zeros(1, 12, 12)
        rows_hqg[0, 1:, 0] = value
        rest_hq = 1.0 - rows_hqg.sum(-1)
        profile.see(
            Rows(
                layer=0,
                first=0,
                to_others_hqg=rows_hqg,
                to_self_hq=rest_hq,
                to_special_hq=torch.zeros(1, 12),
                entropy_hq=torch.zeros(1, 12),
            )
        )
        profile.end(weight)
    row = profile.between_ranks().filter((pl.col("from_rank") == "11 to 30") & (pl.col("to_rank") == "1 to 10"))
    assert row["share"][0] == pytest.approx((3.0 * 1.0 + 1.0 * 0.5) / 4)
    assert row["n_cells"][0] == 2


def test_spread_and_the_halves_of_the_layers() -> None:
    assert spread(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(1.0)
    assert spread(np.array([[3.0, 1.0], [6.0, 2.0]])) == pytest.approx(0.0)
    summary = pl.DataFrame(
        {
            "layer": [1, 2, 3],
            "spread_bits": [0.6, 9.0, 0.2],
            "top_relative": [1.0, 9.0, 3.0],
            "looked_at_share": [0.5, 9.0, 0.1],
        }
    )
    found = survey_and_focus(summary)
    assert found is not None
    assert (found["early_spread_bits"], found["late_spread_bits"]) == (0.6, 0.2)
    assert (found["early_top_relative"], found["late_top_relative"]) == (1.0, 3.0)
    assert survey_and_focus(summary.head(1)) is None


def pairs_of(cells: list[tuple[list[int], torch.Tensor]], graph: list[int]) -> PairSums:
    pairs = PairSums(np.array(graph), FRAMED.size, layers=[1], heads=[0, 1])
    for tokens, weights_hgg in cells:
        pairs.begin(CellGenes(tokens_s=np.array(tokens), places_g=np.arange(len(tokens))))
        for layer, scale in ((0, 100.0), (1, 1.0)):
            for first, stop in ((0, 2), (2, len(tokens))):
                rows_hqg = scale * weights_hgg[:, first:stop]
                empty_hq = torch.zeros(2, stop - first)
                pairs.see(
                    Rows(
                        layer=layer,
                        first=first,
                        to_others_hqg=rows_hqg,
                        to_self_hq=empty_hq,
                        to_special_hq=empty_hq,
                        entropy_hq=empty_hq,
                    )
                )
        pairs.end()
    return pairs


def test_edges_are_means_over_the_cells_that_have_both_genes() -> None:
    a, b, c, d = (int(token) for token in FRAMED.token_ids[:4])
    one, two = torch.zeros(2, 4, 4), torch.zeros(2, 3, 3)
    one[:, 0, 1], one[0, 2, 1] = 0.8, 0.4
    two[:, 1, 0] = 0.2
    # In the second cell b stands first, a second; d is not in the graph.
    pairs = pairs_of([([a, b, c, d], one), ([b, a, d], two)], [a, b, c])
    edges, n_pairs = pairs.edges(FRAMED, min_cells=1, order="relative", threshold=0.0, most=0)
    assert n_pairs == 6
    found = {(row["source_symbol"], row["target_symbol"]): row for row in edges.iter_rows(named=True)}
    symbols = [FRAMED.symbol_of(FRAMED.gene_of_token(token)) for token in (a, b, c)]
    first, second = found[symbols[0], symbols[1]], found[symbols[2], symbols[1]]
    assert set(found) == {(symbols[0], symbols[1]), (symbols[2], symbols[1])}
    assert (first["weight"], first["n_cells"]) == (pytest.approx((0.8 + 0.2) / 2), 2)
    assert first["relative"] == pytest.approx((0.8 * 4 + 0.2 * 3) / 2)
    assert (second["weight"], second["n_cells"]) == (pytest.approx(0.2), 1)
    mean = (first["relative"] + second["relative"]) / 2
    assert first["lift"] == pytest.approx(first["relative"] / mean)
    assert edges["relative"].is_sorted(descending=True)


def test_rare_pairs_weak_edges_and_what_is_too_many_are_left_out() -> None:
    a, b, c = (int(token) for token in FRAMED.token_ids[:3])
    one, two = torch.full((2, 3, 3), 0.3), torch.full((2, 2, 2), 0.6)
    pairs = pairs_of([([a, b, c], one), ([a, b], two)], [a, b, c])
    edges, n_pairs = pairs.edges(FRAMED, min_cells=2, order="relative", threshold=0.0, most=0)
    assert (len(edges), n_pairs) == (2, 2)
    assert len(pairs.edges(FRAMED, min_cells=1, order="relative", threshold=0.0, most=1)[0]) == 1
    none, _ = pairs.edges(FRAMED, min_cells=1, order="relative", threshold=50.0, most=0)
    assert (len(none), none.schema["source"]) == (0, pl.String)
    nodes = pairs.nodes(FRAMED, min_cells=1)
    assert nodes["n_cells"].to_list() == [2, 2, 1]
    assert nodes["mean_rank"].to_list() == [1.0, 2.0, 3.0]
