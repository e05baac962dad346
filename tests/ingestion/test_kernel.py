"""The rank kernel: bit-equal to the reference, whatever the file holds, and never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genescale.ingestion.annotation.genes import FATES, GeneMap
from genescale.ingestion.atlas import Rows
from genescale.ingestion.ranking.kernel import RankedRows, rank_rows
from genescale.platform.errors import AtlasError, InputError, LimitError, NotCountsError
from genescale.platform.rank_value import rank_value_tokens
from genescale.platform.vocabulary import Vocabulary

WHOLE = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
INDICES = ["int32", "int64", "uint16", "uint32", "uint64"]


def vocabulary_of(medians: Any, *, window: int = 4096, framed: bool = True) -> Vocabulary:
    ids = [f"ENSG{i:011d}" for i in range(1, len(medians) + 1)]
    special = ("<pad>", "<mask>", "<cls>", "<eos>") if framed else ("<pad>", "<mask>")
    return Vocabulary.build(ids, np.asarray(medians, dtype=float), window=window, special=special)


def map_of(targets: Any, *, fates: Any = None, counted: Any = None, mito: Any = None) -> GeneMap:
    targets_g = np.asarray(targets, dtype=np.int32)
    fate_g = np.where(targets_g < 0, FATES.index("unknown"), 0) if fates is None else np.asarray(fates)
    return GeneMap(
        column="index",
        targets_g=targets_g,
        fate_g=fate_g.astype(np.uint8),
        counted_g=np.ones(targets_g.size, dtype=bool) if counted is None else np.asarray(counted),
        mito_g=np.zeros(targets_g.size, dtype=bool) if mito is None else np.asarray(mito),
        n_versioned=0,
    )


def rows_of(cells: list[list[tuple[int, float]]], values: str = "float32", indices: str = "int32") -> Rows:
    entries = [entry for cell in cells for entry in cell]
    return Rows(
        np.concatenate(([0], np.cumsum([len(cell) for cell in cells]))).astype(np.int64),
        np.array([gene for gene, _ in entries], dtype=indices),
        np.array([value for _, value in entries], dtype=values),
    )


def expected(cell: list[tuple[int, float]], genes: GeneMap, vocabulary: Vocabulary, window: int | None) -> Any:
    """What the reference makes of one cell, added up gene by gene in plain Python."""
    counts: dict[int, float] = {}
    for gene, value in cell:
        if value > 0 and genes.targets_g[gene] >= 0:
            counts[int(genes.targets_g[gene])] = counts.get(int(genes.targets_g[gene]), 0.0) + float(value)
    return rank_value_tokens(list(counts), list(counts.values()), vocabulary, window=window), counts


def compare(
    found: RankedRows, cells: list[list[tuple[int, float]]], genes: GeneMap, vocabulary: Vocabulary, window: int | None
) -> None:
    for n, cell in enumerate(cells):
        reference, counts = expected(cell, genes, vocabulary, window)
        tokens = found.tokens_t[found.offsets_n[n] : found.offsets_n[n + 1]]
        assert tokens.dtype == reference.input_ids.dtype
        assert tokens.tolist() == reference.input_ids.tolist()
        assert found.cropped_n[n] == reference.cropped
        assert found.n_genes_n[n] == reference.n_genes == len(counts)
        assert found.totals_n[n] == sum(float(value) for gene, value in cell if genes.counted_g[gene])
        assert found.mito_n[n] == sum(float(value) for gene, value in cell if genes.mito_g[gene])
    everything = [(gene, float(value)) for cell in cells for gene, value in cell]
    for code, _ in enumerate(FATES):
        of_fate = sum(value for gene, value in everything if genes.fate_g[gene] == code)
        assert found.counts_by_fate[code] == pytest.approx(of_fate, rel=1e-12)
    assert found.fault is None
    assert found.explicit_zeros == sum(value == 0 for _, value in everything)
    assert found.n_values == sum(value > 0 for _, value in everything)
    assert found.n_ones == sum(value == 1 for _, value in everything)
    assert found.largest_count == max((value for _, value in everything), default=0.0)
    positive = [[gene for gene, value in cell if value > 0] for cell in cells]
    assert found.repeated_entries == sum(len(genes) - len(set(genes)) for genes in positive)


@st.composite
def problems(draw: Any) -> tuple[Any, ...]:
    """Genes with equal and missing medians, shared and missing targets; cells unsorted, repeated, with zeros."""
    n_tokens, n_columns = draw(st.integers(1, 12)), draw(st.integers(1, 16))
    median = st.sampled_from([float("nan"), 0.25, 1.0, 1.0, 1.5, 3.0, 1e-200, 7e5, 2.0**60, 2.0**61, 2.0**-61])
    vocabulary = vocabulary_of(
        draw(st.lists(median, min_size=n_tokens, max_size=n_tokens)),
        window=draw(st.integers(5, 20)),
        framed=draw(st.booleans()),
    )
    first = len(vocabulary.special)
    target = st.one_of(st.just(-1), st.integers(first, first + n_tokens - 1))
    columns = {"min_size": n_columns, "max_size": n_columns}
    genes = map_of(
        draw(st.lists(target, **columns)),
        fates=draw(st.lists(st.integers(0, len(FATES) - 1), **columns)),
        counted=draw(st.lists(st.booleans(), **columns)),
        mito=draw(st.lists(st.booleans(), **columns)),
    )
    values = draw(st.sampled_from(WHOLE))
    most = {"uint8": 255, "int8": 127, "int16": 2**15 - 1, "uint16": 2**16 - 1, "float16": 2048, "float32": 2**24}
    count = st.one_of(st.integers(0, 3), st.integers(0, min(most.get(values, 2**31 - 1), 2**40)))
    cell = st.lists(st.tuples(st.integers(0, n_columns - 1), count), max_size=24)
    cells = draw(st.lists(cell, max_size=5))
    return cells, genes, vocabulary, values, draw(st.sampled_from(INDICES)), draw(st.sampled_from([None, 5, 9]))


@settings(deadline=None, max_examples=200)
@given(problems())
def test_small_cells_are_bit_equal_to_the_reference(problem: tuple[Any, ...]) -> None:
    cells, genes, vocabulary, values, indices, window = problem
    found = rank_rows(rows_of(cells, values, indices), genes, vocabulary, window=window)
    compare(found, cells, genes, vocabulary, window)


MEDIANS = {
    "different": lambda rng, n: rng.lognormal(0.0, 1.0, n),
    "all equal": lambda _, n: np.ones(n),
    "three values": lambda rng, n: rng.choice([0.5, 1.0, 2.0], n),
    "some missing": lambda rng, n: np.where(rng.random(n) < 0.2, np.nan, rng.lognormal(0.0, 1.0, n)),
    "neighbouring numbers": lambda rng, n: 1.0 + rng.integers(0, 40, n) * np.finfo(float).eps,
    "neighbouring floats": lambda rng, n: 1.0 + rng.integers(-40, 40, n) * 2.0**-24,
    "powers of two": lambda rng, n: 2.0 ** rng.integers(-9, 9, n) * (1.0 + rng.integers(-2, 3, n) * 2.0**-24),
    "at the borders": lambda rng, n: 2.0 ** rng.choice([-61, -60, -59, 0, 59, 60, 61], n) * rng.uniform(0.99, 1.01, n),
    "inside the borders": lambda rng, n: 2.0 ** rng.uniform(-60, 60, n),
    "far apart": lambda rng, n: 10.0 ** rng.uniform(-250, 250, n),
}
TARGETS = {
    "in order": lambda _, n: np.arange(n),
    "falling": lambda _, n: np.arange(n)[::-1],
    "shuffled": lambda rng, n: rng.permutation(n),
    "shared and missing": lambda rng, n: rng.integers(-n // 4, n, n).clip(-5),
}
COUNTS = {
    "ones": lambda rng, n: np.ones(n),
    "like cells": lambda rng, n: rng.poisson(rng.lognormal(0.0, 1.5, n)),
    "huge": lambda rng, n: rng.integers(1, 2**53, n),
    "one giant": lambda rng, n: np.where(np.arange(n) == n // 2, 2.0**52, 1.0),
    "fractions": lambda rng, n: rng.lognormal(0.0, 1.5, n),
    "tiny fractions": lambda rng, n: 10.0 ** rng.uniform(-320, 15, n),
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("medians", MEDIANS)
def test_large_cells_are_bit_equal_to_the_reference(medians: str, targets: str, counts: str) -> None:
    """Cells of 1 to 3,000 genes: radix sort, insertion, and the way out where insertion would take for ever."""
    rng, n_genes = np.random.default_rng([len(medians), len(targets), len(counts)]), 3_000
    vocabulary = vocabulary_of(MEDIANS[medians](rng, n_genes), window=2_048)
    targets_g = TARGETS[targets](rng, n_genes)
    genes = map_of(np.where(targets_g < 0, -1, targets_g + len(vocabulary.special)))
    cells = []
    for size in (1, 2, 47, 48, 49, 50, 700, n_genes):
        chosen = np.sort(rng.choice(n_genes, size, replace=False))
        values = COUNTS[counts](rng, size)
        cells.append([(int(gene), float(value)) for gene, value in zip(chosen, values, strict=True)])
    found = rank_rows(rows_of(cells, "float64"), genes, vocabulary, allow_fractional=True)
    for n, cell in enumerate(cells):
        reference, _ = expected(cell, genes, vocabulary, None)
        tokens = found.tokens_t[found.offsets_n[n] : found.offsets_n[n + 1]]
        assert tokens.tolist() == reference.input_ids.tolist(), f"{len(cell)} genes"


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 2**32), st.integers(-52, -16), st.sampled_from([-45, 0, 45]), st.sampled_from([1, 9, 1e6, 2**53]))
def test_genes_whose_values_nearly_meet_are_in_exact_order(seed: int, apart: int, scale: int, most: float) -> None:
    """Clusters of different counts whose quotients lie 2^`apart` of themselves apart: below float32, and around it."""
    rng, n_genes = np.random.default_rng(seed), 400
    counts = np.floor(rng.uniform(1, most, n_genes)) if most > 9 else rng.uniform(0.01, most, n_genes)
    values = np.repeat(rng.lognormal(0.0, 2.0, n_genes // 8), 8) * (1.0 + rng.integers(-4, 5, n_genes) * 2.0**apart)
    medians = np.where(rng.random(n_genes) < 0.05, np.nan, counts / (values * 2.0**scale))
    vocabulary = vocabulary_of(medians)
    genes = map_of(rng.permutation(n_genes) + len(vocabulary.special))
    # Each column's count is the one that its target's median was made for; the second cell has the columns turned.
    cell = [(g, float(counts[genes.targets_g[g] - len(vocabulary.special)])) for g in range(n_genes)]
    found = rank_rows(rows_of([cell, cell[::-1], cell], "float64"), genes, vocabulary, allow_fractional=True)
    reference, _ = expected(cell, genes, vocabulary, None)
    for n in range(3):
        tokens = found.tokens_t[found.offsets_n[n] : found.offsets_n[n + 1]]
        assert tokens.tolist() == reference.input_ids.tolist()


def test_large_cells_without_a_limit_to_their_genes() -> None:
    """Beyond 14 and 16 bits of place, none of them cropped."""
    rng, n_genes = np.random.default_rng(5), 70_000
    vocabulary = vocabulary_of(rng.lognormal(0.0, 1.0, n_genes).round(2) + 0.01, window=75_000)
    genes = map_of(rng.permutation(n_genes) + len(vocabulary.special))
    cells = []
    for size in (16_384, 16_385, 65_536, 65_537, n_genes):
        chosen = np.sort(rng.choice(n_genes, size, replace=False))
        values = rng.poisson(2.0, size) + 1
        cells.append([(int(gene), float(value)) for gene, value in zip(chosen, values, strict=True)])
    found = rank_rows(rows_of(cells), genes, vocabulary)
    for n, cell in enumerate(cells):
        reference, _ = expected(cell, genes, vocabulary, None)
        tokens = found.tokens_t[found.offsets_n[n] : found.offsets_n[n + 1]]
        assert np.array_equal(tokens, reference.input_ids), f"{len(cell)} genes"


def test_equal_values_in_falling_token_order_take_no_longer_than_sorting() -> None:
    """Insertion alone needs 2·10^8 moves for such a cell; a hundred of them would take a minute."""
    import time

    n_genes = 20_000
    vocabulary = vocabulary_of(np.ones(n_genes))
    genes = map_of(np.arange(n_genes)[::-1] + 4)
    cell = Rows(
        np.arange(101) * n_genes, np.tile(np.arange(n_genes, dtype=np.int32), 100), np.ones(100 * n_genes, "f4")
    )
    rank_rows(rows_of([[(0, 1.0)]]), genes, vocabulary)
    began = time.process_time()
    found = rank_rows(cell, genes, vocabulary)
    assert time.process_time() - began < 10
    assert found.tokens_t[1:5].tolist() == [4, 5, 6, 7]


def test_the_content_hash_knows_counts_and_not_their_order() -> None:
    vocabulary = vocabulary_of([1.0, 2.0, 3.0, 4.0, 5.0])
    genes = map_of([4, 5, 6, 7, -1, 4])
    same = [
        [(0, 3), (1, 2), (2, 1)],
        [(2, 1), (0, 3), (1, 2)],
        [(0, 1), (1, 2), (2, 1), (5, 2)],  # a second column of the same gene
        [(0, 1), (0, 2), (1, 2), (2, 1), (3, 0)],
        [(0, 3), (1, 2), (2, 1), (4, 9)],  # a gene that no vocabulary knows
    ]
    others = [[(0, 3), (1, 2)], [(0, 2), (1, 3), (2, 1)], [(0, 3), (1, 2), (3, 1)], [(0, 6), (1, 4), (2, 2)], []]
    hashes = rank_rows(rows_of([*same, *others]), genes, vocabulary).content_hash_n
    assert len(set(hashes[: len(same)].tolist())) == 1
    assert len(set(hashes[len(same) - 1 :].tolist())) == 1 + len(others)
    again = rank_rows(rows_of([*same, *others], "int64", "int64"), genes, vocabulary).content_hash_n
    assert again.tolist() == hashes.tolist(), "the type in the file does not matter"


def test_content_hashes_of_many_cells_differ() -> None:
    """Single changes of many similar cells: a weak mix would let sums meet."""
    vocabulary, cells = vocabulary_of(np.ones(200)), []
    for gene in range(200):
        cells += [[(g, 1 + (g == gene) * more) for g in range(200)] for more in range(1, 6)]
    hashes = rank_rows(rows_of(cells), map_of(np.arange(200) + 4), vocabulary).content_hash_n
    assert len(set(hashes.tolist())) == len(cells)


@pytest.mark.parametrize(
    ("value", "dtype", "kind"),
    [
        (np.nan, "float32", "not_finite"),
        (np.inf, "float64", "not_finite"),
        (-np.inf, "float64", "not_finite"),
        (-1, "float32", "negative"),
        (-1, "int8", "negative"),
        (-(2**62), "int64", "negative"),
        (0.5, "float32", "fractional"),
        (1e-320, "float64", "fractional"),
        (2**24 + 2, "float32", "too_large"),
        (2050, "float16", "too_large"),
        (2**53 + 1, "int64", "too_large"),
        (2**63, "uint64", "too_large"),
        (2**64 - 1, "uint64", "too_large"),
        (2.0**54, "float64", "too_large"),
    ],
)
def test_a_value_that_is_no_count_marks_its_cell_alone(value: Any, dtype: str, kind: str) -> None:
    vocabulary, genes = vocabulary_of([1.0, 2.0, 3.0]), map_of([4, 5, 6])
    good, bad = [(0, 1), (2, 3)], [(0, 5), (1, value), (2, 1)]
    found = rank_rows(rows_of([good, bad, good], dtype), genes, vocabulary)
    alone = rank_rows(rows_of([good, good], dtype), genes, vocabulary)
    assert found.fault == kind
    assert (found.faults_n > 0).tolist() == [False, True, False]
    assert found.tokens_t.tolist() == alone.tokens_t.tolist()
    assert np.diff(found.offsets_n).tolist() == [4, 0, 4]
    assert found.totals_n.tolist() == [4, 0, 4]
    assert found.counts_by_fate.tolist() == alone.counts_by_fate.tolist()
    assert found.largest_count == 3


def test_fractions_pass_only_when_asked_for() -> None:
    vocabulary, genes = vocabulary_of([1.0, 2.0]), map_of([4, 5])
    rows = rows_of([[(0, 0.5), (1, 1.25)]])
    assert rank_rows(rows, genes, vocabulary).fault == "fractional"
    assert rank_rows(rows, genes, vocabulary, allow_fractional=True).fault is None
    assert rank_rows(rows_of([[(0, -0.5)]]), genes, vocabulary, allow_fractional=True).fault == "negative"


@pytest.mark.parametrize(
    ("index", "dtype"),
    [(3, "int32"), (-1, "int32"), (2**31 - 1, "int32"), (2**40, "int64"), (-(2**63), "int64"), (2**64 - 1, "uint64")],
)
def test_a_gene_index_out_of_range_is_a_fault(index: int, dtype: str) -> None:
    genes, vocabulary = map_of([4, 5, 6]), vocabulary_of([1.0, 2.0, 3.0])
    found = rank_rows(rows_of([[(0, 1)], [(index, 1)]], indices=dtype), genes, vocabulary)
    assert (found.fault, found.faults_n.tolist()) == ("index", [0, 1])


@pytest.mark.parametrize("indptr", [[0, 2], [1, 3], [0, 5, 3], [0, 4], [0, -1, 3], [], [3]])
def test_pointers_that_do_not_fit_are_refused(indptr: list[int]) -> None:
    rows = Rows(np.array(indptr, dtype=np.int64), np.zeros(3, np.int32), np.ones(3, np.float32))
    with pytest.raises(AtlasError, match="do not belong together"):
        rank_rows(rows, map_of([4]), vocabulary_of([1.0]))


@pytest.mark.parametrize("dtype", ["bool", "complex64", "U3"])
def test_values_that_are_no_numbers_are_refused(dtype: str) -> None:
    rows = Rows(np.array([0, 1]), np.zeros(1, np.int32), np.ones(1).astype(dtype))
    with pytest.raises(NotCountsError, match="no counts"):
        rank_rows(rows, map_of([4]), vocabulary_of([1.0]))


def test_a_map_of_another_vocabulary_is_refused() -> None:
    rows, vocabulary = rows_of([[(0, 1)]]), vocabulary_of([1.0])
    for targets, said in (([5], "outside"), ([-2], "outside"), ([0], "special token")):
        with pytest.raises(InputError, match=said):
            rank_rows(rows, map_of(targets), vocabulary)
    with pytest.raises(InputError, match="fate"):
        rank_rows(rows, map_of([4], fates=[len(FATES)]), vocabulary)
    with pytest.raises(LimitError, match="holds no gene"):
        rank_rows(rows, map_of([4]), vocabulary, window=2)


def test_big_endian_values_are_read_as_they_are() -> None:
    cells = [[(0, 3), (1, 200), (2, 1)]]
    genes, vocabulary = map_of([4, 5, 6]), vocabulary_of([1.0, 2.0, 3.0])
    for values, indices in ((">f4", ">i4"), (">i8", ">i8"), (">u2", ">u4")):
        compare(rank_rows(rows_of(cells, values, indices), genes, vocabulary), cells, genes, vocabulary, None)


def test_no_cells_and_no_genes() -> None:
    vocabulary = vocabulary_of([1.0])
    assert rank_rows(rows_of([]), map_of([4]), vocabulary).offsets_n.tolist() == [0]
    found = rank_rows(Rows(np.array([0, 0]), np.empty(0, np.int32), np.empty(0, np.float32)), map_of([]), vocabulary)
    assert found.tokens_t.tolist() == [vocabulary.cls, vocabulary.eos]


def test_it_compiles_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """As in a read-only image without a home: Numba finds no place for code that stands in no file either."""
    code = "from genescale.ingestion.ranking.compiled import compiled\nprint(compiled(lambda a: a + 1)(41))\n"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path,
                         env={**os.environ, "HOME": "/nonexistent"}, timeout=120)  # fmt: skip
    assert run.stdout.strip() == "42", run.stderr
