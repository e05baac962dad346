"""Which atlases a command means: files, globs, folders, and lists with options of each source."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from genescale.ingestion.opening import stat_source
from genescale.ingestion.sources import SourceSpec, find_sources, verify_digest
from genescale.platform.errors import AtlasError, ForbiddenPathError, SettingsError
from genescale.platform.storage import Entry, Store, join

TRIPLE = ("matrix.mtx", "barcodes.tsv", "genes.tsv")


@pytest.fixture
def folder(tmp_path: Path, write_atlas: Callable[..., Path], counts_of: Callable[..., Any]) -> Path:
    """A lab's folder: every kind of atlas, their inner files, and what else lies about."""
    lab = tmp_path / "lab"
    write_atlas("one.h5ad", counts_of(3), folder=lab)
    for inside in (".zgroup", "obs/.zgroup", "X/data/.zarray", "X/data/0", "X/odd.h5ad"):
        (lab / "two.zarr" / inside).parent.mkdir(parents=True, exist_ok=True)
        (lab / "two.zarr" / inside).write_text("{}")
    with zipfile.ZipFile(lab / "three.zarr.zip", "w") as archive:
        archive.writestr(".zgroup", "{}")
    with zipfile.ZipFile(lab / "papers.zip", "w") as archive:
        archive.writestr("paper.pdf", "x")
    for name in TRIPLE:
        for place in ("run/filtered", "geo/GSM1_", "geo/GSM2_"):
            path = lab / (f"{place}/{name}" if place == "run/filtered" else f"{place}{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    with h5py.File(lab / "run" / "filtered.h5", "w") as file:
        for name in ("matrix/barcodes", "matrix/indptr"):
            file[name] = [1]
    with h5py.File(lab / "run" / "molecule_info.h5", "w") as file:
        file["barcode_idx"] = [1]
    (lab / "run" / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (lab / "run" / "graph.mtx").write_text("x")
    (lab / "four.loom").write_text("x")
    (lab / "readme.txt").write_text("x")
    return lab


def names(specs: tuple[SourceSpec, ...], root: Any) -> list[str]:
    """Addresses relative to a folder."""
    return [spec.uri.removeprefix(str(root)).lstrip("/") for spec in specs]


WHOLE = [
    "four.loom",
    "geo/GSM1_matrix.mtx",
    "geo/GSM2_matrix.mtx",
    "one.h5ad",
    "run/damaged.h5",
    "run/filtered",
    "run/filtered.h5",
    "three.zarr.zip",
    "two.zarr",
]


def test_a_folder_gives_every_atlas_once_and_counts_the_rest(folder: Path, local_store: Store) -> None:
    found = find_sources([str(folder)], local_store)
    assert names(found.files, folder) == WHOLE, "a damaged file is listed, so that its damage is reported"
    ignored = [Path(uri).name for uri in found.ignored]
    assert ignored == ["papers.zip", "readme.txt", "graph.mtx", "molecule_info.h5"]
    for spec in found.files:
        assert spec.entry == stat_source(spec.uri, local_store), "the tag is the one that reading will compare"
        assert (spec.options, spec.sha256) == ({}, "")


def test_the_same_in_object_storage(folder: Path, s3_store: tuple[Store, str]) -> None:
    store, bucket = s3_store
    store.upload_folder(folder, join(bucket, "lab"))
    found = find_sources([f"{bucket}/lab/"], store)
    assert names(found.files, f"{bucket}/lab") == WHOLE
    for spec in found.files:
        assert spec.entry == stat_source(spec.uri, store)
    assert names(find_sources([f"{bucket}/lab/*"], store).files, f"{bucket}/lab")[-1] == "two.zarr"


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.h5ad", ["one.h5ad"]),
        ("*.zarr", ["two.zarr"]),
        ("**/*.h5", ["run/damaged.h5", "run/filtered.h5", "run/molecule_info.h5"]),
        ("run/filt*", ["run/filtered", "run/filtered.h5"]),
        ("geo/*", ["geo/GSM1_matrix.mtx", "geo/GSM2_matrix.mtx"]),
        ("geo/GSM2_matrix.mt?", ["geo/GSM2_matrix.mtx"]),
        ("*.txt", ["readme.txt"]),
        ("*", sorted({*WHOLE, "papers.zip", "readme.txt"})),
    ],
)
def test_globs(pattern: str, wanted: list[str], folder: Path, local_store: Store) -> None:
    assert names(find_sources([str(folder / pattern)], local_store).files, folder) == wanted


def test_order_is_as_given_and_a_file_named_twice_is_taken_once(folder: Path, local_store: Store) -> None:
    given = [str(folder / name) for name in ("two.zarr", "one.h5ad", "*.h5ad", "readme.txt", "one.h5ad")]
    found = find_sources(given, local_store)
    assert names(found.files, folder) == ["two.zarr", "one.h5ad", "readme.txt"]


@pytest.mark.parametrize("nothing", ["missing.h5ad", "*.nothing", "missing", "two.zarr/nothing"])
def test_a_source_that_leads_to_nothing_is_an_error(nothing: str, folder: Path, local_store: Store) -> None:
    with pytest.raises(AtlasError, match=r"no atlas is there .* Give a file, a folder, a glob") as caught:
        find_sources([str(folder / "one.h5ad"), str(folder / nothing)], local_store)
    assert caught.value.where == str(folder / nothing)


def test_a_toml_list_gives_each_source_its_options(folder: Path, local_store: Store) -> None:
    digest = hashlib.sha256((folder / "one.h5ad").read_bytes()).hexdigest()
    (folder / "sources.toml").write_text(
        f"""
        [[source]]
        uri = "one.h5ad"
        dataset_id = "first"
        counts_slot = "layers/counts"
        obs = {{ cell_type = "CellType" }}
        min_genes = 3
        sha256 = "{digest.upper()}"

        [[source]]
        uri = "geo/*"
        allow_fractional = true

        [[source]]
        uri = "{folder}/two.zarr"
        """
    )
    found = find_sources([str(folder / "sources.toml")], local_store).files
    assert names(found, folder) == ["one.h5ad", "geo/GSM1_matrix.mtx", "geo/GSM2_matrix.mtx", "two.zarr"]
    assert found[0].options == {
        "dataset_id": "first",
        "counts_slot": "layers/counts",
        "obs": {"cell_type": "CellType"},
        "min_genes": 3,
    }
    assert found[0].sha256 == digest
    assert [spec.options for spec in found[1:]] == [{"allow_fractional": True}] * 2 + [{}]
    verify_digest(found[0].uri, found[0].sha256, local_store)


def test_a_csv_list_in_object_storage(s3_store: tuple[Store, str]) -> None:
    store, bucket = s3_store
    for name in ("a.h5ad", "deep/b.h5ad"):
        store.write(join(bucket, "lab", name), b"x")
    text = f"\ufeffuri,dataset_id,where\r\na.h5ad,first,\"disease = 'normal', or not\"\r\n\r\n{bucket}/lab/deep,,\r\n"
    store.write(join(bucket, "lab/list.csv"), text.encode())
    found = find_sources([join(bucket, "lab/list.csv")], store).files
    assert names(found, f"{bucket}/lab") == ["a.h5ad", "deep/b.h5ad"]
    assert [spec.options for spec in found] == [{"dataset_id": "first", "where": "disease = 'normal', or not"}, {}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[[source]]\nuri='one.h5ad'\ndatset_id='x'", r"source 1: unknown option 'datset_id'.*'dataset_id'"),
        ("a.toml", "[[source]]\nuri='one.h5ad'\nzzz=1", r"unknown option 'zzz'\. Known options: allow_fractional"),
        ("a.toml", "[[sources]]\nuri='one.h5ad'", r"unknown key 'sources'\. Did you mean 'source'"),
        ("a.toml", "source = 3", r"'source' is not a list of tables"),
        ("a.toml", "[[source", r"not valid TOML"),
        ("a.toml", "", r"names no source"),
        ("a.toml", "[[source]]\ndataset_id='x'", r"source 1: no uri"),
        ("a.toml", "[[source]]\nuri='one.h5ad'\nsha256='12'", r"sha256 is '12'\. Write the 64 digits"),
        ("a.toml", "[[source]]\nuri='one.h5ad'\n[[source]]\nuri='one.h5ad'", r"source 2: .*twice, first as source 1"),
        ("a.toml", "[[source]]\nuri='one.h5ad'\n[[source]]\nuri='*.h5ad'", r"source 2: .*one\.h5ad is named twice"),
        ("a.toml", "[[source]]\nuri='geo'\ndataset_id='x'", r"one dataset_id for 2 atlases behind"),
        ("a.csv", "dataset_id\nx\n", r"no heading with 'uri': dataset_id"),
        ("a.csv", "", r"no heading with 'uri': it is empty"),
        ("a.csv", "uri,obs\none.h5ad,x\n", r"'obs' has no place in CSV"),
        ("a.csv", "uri,min_genes\none.h5ad\n", r"line 2: 1 cells, but the heading has 2"),
        ("a.csv", "uri,min_gene\none.h5ad,3\n", r"line 2: unknown option 'min_gene'\. Did you mean 'min_genes'"),
        ("a.csv", "uri\n", r"names no source"),
        ("a.csv", 'uri\n"one.h5ad\n', r"not valid CSV"),
    ],
)
def test_mistakes_in_lists_are_named(name: str, text: str, message: str, folder: Path, local_store: Store) -> None:
    (folder / name).write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        find_sources([str(folder / name)], local_store)
    assert str(folder / name) in str(caught.value)


def test_a_list_cannot_lead_out_of_its_bucket_and_is_utf8(s3_store: tuple[Store, str]) -> None:
    store, bucket = s3_store
    store.write(join(bucket, "lab/a.toml"), b"[[source]]\nuri = '../other/x.h5ad'\n")
    with pytest.raises(ForbiddenPathError):
        find_sources([join(bucket, "lab/a.toml")], store)
    store.write(join(bucket, "lab/b.csv"), b"uri\n\xff.h5ad\n")
    with pytest.raises(SettingsError, match="not UTF-8 text"):
        find_sources([join(bucket, "lab/b.csv")], store)


def test_options_of_a_list_and_a_plain_name_of_the_same_file_are_refused(folder: Path, local_store: Store) -> None:
    (folder / "a.toml").write_text("[[source]]\nuri='one.h5ad'\nmin_genes=3")
    for order in (("a.toml", "one.h5ad"), ("one.h5ad", "a.toml")):
        with pytest.raises(SettingsError, match=r"one\.h5ad is named twice"):
            find_sources([str(folder / name) for name in order], local_store)


def test_a_digest_that_differs_is_told_with_both(folder: Path, local_store: Store) -> None:
    actual = hashlib.sha256((folder / "one.h5ad").read_bytes()).hexdigest()
    with pytest.raises(AtlasError) as caught:
        verify_digest(str(folder / "one.h5ad"), "0" * 64, local_store)
    assert actual in caught.value.what
    assert "0" * 64 in caught.value.what
    assert caught.value.where == str(folder / "one.h5ad")
    with pytest.raises(AtlasError, match=r"this source is a folder of several files\. Leave the digest out"):
        verify_digest(str(folder / "two.zarr"), "0" * 64, local_store)


def test_a_file_that_goes_while_its_folder_is_looked_through_stops_no_other(
    folder: Path, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = local_store.list

    def passing(prefix: str) -> list[Entry]:
        (folder / "passing.h5").write_bytes(b"half a download")
        entries = listed(prefix)
        (folder / "passing.h5").unlink()
        return entries

    expected = [spec.uri for spec in find_sources([str(folder)], local_store).files]
    monkeypatch.setattr(local_store, "list", passing)
    found = [spec.uri for spec in find_sources([str(folder)], local_store).files]
    assert sorted({*found} - {str(folder / "passing.h5")}) == sorted(expected)
