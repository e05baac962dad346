"""The compiled loops over the stored values of cells; `kernel.rank_rows` and `histograms` are the ways in.

The order is found by a radix sort of two passes on the upper bits of count × (1 / median) in float32, as many as the
range of the cell fills, and an insertion sort on count / median in float64 among those that stand near each other: the
radix only has to come near, the insertion makes it exact, and only a few genes of a cell are divided. A cell that would
keep the insertion busy (many equal values in falling token order) is merge-sorted instead.

Loops that call each other stand in one file: Numba's cache on disk sees a change only of a function's own file.

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
# A number to sort by: how far the bits of the near value are below the greatest, then the place of the gene.
_PLACE_BITS, _DIGIT_BITS = 32, 9
_DIGITS, _PLACE = 1 << _DIGIT_BITS, (1 << _PLACE_BITS) - 1
# Unsigned like the numbers themselves, so that no index looks as if it could be negative.
_LAST_DIGIT, _ONE = np.uint64(_DIGITS - 1), np.uint32(1)
# Count, 1 / median and their product are each rounded to float32: a near value is wrong by at most 3.1 × 2^-24 of
# itself. Neighbouring floats are at least 2^-24 apart, so two values whose bits differ by 7 or more are in their true
# order, and one more is lost to the bits of the place. This holds for medians from 2^-60 to 2^60 (others are 0 here)
# and values from 2^-60 up to infinity: no count behind them is too small for a full float32.
_NEAR, LARGEST_MEDIAN = 8 << _PLACE_BITS, 2.0**60
_LEAST_BITS, _INFINITE_BITS = (127 - 60) << 23, 255 << 23
# Far more than a near order costs, and few enough not to be slower than a merge sort.
_MOVES_PER_GENE = 24


@compiled
def rank_cells(
    indptr_n: Array, indices_z: Array, values_z: Array, most: float, whole: bool, table_g: Array, medians_t:
    Array, near_t: Array, capacity: int, frame: Array, most_stored: int, tokens_t: Array, offsets_n: Array, totals_n:
    Array, n_genes_n: Array, mito_n: Array, cropped_n: Array, content_hash_n: Array, faults_n: Array, counts_by_fate:
    Array, sums: Array,
) -> float:  # fmt: skip
    """Fill the outputs for every cell; sums: zeros, repeated entries, positive values, ones; returns the largest."""
    token_k, count_k = np.empty(most_stored, np.int32), np.empty(most_stored)
    near_k, close_k = np.empty(most_stored, np.float32), np.empty(most_stored // 8 * 8 + 16, np.uint8)
    number_k, spare_k = np.empty(most_stored, np.uint64), np.empty(most_stored, np.uint64)
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
        counts_by_fate += of_fate
        totals_n[n], mito_n[n], n_genes_n[n] = of_cell[0], of_cell[1], genes
        largest = max(largest, of_cell[2])
        zeros = int(of_cell[5])
        sums[0] += zeros
        sums[2] += stop - start - zeros
        sums[3] += int(of_cell[6])
        content_hash_n[n] = _content_hash(token_k, count_k, genes)
        ranked = _near_values(token_k, count_k, genes, near_t, near_k)
        _sort(near_k, token_k, count_k, medians_t, ranked, number_k, spare_k, close_k, low, high)
        cropped_n[n] = ranked > capacity
        at = _write(tokens_t, at, token_k, number_k, min(ranked, capacity), frame)
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
    columns, values, before = indices_z[start:stop], values_z[start:stop], indices_z[max(start - 1, 0) : stop]
    usual, none = values.dtype.type(min(most, _USUAL)), values.dtype.type(0)
    units, ones, odd, falls, largest = np.int64(0), np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    # One loop, because the memory delivers two streams at a time faster than one after the other.
    for z in range(values.size):
        fits = (values[z] > none) & (values[z] <= usual)
        value = values[z] if fits else none
        unit = np.int32(value)
        odd |= np.int32(not fits) | np.int32(values.dtype.type(unit) != value)
        falls += np.int32(columns[z] <= before[z])
        units += unit
        ones += np.int32(unit == 1)
        largest = max(largest, unit)
    # Before the first column stands one of another cell. The first cell of all is compared with itself: not rising.
    falls -= np.int32(columns.size > 0 and columns[0] <= before[0])
    if odd or falls or (columns.size and (columns[0] < 0 or columns[-1] >= table_g.size)):
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
def _near_values(token_k: Array, count_k: Array, genes: int, near_t: Array, near_k: Array) -> int:
    """Rank value of every gene with a median, nearly; genes without one are taken out."""
    missing = 0
    for k in range(genes):
        near_k[k] = np.float32(count_k[k]) * near_t[np.uint32(token_k[k])]
        missing |= near_k[k] != near_k[k]
    if not missing:
        return genes
    kept = 0
    for k in range(genes):
        near_k[kept], token_k[kept], count_k[kept] = near_k[k], token_k[k], count_k[k]
        kept += near_k[k] == near_k[k]
    return kept


@compiled
def _sort(
    near_k: Array, token_k: Array, count_k: Array, medians_t: Array, m: int, number_k: Array, spare_k: Array, close_k:
    Array, low: Array, high: Array,
) -> None:  # fmt: skip
    """Leave in number_k the places in falling order, ties by token; or put the tokens in order and count up."""
    in_order = _radix(near_k.view(np.int32), m, number_k, spare_k, low, high)
    if not in_order or not _settle(number_k, close_k, token_k, count_k, medians_t, m):
        _merge_sort(token_k, count_k, medians_t, m)
        for k in range(m):
            number_k[k] = k


@compiled
def _radix(bits_k: Array, m: int, number_k: Array, spare_k: Array, low: Array, high: Array) -> bool:
    """Numbers to sort by, in the order of their digits; False where a near value is too small or infinite."""
    # The bits of positive numbers rise with them.
    smallest, greatest, right = np.int32(_INFINITE_BITS), np.int32(_LEAST_BITS), _PLACE_BITS
    for k in range(m):
        smallest, greatest = min(smallest, bits_k[k]), max(greatest, bits_k[k])
    if smallest < _LEAST_BITS or greatest >= _INFINITE_BITS:
        return False
    while (np.int64(greatest) - smallest) >> (right - _PLACE_BITS) >= _DIGITS * _DIGITS:
        right += 1
    low_digit, high_digit = np.uint64(right), np.uint64(right + _DIGIT_BITS)
    for k in range(m):
        number_k[k] = (np.int64(greatest - bits_k[k]) << _PLACE_BITS) | k
    low[:], high[:] = 0, 0
    for k in range(m):
        low[(number_k[k] >> low_digit) & _LAST_DIGIT] += _ONE
        high[number_k[k] >> high_digit] += _ONE
    of_low, of_high = np.uint32(0), np.uint32(0)
    for digit in range(_DIGITS):
        low[digit], of_low = of_low, of_low + low[digit]
        high[digit], of_high = of_high, of_high + high[digit]
    for k in range(m):
        number = number_k[k]
        digit = (number >> low_digit) & _LAST_DIGIT
        spare_k[low[digit]] = number
        low[digit] += _ONE
    for k in range(m):
        number = spare_k[k]
        digit = number >> high_digit
        number_k[high[digit]] = number
        high[digit] += _ONE
    return True


@compiled
def _settle(number_k: Array, close_k: Array, token_k: Array, count_k: Array, medians_t: Array, m: int) -> bool:
    """Exact order, by insertion of the genes that are close; False when it gave up."""
    signed_k, eight_k = number_k.view(np.int64), close_k.view(np.uint64)
    moved, moves = False, _MOVES_PER_GENE * m + 4096
    close_k[0], close_k[m : m + 8] = 0, 0
    for k in range(1, m):
        close_k[k] = signed_k[k] - signed_k[k - 1] <= _NEAR
    # Eight at a time, because few are close. One that moved leaves before the next gene another than was marked.
    for eight in range((m + 7) // 8):
        if eight_k[eight] == 0 and not moved:
            continue
        for k in range(8 * eight, min(8 * eight + 8, m)):
            if not (close_k[k] or moved):
                continue
            number, place = signed_k[k], k
            own = np.uint32(number & _PLACE)
            value, token = count_k[own] / medians_t[np.uint32(token_k[own])], token_k[own]
            while place > 0:
                behind, other = number - signed_k[place - 1], np.uint32(signed_k[place - 1] & _PLACE)
                if behind > _NEAR:
                    break
                if behind >= -_NEAR:
                    before = count_k[other] / medians_t[np.uint32(token_k[other])]
                    if before > value or (before == value and token_k[other] < token):
                        break
                signed_k[place] = signed_k[place - 1]
                place -= 1
            signed_k[place] = number
            moved, moves = place < k, moves - (k - place)
        if moves < 0:
            return False
    return True


@compiled
def _merge_sort(token_k: Array, count_k: Array, medians_t: Array, m: int) -> None:
    """The same order, of the tokens themselves, whatever the input: never more than m log m steps."""
    value_k, spare_k, spare_token_k, width = np.empty(m), np.empty(m), np.empty(m, np.int32), 1
    for k in range(m):
        value_k[k] = count_k[k] / medians_t[token_k[k]]
    while width < m:
        for start in range(0, m, 2 * width):
            left, middle = start, min(start + width, m)
            right, stop = middle, min(start + 2 * width, m)
            for place in range(start, stop):
                from_left = left < middle and (
                    right >= stop
                    or value_k[left] > value_k[right]
                    or (value_k[left] == value_k[right] and token_k[left] < token_k[right])
                )
                source = left if from_left else right
                spare_k[place], spare_token_k[place] = value_k[source], token_k[source]
                left, right = left + from_left, right + (not from_left)
        value_k[:] = spare_k
        token_k[:m] = spare_token_k
        width *= 2


@compiled
def _write(tokens_t: Array, at: int, token_k: Array, number_k: Array, kept: int, frame: Array) -> int:
    """Write the first tokens of one cell from place `at`, framed where there is a frame; returns the end."""
    first = at + (frame.size > 0)
    into = tokens_t[first : first + kept]
    for k in range(kept):
        into[k] = token_k[number_k[k] & np.uint64(_PLACE)]
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
    """Token and count / library size × target_sum of every gene of the cells taken, good ones; returns how many."""
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
