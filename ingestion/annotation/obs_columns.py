"""The harmonised metadata of cells: taken from obs by name, by mapping, and by the CELLxGENE schema.

Metadata never stops a cell from being read: a value that does not fit its declared type becomes null and is counted in
a note. Columns stay Arrow arrays throughout; each different value is judged once, not each cell.

Axis suffixes: `n` cells of a block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from genescale.ingestion.annotation.species import named_species
from genescale.ingestion.schema import METADATA_COLUMNS, OBS_NAMES, ONTOLOGY_COLUMNS
from genescale.platform.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from genescale.ingestion.atlas import Atlas

BOOLEAN_COLUMN = "is_primary_data"
LABELS = "labels"
TARGETS = (*METADATA_COLUMNS, *ONTOLOGY_COLUMNS, "suspension_type", BOOLEAN_COLUMN)
LONGEST_TEXT = 500
_TRUE = frozenset(("true", "t", "yes", "y", "1", "1.0", "primary", "both", "pass"))
_FALSE = frozenset(("false", "f", "no", "n", "0", "0.0", "secondary", "fail"))
# What people write where there is nothing.
_MISSING = frozenset(("", "nan", "na", "n/a", "none", "null", "<na>"))
# One term or several (`MONDO:1 || MONDO:2`), a cell line, a term with a remark, or the schema's words for no term.
_TERMS = re.compile(
    r"(?:[A-Za-z][A-Za-z_]*:[A-Za-z0-9_.-]+|CVCL_[A-Z0-9]+)(?: \([^)]*\))?"
    r"(?:\s*(?:\|\||,)\s*[A-Za-z][A-Za-z_]*:[A-Za-z0-9_.-]+)*|unknown|na|multiethnic"
)
_COUNTED_NOTE = re.compile(r"(?P<head>.*: )(?P<count>[0-9,]+)(?P<tail> (?:values|cells) such as '.*)")
# Names under which pipelines store a cell's library size.
LIBRARY_SIZE_COLUMNS = ("n_counts", "total_counts", "nCount_RNA", "n_umi", "n_umis", "nUMI")
_TOLERATED = 0.01
Judge = Callable[[str], Any]


def harmonised(
    atlas: Atlas, start: int, stop: int, *, mapping: Mapping[str, str] | None = None, keep_obs: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Metadata of the cells start … stop-1 by harmonised name (Arrow arrays of n), and notes on what did not fit.

    mapping: harmonised column -> obs column that fills it; keep_obs: further obs columns, kept as texts in `labels`.
    Columns that the file has no values for are left out. Raises SettingsError for a mapping to an unknown column.
    """
    mapping = check_mapping(mapping or {})
    found: dict[str, Any] = {}
    notes: list[str] = []
    for name in TARGETS:
        column, said = _source(atlas, name, mapping)
        notes += said
        if column is None:
            if (text := _of_file(atlas, name)) is not None:
                found[name] = pa.repeat(pa.scalar(text, pa.string()), stop - start)
            continue
        found[name], said = _read(atlas, column, start, stop, name)
        notes += said
    if keep_obs:
        found[LABELS], said = _labels(atlas, start, stop, keep_obs)
        notes += said
    return found, notes


def check_mapping(mapping: Mapping[str, str]) -> Mapping[str, str]:
    """The mapping itself; SettingsError when it fills a column that a row does not have."""
    for name in mapping:
        if name not in TARGETS:
            raise SettingsError(
                f"a row has no column '{name}' to fill from obs.",
                where="obs",
                fix=did_you_mean(name, TARGETS) or f"Columns: {', '.join(TARGETS)}.",
            )
    return mapping


def filled_from(atlas: Atlas, mapping: Mapping[str, str] | None = None) -> dict[str, str]:
    """Harmonised column -> obs column that fills it, `uns` for a value of the whole file, empty when nothing does."""
    mapping = check_mapping(mapping or {})
    return {name: _source(atlas, name, mapping)[0] or ("uns" if _of_file(atlas, name) else "") for name in TARGETS}


def summed_notes(notes: Iterable[str]) -> list[str]:
    """Notes of many blocks as one list: counts of the same complaint added up, others once, sorted."""
    counts: Counter[str] = Counter()
    tails: dict[str, str] = {}
    others: set[str] = set()
    for note in sorted(notes):
        if match := _COUNTED_NOTE.fullmatch(note):
            counts[match["head"]] += int(match["count"].replace(",", ""))
            tails.setdefault(match["head"], match["tail"])
        else:
            others.add(note)
    return sorted([*others, *(f"{head}{count:,}{tails[head]}" for head, count in counts.items())])


def library_size_notes(atlas: Atlas, start: int, stop: int, totals_n: npt.NDArray[np.float64]) -> list[str]:
    """A note when obs states library sizes that differ by over 1 % from the sums of the counts, in over 1 % of cells.

    totals_n: sums of the cells start … stop-1 over all genes. The sums are used whatever obs says.
    """
    name = next((name for name in LIBRARY_SIZE_COLUMNS if name in atlas.obs.columns), None)
    if name is None:
        return []
    values, _ = atlas.obs.typed(name, start, stop)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return []
    said_n = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    off_n = np.flatnonzero(np.abs(said_n - totals_n) > _TOLERATED * totals_n)
    if off_n.size <= _TOLERATED * len(totals_n):
        return []
    first = int(off_n[0])
    example = f"{said_n[first]:g}' for a sum of {totals_n[first]:g}"
    head = f"obs['{name}'] differs by more than 1 % from the sums over all genes, which are used"
    return [f"{head}: {off_n.size:,} cells such as '{example}"]


def _source(atlas: Atlas, name: str, mapping: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The obs column that fills a harmonised one, or None, with a note when it was not found as told."""
    columns = atlas.obs.columns
    if name in mapping:
        if mapping[name] in columns:
            return mapping[name], []
        hint = did_you_mean(mapping[name], columns)
        return None, [f"obs has no column '{mapping[name]}' for {name}: left empty. {hint}".rstrip()]
    spellings = OBS_NAMES.get(name, (name,))
    if exact := next((spelling for spelling in spellings if spelling in columns), None):
        return exact, []
    plain = {_squeezed(spelling) for spelling in spellings if not spelling.endswith("_ontology_term_id")}
    alike = [column for column in columns if _squeezed(column) in plain]
    if len(alike) == 1:
        return alike[0], [f"obs['{alike[0]}'] taken as {name}"]
    return None, [f"obs has {', '.join(map(repr, alike))}: none taken as {name}"] if alike else []


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_file(atlas: Atlas, name: str) -> str | None:
    """A value that holds for the whole file: CELLxGENE's schema moved the organism to uns in its version 6."""
    for spelling in OBS_NAMES.get(name, (name,)):
        if text := atlas.texts.get(spelling, "").strip():
            return named_species(text) if name == "organism" else text
    return None


def _read(atlas: Atlas, column: str, start: int, stop: int, name: str) -> tuple[pa.Array, list[str]]:
    values, note = atlas.obs.typed(column, start, stop)
    notes = [note] if note else []
    if name == BOOLEAN_COLUMN:
        booleans, bad = as_booleans(values)
        return booleans, notes + _complaint(column, "true or false", bad)
    judge = _term if name in ONTOLOGY_COLUMNS else _species if name == "organism" else _text
    texts, bad = _judged(as_texts(values), judge, pa.string())
    return texts, notes + _complaint(column, "an ontology term" if judge is _term else "a short text", bad)


def _complaint(column: str, expected: str, bad: Counter[str]) -> list[str]:
    if not bad:
        return []
    count, example = bad.total(), min(bad)[:40]
    return [f"obs['{column}'] expected {expected}: {count:,} values such as '{example}' set to null"]


def _text(value: str) -> str | None:
    return value if len(value) <= LONGEST_TEXT else None


def _species(value: str) -> str | None:
    return named_species(value) if len(value) <= LONGEST_TEXT else None


def _term(value: str) -> str | None:
    return value if _TERMS.fullmatch(value) and len(value) <= LONGEST_TEXT else None


def as_texts(values: pa.Array) -> pa.Array:
    """Values as texts (dictionary of string): whole numbers without a decimal point, booleans as true and false."""
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(values.indices.cast(pa.int32()), _strings(values.dictionary))
    return _strings(values).dictionary_encode()


def _strings(values: pa.Array) -> pa.Array:
    return pa.nulls(len(values), pa.string()) if pa.types.is_null(values.type) else values.cast(pa.string())


def as_booleans(values: pa.Array) -> tuple[pa.Array, Counter[str]]:
    """Values as booleans, null where missing or neither true nor false; those that were neither are counted by text."""
    if pa.types.is_boolean(values.type):
        return values, Counter()

    def judge(value: str) -> bool | None:
        plain = value.lower()
        return True if plain in _TRUE else False if plain in _FALSE else None

    return _judged(as_texts(values), judge, pa.bool_())


def _judged(texts: pa.DictionaryArray, judge: Judge, kind: pa.DataType) -> tuple[pa.Array, Counter[str]]:
    """Each different text as the judge reads it; None for those it refuses, which are counted by text."""
    read: list[Any] = []
    refused: dict[int, str] = {}
    for code, value in enumerate(texts.dictionary.to_pylist()):
        plain = (value or "").strip()
        missing = plain.lower() in _MISSING
        answer = None if missing else judge(plain)
        read.append(answer)
        if answer is None and not missing:
            refused[code] = plain
    indices = texts.indices
    found = pa.array(read, kind).take(indices) if read else pa.nulls(len(texts), kind)
    if not refused:
        return found, Counter()
    times = np.bincount(indices.drop_null().to_numpy(zero_copy_only=False), minlength=len(read))
    return found, Counter({text: int(times[code]) for code, text in refused.items() if times[code]})


def _labels(atlas: Atlas, start: int, stop: int, keep_obs: Sequence[str]) -> tuple[pa.Array, list[str]]:
    """A map of column name to text for each cell (n), without the columns that are missing there."""
    n, columns, notes = stop - start, list[pa.Array](), list[str]()
    for name in keep_obs:
        if name not in atlas.obs.columns:
            hint = did_you_mean(name, atlas.obs.columns)
            notes.append(f"obs has no column '{name}' to keep. {hint}".rstrip())
            columns.append(pa.nulls(n, pa.string()))
            continue
        values, note = atlas.obs.typed(name, start, stop)
        texts, bad = _judged(as_texts(values), _text, pa.string())
        columns.append(texts)
        notes += ([note] if note else []) + _complaint(name, "a short text", bad)
    # Column after column becomes cell after cell.
    order = np.arange(len(columns) * n).reshape(len(columns), n).T.ravel()
    items = pa.concat_arrays(columns).take(pa.array(order))
    keys = pa.array(list(keep_obs), pa.string()).take(pa.array(np.tile(np.arange(len(columns)), n)))
    present = pc.is_valid(items)
    sizes = present.to_numpy(zero_copy_only=False).reshape(n, len(columns)).sum(axis=1)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)
    return pa.MapArray.from_arrays(pa.array(offsets), keys.filter(present), items.filter(present)), notes
