"""Lists against matched genes on data with known answers: matching, false discoveries, power, donors."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from genescale.perturbation.attention.list_shares import ListShares, NamedGenes
from genescale.perturbation.attention.list_tests import Donors, gene_rows, list_table, shared_controls, significant
from genescale.perturbation.attention.matching import gene_features, matched_genes
from genescale.perturbation.attention.named_lists import named_lists, of_lists
from genescale.perturbation.attention.signed_rank import signed_rank
from genescale.perturbation.attention.stream import CellGenes
from genescale.platform.errors import InputError, UnknownGeneError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from tests.perturbation.conftest import gene_id, symbol, tiny_vocabulary

N_GENES, IN_CELL, HEADS = 400, 200, 300
BARE = Vocabulary.build(
    [gene_id(i) for i in range(N_GENES)],
    np.exp(np.random.default_rng(5).normal(size=N_GENES)),
    window=512,
    special=("<pad>", "<mask>"),
)


def attention_of_cells(effects_th: np.ndarray, cells: int, noise: float) -> list[tuple[CellGenes, np.ndarray]]:
    """Cells in which a gene receives its own fixed attention, less at lower ranks, with noise of the cell."""
    generator = np.random.default_rng(11)
    made = []
    for _ in range(cells):
        tokens_g = generator.permutation(BARE.token_ids)[:IN_CELL].astype(np.int64)
        falling_g = 1.0 / np.sqrt(1.0 + np.arange(IN_CELL))
        noise_hg = np.exp(noise * generator.normal(size=(effects_th.shape[1], IN_CELL)))
        received_hg = effects_th[tokens_g].T * falling_g * noise_hg
        made.append((CellGenes(tokens_s=tokens_g, places_g=np.arange(IN_CELL)), received_hg[None]))
    return made


def measured(
    tokens: np.ndarray, cells: list[tuple[CellGenes, np.ndarray]], donors: Donors, *, controls: int = 10
) -> tuple[ListShares, pl.DataFrame]:
    found = ListShares(
        NamedGenes(name="list", tokens=tuple(sorted(int(token) for token in tokens))),
        len(cells),
        1,
        cells[0][1].shape[1],
        BARE.size,
    )
    cells_t = np.zeros(BARE.size)
    for cell, _ in cells:
        cells_t[cell.genes_g] += 1
    features_tf = gene_features(BARE, cells_t, len(cells))
    for number, (cell, received_lhg) in enumerate(cells):
        weight = float(donors.weight_n[number])
        found.add(number, cell, received_lhg, features_tf=features_tf, controls=controls, weight=weight)
    return found, list_table(found, donors, min_cells=5, confidence=0.95, draws=200, seed=0)


def donors_of(cells: int, donors: int) -> Donors:
    return Donors(code_n=np.arange(cells) % donors, names=tuple(f"donor {i}" for i in range(donors)))


def fixed_effects(seed: int) -> np.ndarray:
    """Attention that is a gene's own in every cell: independent between genes and heads, and skewed."""
    return np.random.default_rng(seed).lognormal(sigma=1.0, size=(BARE.size, HEADS))


LISTED = BARE.token_ids[np.random.default_rng(2).choice(N_GENES, 30, replace=False)]


def test_lists_of_no_meaning_are_found_at_the_nominal_rate_where_tests_over_cells_find_nearly_all() -> None:
    cells, donors = attention_of_cells(fixed_effects(1), 36, noise=0.3), donors_of(36, 9)
    found, table = measured(LISTED, cells, donors)
    heads = table.filter(pl.col("head") > 0)
    over_genes = float((heads["p_genes"] < 0.05).mean())  # type: ignore[arg-type]
    larger = float((heads["p"] < 0.05).mean())  # type: ignore[arg-type]
    # 299 independent heads, with the mean of them: two standard errors are 0.025.
    assert 0.025 <= over_genes <= 0.075
    assert larger <= 0.075
    assert len(significant(heads, above=True)) + len(significant(heads, above=False)) <= 3
    over_cells = stats.wilcoxon(found.cell_place_nlh[:, 0] - 0.5, axis=0).pvalue
    assert (over_cells < 0.05).mean() > 0.5
    assert heads["place"].mean() == pytest.approx(0.5, abs=0.02)
    covered = heads.filter((pl.col("ci_low") <= 1) & (pl.col("ci_high") >= 1))
    assert len(covered) / len(heads) > 0.85


def test_power_rises_with_the_effect_and_the_sign_is_right() -> None:
    shares = []
    for factor in (1.5, 3.0, 1 / 3):
        effects_th = fixed_effects(1)
        effects_th[LISTED] *= factor
        _, table = measured(LISTED, attention_of_cells(effects_th, 36, noise=0.3), donors_of(36, 9))
        heads = table.filter(pl.col("head") > 0)
        sides = (len(significant(heads, above=True)), len(significant(heads, above=False)))
        shares.append(sides)
        if factor == 3.0:
            assert heads["ratio"].median() == pytest.approx(3.0, rel=0.25)
            assert heads["donors_above"].min() >= 7  # type: ignore[operator]
    weak, strong, inverse = shares
    assert weak[0] < strong[0]
    assert strong[0] > 0.95 * HEADS
    assert strong[1] == 0
    assert inverse[1] > 0.95 * HEADS
    assert inverse[0] == 0


def test_shared_controls_are_counted() -> None:
    """A dozen matched genes for all the list are a dozen comparisons, however many genes the list has."""
    cells, donors = attention_of_cells(fixed_effects(1), 24, noise=0.0), donors_of(24, 8)
    all_but_few = BARE.token_ids[:-12]
    found, table = measured(all_but_few, cells, donors)
    assert shared_controls(found, len(all_but_few)) > 10
    heads = table.filter(pl.col("head") > 0)
    assert (heads["p_genes"] < 0.05).mean() <= 0.12  # type: ignore[operator]
    kept_p = found.cells_p >= 5
    place_ph = (found.place_plh[kept_p] / found.weight_p[kept_p][:, None, None])[:, 0]
    assert (signed_rank(place_ph - 0.5) < 0.05).mean() > 0.4


def test_signed_ranks_are_those_of_scipy_and_exact_with_ties() -> None:
    generator = np.random.default_rng(0)
    for units in (7, 12, 30):
        values_uc = generator.normal(size=(units, 5)) + 0.3
        exact_c = stats.wilcoxon(values_uc, axis=0, method="exact").pvalue
        np.testing.assert_allclose(signed_rank(values_uc), exact_c, atol=1e-12 if units < 20 else 0.015)
    # Two zeros go, the rest are tied: all six positive has a chance of one in 32.
    tied_uc = np.array([[0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).T
    assert signed_rank(tied_uc)[0] == pytest.approx(2 / 64)
    assert signed_rank(np.zeros((8, 1)))[0] == 1.0
    assert signed_rank(np.zeros((20, 1)))[0] == 1.0


def test_what_only_one_donor_shows_is_not_significant() -> None:
    effects_th = np.ones((BARE.size, 3))
    cells = attention_of_cells(effects_th, 40, noise=0.2)
    donors = donors_of(40, 8)
    for number, (cell, received_lhg) in enumerate(cells):
        if donors.code_n[number] == 0:
            received_lhg[..., np.isin(cell.genes_g, LISTED)] *= 20.0
    _, table = measured(LISTED, cells, donors)
    heads = table.filter(pl.col("head") > 0)
    assert heads["p_genes"].max() < 0.01  # type: ignore[operator]
    assert len(significant(heads, above=True)) == 0
    assert (heads["p"] >= heads["p_donors"]).all()


def test_donors_count_alike_however_many_cells_they_have() -> None:
    effects_th = np.ones((BARE.size, 1))
    cells = attention_of_cells(effects_th, 30, noise=0.0)
    donors = Donors(code_n=np.array([0] * 27 + [1] * 3), names=("many", "few"))
    assert donors.weight_n.sum() == pytest.approx(30.0)
    for number, (_, received_lhg) in enumerate(cells):
        received_lhg[:] = 1.0 + donors.code_n[number]
    found, _ = measured(LISTED, cells, donors)
    weight_p = found.weight_p[:, None, None]
    total = found.listed_plh.sum() / weight_p.sum()
    # 27 cells of one and three of two would give 1.1.
    assert total == pytest.approx(1.5, abs=0.06)


def test_few_genes_and_few_donors_are_said_to_be_few() -> None:
    cells = attention_of_cells(fixed_effects(3)[:, :2], 20, noise=0.1)
    _, few_genes = measured(LISTED[:4], cells, donors_of(20, 8))
    assert few_genes["testable"].to_list() == [False] * 2
    assert "needs 6" in few_genes["reason"][0]
    assert few_genes["p"].is_null().all()
    assert few_genes["ratio"].is_not_null().all()
    _, one_donor = measured(LISTED, cells, donors_of(20, 1))
    assert one_donor["testable"].all()
    assert "over genes alone: 1 donor(s)" in one_donor["reason"][0]
    assert one_donor["p_donors"].is_null().all()
    assert (one_donor["p"] == one_donor["p_genes"]).all()
    _, one_gene = measured(LISTED[:1], cells, donors_of(20, 8))
    assert set(one_gene["over"]) == {"donors"}
    assert one_gene["ci_low"].is_not_null().all()
    _, nothing = measured(LISTED, cells[:3], donors_of(3, 3))
    assert (nothing["n_genes"][0], nothing["testable"][0]) == (0, False)
    assert nothing.columns == one_gene.columns
    assert pl.concat([one_gene, nothing]).height == 4


def test_a_gene_row_says_how_well_it_was_matched() -> None:
    found, _ = measured(LISTED, attention_of_cells(np.ones((BARE.size, 1)), 20, noise=0.0), donors_of(20, 4))
    rows = gene_rows(found, BARE)
    assert rows["gene_id"].n_unique() == len(LISTED)
    # Attention falls with rank, and nothing else: matched genes receive the same.
    assert (rows["received"] / rows["matched"]).median() == pytest.approx(1.0, abs=0.1)
    assert np.corrcoef(rows["mean_rank"], rows["matched_mean_rank"])[0, 1] > 0.98


def test_matched_genes_are_near_in_rank_expression_and_detection() -> None:
    vocabulary = tiny_vocabulary(framed=False)
    genes_g = vocabulary.token_ids[:50].astype(np.int64)
    none_t = np.zeros((vocabulary.size, 2))
    nearest = matched_genes(genes_g, np.array([0, 30]), none_t, controls=3)
    assert sorted(nearest[0].tolist()) == [1, 2, 3]
    assert sorted(nearest[1].tolist()) == [29, 31, 32]
    far_t = none_t.copy()
    far_t[genes_g[[29, 31, 32]], 1] = 100.0
    assert not {29, 31, 32} & set(matched_genes(genes_g, np.array([30]), far_t, controls=5)[0].tolist())
    listed = np.arange(48)
    short = matched_genes(genes_g, listed, none_t, controls=3)
    assert set(short[:, :2].ravel().tolist()) == {48, 49}
    assert (short[:, 2] == -1).all()
    assert (matched_genes(genes_g, np.arange(50), none_t, controls=3) == -1).all()


def test_features_follow_median_and_detection_rate() -> None:
    vocabulary = tiny_vocabulary(framed=False)
    cells_t = np.zeros(vocabulary.size)
    cells_t[vocabulary.token_ids[:10]] = 50
    features_tf = gene_features(vocabulary, cells_t, 100)
    medians = np.log(vocabulary.medians)
    np.testing.assert_allclose(features_tf[vocabulary.token_ids, 0], medians / 0.5)
    assert features_tf[vocabulary.token_ids[0], 1] == pytest.approx(np.pi / 4 / 0.1)
    assert np.isfinite(features_tf).all()


def test_lists_are_typed_or_read_and_strangers_are_kept_apart(tmp_path: object, local_store: Store) -> None:
    vocabulary = Vocabulary.build(
        [gene_id(i) for i in range(8)],
        np.ones(8),
        symbols=["AC01.1", *(symbol(i) for i in range(1, 8))],
        window=48,
    )
    (typed,) = named_lists("gene1, AC01.1 ,GENE1", vocabulary, local_store)
    assert typed.name == "genes"
    assert typed.tokens == tuple(sorted({vocabulary.token("GENE1"), vocabulary.token("AC01.1")}))
    with pytest.raises(UnknownGeneError, match="GENE9"):
        named_lists("GENE1,GENE9", vocabulary, local_store)
    path = f"{tmp_path}/lists.json"
    local_store.write(path, b'{"a": ["GENE1", "GENE2", "NOT1"], "b": ["GENE3"]}')
    first, second = named_lists(path, vocabulary, local_store)
    assert (first.name, len(first.tokens), first.outside) == ("a", 2, ("NOT1",))
    assert second.name == "b"
    (only,) = named_lists(f"{path}#:b", vocabulary, local_store)
    assert only.name == "b"
    assert named_lists(" ", vocabulary, local_store) == ()
    with pytest.raises(InputError, match="no gene of 'x'"):
        of_lists({"x": ["NOT1"]}, vocabulary, where="here")
