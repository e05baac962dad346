"""Vocabulary: published layouts, files, digests, lookups, and pickles that would rather do something else."""

from __future__ import annotations

import csv
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genescale.platform.errors import IntegrityError, UnknownGeneError, VocabularyError
from genescale.platform.plain_pickle import read_plain_dictionary
from genescale.platform.storage import Store
from genescale.platform.vocabulary import MASK, PAD, Vocabulary, import_published, lint, read_vocabulary
from genescale.platform.vocabulary_files import from_tsv, to_tsv

LAYOUTS = {
    "gc30M": (25_426, 2_048, {"<pad>": 0, "<mask>": 1}),
    "gc104M": (20_275, 4_096, {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}),
}


@pytest.fixture(scope="module")
def published(shared_data: Path) -> dict[str, Vocabulary]:
    folder = shared_data / "vocabularies"
    return {
        name: import_published(
            folder / f"token_dictionary_{name}.pkl",
            folder / f"gene_median_dictionary_{name}.pkl",
            names=folder / f"gene_name_id_dict_{name}.pkl",
            aliases=folder / f"ensembl_mapping_dict_{name}.pkl",
        )
        for name in LAYOUTS
    }


def small(**changes: Any) -> Vocabulary:
    options: dict[str, Any] = {
        "symbols": ["TWO", "ONE", "THREE"],
        "window": 16,
        "aliases": {"OLD1": "ENSG01"},
        "name": "small",
    }
    return Vocabulary.build(["ENSG02", "ENSG01", "ENSG03"], [2.0, 1.0, np.nan], **{**options, **changes})


@pytest.mark.shared
@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout_imports_exactly(name: str, published: dict[str, Vocabulary], shared_data: Path) -> None:
    vocabulary = published[name]
    size, window, special = LAYOUTS[name]
    assert (vocabulary.size, vocabulary.window, vocabulary.special) == (size, window, special)
    assert vocabulary.token_dtype is np.uint16
    # The same dictionaries as a table, extracted independently of this code.
    with (shared_data / "vocabularies" / f"geneformer_{name}_genes.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == size
    for row in rows:
        token = int(row["token_id"])
        assert vocabulary.gene_of_token(token) == row["ensembl_id"]
        if row["ensembl_id"] not in special:
            assert vocabulary.medians_t[token] == float(row["median"])
            assert vocabulary.symbol_of(row["ensembl_id"]) == (row["gene_name"] or row["ensembl_id"])


@pytest.mark.shared
def test_published_aliases_lead_where_the_published_mapping_does(published: dict[str, Vocabulary]) -> None:
    vocabulary = published["gc104M"]
    assert len(vocabulary.aliases) == 71_482
    for name in ("TP53", "tp53", "ENSG00000141510", "ENSG00000141510.12", "LFS1"):
        assert vocabulary.gene_of_token(vocabulary.token(name)) == "ENSG00000141510"


@pytest.mark.shared
def test_address_of_a_token_dictionary_finds_its_siblings(
    published: dict[str, Vocabulary], shared_data: Path, local_store: Store
) -> None:
    folder = shared_data / "vocabularies"
    assert read_vocabulary(str(folder / "token_dictionary_gc104M.pkl"), local_store) == published["gc104M"]
    plain = read_vocabulary(str(folder / "geneformer_gc30M_genes.tsv"), local_store)
    assert plain == published["gc30M"]
    with pytest.raises(VocabularyError, match="it holds 2: token_dictionary_gc104M"):
        read_vocabulary(str(folder), local_store)


@pytest.mark.shared
def test_published_vocabularies_survive_export(published: dict[str, Vocabulary]) -> None:
    for vocabulary in published.values():
        back = Vocabulary.from_parquet_bytes(vocabulary.to_parquet_bytes())
        assert (back, back.name, back.aliases) == (vocabulary, vocabulary.name, vocabulary.aliases)
        assert from_tsv(to_tsv(vocabulary), where="x.tsv") == vocabulary


@pytest.mark.shared
def test_lint_tells_placeholder_and_tiny_medians(published: dict[str, Vocabulary]) -> None:
    warnings = " ".join(lint(published["gc104M"]))
    assert "72 genes share the median 1.105969" in warnings
    assert "106 genes have a median below 0.05" in warnings
    assert lint(published["gc30M"]) == []


def test_missing_medians_are_named(tmp_path: Path, local_store: Store) -> None:
    tokens = tmp_path / "token_dictionary_x.pkl"
    tokens.write_bytes(pickle.dumps({"<pad>": 0, "<mask>": 1, "ENSG01": 2, "ENSG02": 3}))
    with pytest.raises(VocabularyError, match=r"gene_median_dictionary_x\.pkl does not stand beside it"):
        read_vocabulary(str(tokens), local_store)
    (tmp_path / "gene_median_dictionary_x.pkl").write_bytes(pickle.dumps({"ENSG01": np.float64(1.5)}))
    with pytest.raises(VocabularyError, match="1 genes have a token but no median, for example ENSG02"):
        read_vocabulary(str(tokens), local_store)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_numbers_and_texts_are_read_at_any_protocol(protocol: int) -> None:
    values = {"a": 1, "b": 2.5, "c": "text", "d": 10**12}
    assert read_plain_dictionary(pickle.dumps(values, protocol=protocol), where="x") == values


@pytest.mark.parametrize("kind", [np.int16, np.uint32, np.int64, np.float32, np.float64])
def test_numpy_scalars_are_read_as_numbers(kind: type[np.number[Any]]) -> None:
    data = pickle.dumps({"a": kind(7), "b": kind(9)}, protocol=4)
    assert read_plain_dictionary(data, where="x") == {"a": 7, "b": 9}


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps({"ENSG01": Touch(marker)}, protocol=protocol)
    pickle.loads(data)
    assert marker.exists(), "the pickle of this test must be one that does something"
    marker.unlink()
    with pytest.raises(VocabularyError, match="refused"):
        read_plain_dictionary(data, where="x.pkl")
    assert not marker.exists()


OBJECT_SCALAR = (
    b"\x80\x04}\x8c\x01acnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R\x8c\x01x\x86Rs."
)
BOMBS = {
    "eval": b"cbuiltins\neval\n(S'1+1'\ntR.",
    "numpy function": b"\x80\x04cnumpy\nload\n.",
    "attribute of an allowed name": b"\x80\x04cnumpy.core.multiarray\nscalar.__class__\n.",
    "object scalar": OBJECT_SCALAR,
    "state for a decoder": b"\x80\x04}\x8c\x01acnumpy.core.multiarray\nscalar\n}\x8c\x01b\x8c\x01csbs.",
    "memo position that allocates gigabytes": b"\x80\x02}r\xff\xff\xff\x7f.",
    "persistent reference": b"\x80\x02}X\x01\x00\x00\x00aPid\ns.",
    "extension": b"\x80\x02\x82\x01.",
    "new object": b"\x80\x04\x8c\x08builtins\x8c\x04dict\x93)\x81.",
    "list": pickle.dumps([1, 2]),
    "nested": pickle.dumps({"a": {"b": 1}}),
    "bytes": pickle.dumps({"a": b"1"}),
    "boolean": pickle.dumps({"a": True}),
    "numbers as keys": pickle.dumps({1: 2}),
    "array": pickle.dumps({"a": np.arange(3)}),
    "cut off": pickle.dumps({"a": 1, "b": "text"})[:-4],
    "empty": b"",
    "no pickle": b"ENSG01\t3\n",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_everything_but_texts_and_numbers_is_refused(data: bytes) -> None:
    with pytest.raises(VocabularyError):
        read_plain_dictionary(data, where="x.pkl")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_plain(data: bytes) -> None:
    try:
        values = read_plain_dictionary(data, where="x.pkl")
    except VocabularyError:
        return
    assert all(type(value) in (int, float, str) for value in values.values())


def test_build_gives_tokens_in_the_order_of_ids() -> None:
    vocabulary = small()
    assert vocabulary.gene_ids == ("ENSG01", "ENSG02", "ENSG03")
    assert vocabulary.token_ids.tolist() == [4, 5, 6]
    assert vocabulary.medians[:2].tolist() == [1.0, 2.0]
    assert (vocabulary.pad, vocabulary.mask, vocabulary.cls, vocabulary.eos, vocabulary.size) == (0, 1, 2, 3, 7)
    assert np.isnan(vocabulary.medians_t[:4]).all()
    bare = small(special=(PAD, MASK), window=None)
    assert (bare.cls, bare.eos, bare.window, bare.token_ids[0]) == (None, None, 2_048, 2)


def test_lookup_by_id_symbol_alias_and_version() -> None:
    vocabulary = small()
    assert [vocabulary.find(name) for name in ("ENSG01", " ensg01 ", "one", "Old1")] == [4, 4, 4, 4]
    assert vocabulary.map_ids(["THREE", "nothing", "ENSG02"]).tolist() == [6, -1, 5]
    for special in ("<pad>", "<cls>"):
        assert vocabulary.find(special) is None, "a special token is not a gene"


def test_unknown_gene_names_the_nearest_and_ambiguous_symbols_are_not_chosen() -> None:
    with pytest.raises(UnknownGeneError, match=r"'THRE' is not in the vocabulary.*Did you mean 'THREE'"):
        small().token("THRE")
    twins = small(symbols=["SAME", "same", "THREE"])
    assert twins.find("SAME") is None
    with pytest.raises(UnknownGeneError, match=r"names 2 genes.*ENSG01, ENSG02"):
        twins.token("SAME")
    with pytest.raises(VocabularyError, match="Token ids run from 0 to 6"):
        twins.gene_of_token(7)


def test_digest_is_of_the_content_not_of_the_name() -> None:
    assert small(name="other") == small()
    assert len({small(), small(name="other")}) == 1
    different = [small(window=17), small(symbols=["X", "ONE", "THREE"]), small(aliases={}), small(special=(PAD, MASK))]
    assert small().digest not in {vocabulary.digest for vocabulary in different}


def test_travels_to_a_worker_unchanged_and_unchangeable() -> None:
    vocabulary = small()
    assert vocabulary.find("ONE") == 4
    back = pickle.loads(pickle.dumps(vocabulary))
    assert back == vocabulary
    assert back.find("ONE") == 4
    with pytest.raises(ValueError, match="read-only"):
        back.medians[0] = 3.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gene_ids": ("ENSG01", "ENSG01", "ENSG03")}, "repeated"),
        ({"gene_ids": ("ensg01", "ENSG02", "ENSG03")}, "upper-case"),
        ({"medians": np.array([1.0, 0.0, 1.0])}, "non-zero median is positive"),
        ({"medians": np.array([1.0, np.inf, 1.0])}, "non-zero median is positive"),
        ({"medians": np.array([1.0])}, "differ in number"),
        ({"token_ids": np.array([4, 5, 7])}, "without gap"),
        ({"special": {PAD: 0}}, "<mask> is missing"),
        ({"special": {PAD: 0, MASK: 1, "<cls>": 2, "<sep>": 3}}, "unknown special token <sep>"),
        ({"special": {PAD: 0, MASK: 1, "<cls>": 2}}, "come together"),
        ({"aliases": {"OLD": "ENSG09"}}, "leads to no gene"),
        ({"aliases": {"ENSG01": "ENSG02"}}, "is a gene id itself"),
        ({"window": 3}, "holds no gene"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    import dataclasses

    with pytest.raises(VocabularyError, match=message):
        dataclasses.replace(small(), **changes)


def test_parquet_with_changed_content_is_refused() -> None:
    table = pq.read_table(pa.BufferReader(small().to_parquet_bytes()))
    medians = [None if m is None else m * 2 for m in table.column("median").to_pylist()]
    changed = table.set_column(table.schema.get_field_index("median"), "median", pa.array(medians, pa.float64()))
    sink = pa.BufferOutputStream()
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), sink)
    with pytest.raises(IntegrityError, match="digest"):
        Vocabulary.from_parquet_bytes(sink.getvalue().to_pybytes())


def test_other_files_are_refused(tmp_path: Path, local_store: Store) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "other.tsv").write_text("gene\tvalue\nA\t1\n")
    (tmp_path / "gene_median_dictionary.pkl").write_bytes(pickle.dumps({"ENSG01": 1.0}))
    for name in ("other.parquet", "broken.parquet", "other.tsv", "gene_median_dictionary.pkl"):
        with pytest.raises(VocabularyError, match=name):
            read_vocabulary(str(tmp_path / name), local_store)


def test_edited_tsv_is_noticed() -> None:
    text = to_tsv(small())
    with pytest.raises(IntegrityError, match="Remove that line"):
        from_tsv(text.replace("\t2.0\t", "\t3.0\t"), where="x.tsv")
    edited = from_tsv(text.replace("\t2.0\t", "\t3.0\t").partition("\n")[2], where="x.tsv")
    assert edited.medians_t[5] == 3.0
