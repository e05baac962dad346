"""The compiled loops over the stored values of cells; `kernel.rank_rows` and `histograms` are the ways in.

The order is found by a radix sort of two passes on the upper bits of the value, as many as the range of the cell fills,
and an insertion sort on the whole values among those whose upper bits are equal: the radix only has to come near, the
insertion makes it exact. A cell that would keep the insertion busy (many equal values in falling token order) is
merge-sorted instead.

All loops that call each other stand in this one file, because Numba's cache on disk sees a change only of the
file that a function stands in.

Axis suffixes: `n` cells, `g` genes of the file, `z` stored values, `k` genes of one cell, `t` tokens (of the
vocabulary, or of all cells one after the other).
"""

# mypy: disable-error-code="assignment, return-value"
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from genescale.ingestion.ranking.compiled import compiled

Array = npt.NDArray[Any]

# Codes of kernel.FAULTS.
_INDEX, _NOT_FINITE, _NEGATIVE, _FRACTIONAL, _TOO_LARGE = range(1, 6)
# What a gene column is, in one number, so that a value costs one look-up: target + 1, then flags, then fate.
FATE_BITS, COUNTED, MITO, SHARED, TARGET_SHIFT = 0xF, 1 << 4, 1 << 5, 1 << 6, 8
_FLAGS = FATE_BITS | COUNTED | MITO | SHARED
_USUAL = 1 << 30
# A number to sort by has 32 bits: two digits of nine bits, the upper bits of the value, and the place of the gene.
_PLACE_BITS, _DIGIT_BITS = 14, 9
_MOST_PLACES, _DIGITS = 1 << _PLACE_BITS, 1 << _DIGIT_BITS
# Unsigned like the numbers themselves, so that no index looks as if it could be negative.
_PLACE, _WHOLE, _LAST_DIGIT = np.uint32(_MOST_PLACES - 1), np.uint32(0xFFFFFFFF), np.uint32(_DIGITS - 1)
_LOW_DIGIT, _HIGH_DIGIT, _ONE = np.uint32(_PLACE_BITS), np.uint32(_PLACE_BITS + _DIGIT_BITS), np.uint32(1)
# Far more than a near order costs, and few enough not to be slower than a merge sort.
_MOVES_PER_GENE = 24


@compiled
def rank_cells(
    indptr_n: Array, indices_z: Array, values_z: Array, most: float, whole: bool, table_g: Array, medians_t:
    Array, capacity: int, frame: Array, most_stored: int, tokens_t: Array, offsets_n: Array, totals_n: Array,
    n_genes_n: Array, mito_n: Array, cropped_n: Array, content_hash_n: Array, faults_n: Array, counts_by_fate:
    Array, sums: Array,
) -> float:  # fmt: skip
    """Fill the outputs for every cell; sums: zeros, repeated entries, positive values, ones; returns the largest."""
    token_k, count_k = np.empty(most_stored, np.int32), np.empty(most_stored)
    bits_k, number_k = np.empty(most_stored, np.int64), np.empty(most_stored, np.uint32)
    spare_k = np.empty(most_stored, np.uint32)
    slot_t, owner_t = np.empty(medians_t.size, np.int32), np.full(medians_t.size, -1, np.int64)
    owner_g = np.full(table_g.size, -1, np.int64)
    low, high = np.empty(_DIGITS, np.uint32), np.empty(_DIGITS, np.uint32)
    of_fate, of_cell = np.empty(counts_by_fate.size), np.empty(7)
    largest, at = 0.0, 0
    for n in range(indptr_n.size - 1):
        start, stop = indptr_n[n], indptr_n[n + 1]
        fault = _sweep(indices_z, values_z, start, stop, most, whole, table_g, token_k, count_k, of_fate, of_cell)
        if fault:
            faults_n[n] = fault
            offsets_n[n + 1] = at
            continue
        genes, unsorted = int(of_cell[3]), of_cell[4]
        if unsorted != 0.0:
            if unsorted >= 2.0:
                sums[1] += _repeats(indices_z, values_z, start, stop, owner_g, n)
            genes = _combine(token_k, count_k, genes, slot_t, owner_t, n)
        for fate in range(counts_by_fate.size):
            counts_by_fate[fate] += of_fate[fate]
        totals_n[n], mito_n[n], n_genes_n[n] = of_cell[0], of_cell[1], genes
        largest = max(largest, of_cell[2])
        zeros = int(of_cell[5])
        sums[0] += zeros
        sums[2] += stop - start - zeros
        sums[3] += int(of_cell[6])
        content_hash_n[n] = _content_hash(token_k, count_k, genes)
        ranked = _keys(token_k, count_k, genes, medians_t, bits_k)
        mask = _sort(bits_k, token_k, ranked, number_k, spare_k, low, high)
        cropped_n[n] = ranked > capacity
        at = _write(tokens_t, at, token_k, number_k, mask, min(ranked, capacity), frame)
        offsets_n[n + 1] = at
    return largest


@compiled
def _sweep(
    indices_z: Array, values_z: Array, start: int, stop: int, most: float, whole: bool, table_g: Array, token_k:
    Array, count_k: Array, of_fate: Array, of_cell: Array,
) -> int:  # fmt: skip
    """Prove the values of one cell and collect its vocabulary genes; returns a code of FAULTS.

    of_cell: library size, mitochondrial counts, largest value, genes collected, 1 when targets are shared (+ 2 when
    columns are not in rising order), explicit zeros, ones. of_fate: counts by fate.

    The usual cell (genes in rising order, whole numbers, none of them zero or beyond a billion) is looked at in loops
    that become vector instructions; whole numbers of that size add up exactly in any order.
    """
    # Slices, because an index that may be negative keeps a loop from becoming vector instructions.
    columns, values = indices_z[start:stop], values_z[start:stop]
    usual, none = values.dtype.type(min(most, _USUAL)), values.dtype.type(0)
    units, ones, odd, largest = np.int64(0), np.int32(0), np.int32(0), np.int32(0)
    for z in range(values.size):
        fits = (values[z] > none) & (values[z] <= usual)
        value = values[z] if fits else none
        unit = np.int32(value)
        odd |= np.int32(not fits) | np.int32(values.dtype.type(unit) != value)
        units += unit
        ones += np.int32(unit == 1)
        largest = max(largest, unit)
    before = columns[:-1]
    for z in range(before.size):
        odd |= np.int32(columns[z + 1] <= before[z])
    if odd or (columns.size and (columns[0] < 0 or columns[-1] >= table_g.size)):
        return _sweep_any(indices_z, values_z, start, stop, most, whole, table_g, token_k, count_k, of_fate, of_cell)
    of_fate[:] = 0.0
    mito, uncounted, elsewhere, shared, genes = 0.0, 0.0, 0.0, 0, np.uint32(0)
    for z in range(columns.size):
        gene, value = table_g[np.uint32(columns[z])], np.float64(values[z])
        # Written always, kept only where the column has a target: cheaper than a branch that is hard to foresee.
        token_k[genes], count_k[genes] = (gene >> TARGET_SHIFT) - 1, value
        genes += np.uint32(gene >> TARGET_SHIFT > 0)
        if gene & _FLAGS != COUNTED:
            shared |= gene & SHARED
            if not gene & COUNTED:
                uncounted += value
            if gene & MITO:
                mito += value
            if gene & FATE_BITS:
                of_fate[gene & FATE_BITS] += value
                elsewhere += value
    of_fate[0] = units - elsewhere
    of_cell[0], of_cell[1], of_cell[2], of_cell[3] = units - uncounted, mito, largest, genes
    of_cell[4], of_cell[5], of_cell[6] = (1.0 if shared else 0.0), 0.0, ones
    return 0


@compiled
def _sweep_any(
    indices_z: Array, values_z: Array, start: int, stop: int, most: float, whole: bool, table_g: Array, token_k:
    Array, count_k: Array, of_fate: Array, of_cell: Array,
) -> int:  # fmt: skip
    """As `_sweep`, for any cell: value by value."""
    total, mito, largest, mapped, genes, zeros, ones = 0.0, 0.0, 0.0, 0.0, 0, 0, 0
    shared, before, falls = 0, -1, False
    of_fate[:] = 0.0
    for z in range(start, stop):
        column, value = np.int64(indices_z[z]), np.float64(values_z[z])
        if column < 0 or column >= table_g.size:
            return _INDEX
        if not (value >= 0.0 and value <= most):
            return _NEGATIVE if -np.inf < value < 0.0 else _TOO_LARGE if most < value < np.inf else _NOT_FINITE
        if whole and value != np.floor(value):
            return _FRACTIONAL
        falls |= column <= before
        before = column
        if value == 0.0:
            zeros += 1
            continue
        ones += value == 1.0
        gene = table_g[column]
        if gene & COUNTED:
            total += value
        if gene & MITO:
            mito += value
        if gene & FATE_BITS:
            of_fate[gene & FATE_BITS] += value
        else:
            mapped += value
        largest = max(largest, value)
        shared |= gene & SHARED
        # Written always, kept only where the column has a target: cheaper than a branch that is hard to foresee.
        token_k[genes], count_k[genes] = (gene >> TARGET_SHIFT) - 1, value
        genes += gene >> TARGET_SHIFT > 0
    of_fate[0] = mapped
    of_cell[0], of_cell[1], of_cell[2], of_cell[3], of_cell[5] = total, mito, largest, genes, zeros
    of_cell[4], of_cell[6] = (1.0 if shared else 0.0) + (2.0 if falls else 0.0), ones
    return 0


@compiled
def _repeats(indices_z: Array, values_z: Array, start: int, stop: int, owner_g: Array, n: int) -> int:
    """Positive values of the cell that stand at a gene column which has one already."""
    repeated = 0
    for z in range(start, stop):
        repeated += values_z[z] != 0 and owner_g[indices_z[z]] == n
        owner_g[indices_z[z]] = n if values_z[z] != 0 else owner_g[indices_z[z]]
    return repeated


@compiled
def _combine(token_k: Array, count_k: Array, genes: int, slot_t: Array, owner_t: Array, n: int) -> int:
    """Sum the counts of equal tokens in place; returns how many tokens are left."""
    kept = 0
    for k in range(genes):
        token = token_k[k]
        if owner_t[token] == n:
            count_k[slot_t[token]] += count_k[k]
        else:
            owner_t[token], slot_t[token] = n, kept
            token_k[kept], count_k[kept] = token, count_k[k]
            kept += 1
    return kept


@compiled
def _content_hash(token_k: Array, count_k: Array, genes: int) -> int:
    """Sum of one well-mixed number per (token, count): the order of the genes does not matter."""
    bits_k, total = count_k.view(np.uint64), np.uint64(genes)
    for k in range(genes):
        mixed = bits_k[k] ^ (np.uint64(token_k[k] + 1) * np.uint64(0x9E3779B97F4A7C15))
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        total += mixed ^ (mixed >> np.uint64(32))
    return np.int64(total)


@compiled
def _keys(token_k: Array, count_k: Array, genes: int, medians_t: Array, bits_k: Array) -> int:
    """Rank value of every gene with a median, as bits that rise with it; genes without one are taken out."""
    value_k, missing = bits_k.view(np.float64), 0
    for k in range(genes):
        value = count_k[k] / medians_t[np.uint32(token_k[k])]
        value_k[k] = value
        missing |= value != value
    if not missing:
        return genes
    kept = 0
    for k in range(genes):
        value_k[kept], token_k[kept] = value_k[k], token_k[k]
        kept += value_k[k] == value_k[k]
    return kept


@compiled
def _sort(bits_k: Array, token_k: Array, m: int, number_k: Array, spare_k: Array, low: Array, high: Array) -> int:
    """Leave in number_k the places of the genes in the order of falling bits, ties by token; returns their mask.

    When the radix is of no use, the tokens themselves are put in order, and number_k counts up.
    """
    moves = -1
    if m <= _MOST_PLACES:
        _radix(bits_k, m, number_k, spare_k, low, high)
        moves = _settle(number_k, bits_k, token_k, m, _MOVES_PER_GENE * m + 4096)
    if moves < 0:
        _merge_sort(bits_k, token_k, m)
        for k in range(m):
            number_k[k] = k
        return _WHOLE
    return _PLACE


@compiled
def _radix(bits_k: Array, m: int, number_k: Array, spare_k: Array, low: Array, high: Array) -> None:
    """Numbers to sort by, in the order of their digits."""
    if m == 0:
        return
    smallest, greatest, right = bits_k[0], bits_k[0], 0
    for k in range(m):
        smallest, greatest = min(smallest, bits_k[k]), max(greatest, bits_k[k])
    while (greatest - smallest) >> right >= _DIGITS * _DIGITS:
        right += 1
    for k in range(m):
        number_k[k] = (((greatest - bits_k[k]) >> right) << _PLACE_BITS) | k
    low[:] = 0
    high[:] = 0
    for k in range(m):
        low[(number_k[k] >> _LOW_DIGIT) & _LAST_DIGIT] += _ONE
        high[number_k[k] >> _HIGH_DIGIT] += _ONE
    of_low, of_high = 0, 0
    for digit in range(_DIGITS):
        low[digit], of_low = of_low, of_low + low[digit]
        high[digit], of_high = of_high, of_high + high[digit]
    for k in range(m):
        number = number_k[k]
        digit = (number >> _LOW_DIGIT) & _LAST_DIGIT
        spare_k[low[digit]] = number
        low[digit] += _ONE
    for k in range(m):
        number = spare_k[k]
        digit = number >> _HIGH_DIGIT
        number_k[high[digit]] = number
        high[digit] += _ONE


@compiled
def _settle(number_k: Array, bits_k: Array, token_k: Array, m: int, moves: int) -> int:
    """Exact order among genes whose digits are equal; returns the moves left, fewer than 0 when it gave up."""
    if m == 0:
        return moves
    before = number_k[0] >> _LOW_DIGIT
    for k in range(1, m):
        number = number_k[k]
        if number >> _LOW_DIGIT != before:
            before = number >> _LOW_DIGIT
            continue
        place, bits, token = k, bits_k[number & _PLACE], token_k[number & _PLACE]
        while place > 0 and number_k[place - 1] >> _LOW_DIGIT == before:
            other = number_k[place - 1] & _PLACE
            if bits_k[other] > bits or (bits_k[other] == bits and token_k[other] < token):
                break
            number_k[place] = number_k[place - 1]
            place -= 1
        number_k[place] = number
        moves -= k - place
        if moves < 0:
            break
    return moves


@compiled
def _merge_sort(bits_k: Array, token_k: Array, m: int) -> None:
    """The same order of bits and tokens themselves, whatever the input: never more than m log m steps."""
    spare_k, spare_token_k, width = np.empty(m, np.int64), np.empty(m, np.int32), 1
    while width < m:
        for start in range(0, m, 2 * width):
            left, middle = start, min(start + width, m)
            right, stop = middle, min(start + 2 * width, m)
            for place in range(start, stop):
                from_left = left < middle and (
                    right >= stop
                    or bits_k[left] > bits_k[right]
                    or (bits_k[left] == bits_k[right] and token_k[left] < token_k[right])
                )
                source = left if from_left else right
                spare_k[place], spare_token_k[place] = bits_k[source], token_k[source]
                left, right = left + from_left, right + (not from_left)
        bits_k[:m] = spare_k
        token_k[:m] = spare_token_k
        width *= 2


@compiled
def _write(tokens_t: Array, at: int, token_k: Array, number_k: Array, mask: int, kept: int, frame: Array) -> int:
    """Write the first tokens of one cell from place `at`, framed where there is a frame; returns the end."""
    first = at + (frame.size > 0)
    into = tokens_t[first : first + kept]
    for k in range(kept):
        into[k] = token_k[number_k[k] & mask]
    if frame.size:
        tokens_t[at], tokens_t[first + kept] = frame[0], frame[1]
    return first + kept + (frame.size > 0)


@compiled
def sweep_cells(
    indptr_n: Array, indices_z: Array, values_z: Array, most: float, whole: bool, table_g: Array, n_tokens: int,
    totals_n: Array, n_genes_n: Array, mito_n: Array, faults_n: Array,
) -> None:  # fmt: skip
    """What the counts of each cell say of it, without ranking: library size, detected genes, mitochondrial counts."""
    longest = (indptr_n[1:] - indptr_n[:-1]).max() if indptr_n.size > 1 else 0
    token_k, count_k, of_fate, of_cell = np.empty(longest, np.int32), np.empty(longest), np.empty(16), np.empty(7)
    slot_t, owner_t = np.empty(n_tokens, np.int32), np.full(n_tokens, -1, np.int64)
    for n in range(indptr_n.size - 1):
        start, stop = indptr_n[n], indptr_n[n + 1]
        faults_n[n] = _sweep(indices_z, values_z, start, stop, most, whole, table_g, token_k, count_k, of_fate, of_cell)
        if not faults_n[n]:
            genes = int(of_cell[3])
            if of_cell[4] != 0.0:
                genes = _combine(token_k, count_k, genes, slot_t, owner_t, n)
            totals_n[n], mito_n[n], n_genes_n[n] = of_cell[0], of_cell[1], genes


@compiled
def normalise_cells(
    indptr_n: Array, indices_z: Array, values_z: Array, table_g: Array, n_tokens: int, totals_n: Array, taken_n:
    Array, target_sum: float, tokens_v: Array, values_v: Array,
) -> int:  # fmt: skip
    """Token and count / library size × target_sum of every gene of the cells that are taken; returns how many.

    All of these cells are good ones, as `sweep_cells` found before.
    """
    longest = (indptr_n[1:] - indptr_n[:-1]).max() if indptr_n.size > 1 else 0
    token_k, count_k, of_fate, of_cell = np.empty(longest, np.int32), np.empty(longest), np.empty(16), np.empty(7)
    slot_t, owner_t, at = np.empty(n_tokens, np.int32), np.full(n_tokens, -1, np.int64), 0
    for n in range(indptr_n.size - 1):
        if taken_n[n]:
            start, stop = indptr_n[n], indptr_n[n + 1]
            _sweep(indices_z, values_z, start, stop, np.inf, False, table_g, token_k, count_k, of_fate, of_cell)
            genes = int(of_cell[3])
            if of_cell[4] != 0.0:
                genes = _combine(token_k, count_k, genes, slot_t, owner_t, n)
            for k in range(genes):
                tokens_v[at + k], values_v[at + k] = token_k[k], count_k[k] / totals_n[n] * target_sum
            at += genes
    return at
