"""An AnnData in memory as a corpus, and results back into the `uns` of a file."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas
import polars as pl
import pytest
from scipy import sparse

from genescale.ingestion.config import IngestConfig
from genescale.ingestion.formats.memory_anndata import memory_atlas
from genescale.ingestion.formats.uns import write_uns
from genescale.ingestion.local_corpus import local_corpus
from genescale.platform.errors import InputError, NotCountsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

STORE = Store(StorageSettings())
N_GENES, N_CELLS = 30, 12


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    ids = [f"ENSG{i:011d}" for i in range(N_GENES)]
    return Vocabulary.build(
        ids, np.linspace(0.5, 3.0, N_GENES), symbols=[f"GENE{i}" for i in range(N_GENES)], window=24
    )


def atlas(*, of: str = "csr") -> anndata.AnnData:
    counts = np.random.default_rng(4).poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32)
    values = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[of](counts)
    obs = pandas.DataFrame(
        {
            "cell_type": pandas.Categorical(["a", "b", None] * (N_CELLS // 3)),
            "n": np.arange(N_CELLS),
            "good": [True, False] * (N_CELLS // 2),
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    return anndata.AnnData(X=values, obs=obs, var=pandas.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)]))


@pytest.mark.parametrize("of", ["csr", "csc", "dense"])
def test_every_matrix_gives_the_tokens_of_the_file(of: str, vocabulary: Vocabulary, tmp_path: Path) -> None:
    adata = atlas(of=of)
    adata.write_h5ad(tmp_path / "atlas.h5ad")
    sources = {"memory": adata, "file": str(tmp_path / "atlas.h5ad")}
    memory, file = (
        local_corpus(source, str(tmp_path / name), vocabulary, STORE).corpus for name, source in sources.items()
    )
    assert memory.n_cells == N_CELLS
    for ours, theirs in zip(memory.tokens(range(N_CELLS)), file.tokens(range(N_CELLS)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    columns = ["cell_id", "cell_type", "source_row"]
    assert memory.cells(columns).equals(file.cells(columns))


def test_counts_are_found_beside_normalised_values(vocabulary: Vocabulary, tmp_path: Path) -> None:
    adata = atlas()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    assert memory_atlas(adata).slot == "layers/counts"
    del adata.layers["counts"]
    with pytest.raises(NotCountsError, match="no raw counts found"):
        memory_atlas(adata)


def test_conditions_and_kept_columns_speak_of_obs(vocabulary: Vocabulary, tmp_path: Path) -> None:
    config = IngestConfig(where="n >= 6 AND good", keep_obs=("good",))
    made = local_corpus(atlas(), str(tmp_path / "some"), vocabulary, STORE, config=config)
    assert made.corpus.cells(["source_row"])["source_row"].to_pylist() == [6, 8, 10]
    assert made.tally.dropped == {"where": N_CELLS - 3}
    assert made.corpus.cells(["labels.good"])["labels.good"].to_pylist() == ["true"] * 3
    with pytest.raises(InputError, match=r"no column 'goood'.*'good'"):
        local_corpus(atlas(), str(tmp_path / "x"), vocabulary, STORE, config=IngestConfig(keep_obs=("goood",)))


def test_a_backed_anndata_is_refused_with_what_to_do(tmp_path: Path) -> None:
    atlas().write_h5ad(tmp_path / "atlas.h5ad")
    backed = anndata.read_h5ad(tmp_path / "atlas.h5ad", backed="r")
    with pytest.raises(InputError, match="to_memory"):
        memory_atlas(backed)
    backed.file.close()


def test_tables_in_uns_come_back_as_they_were(tmp_path: Path) -> None:
    atlas().write_h5ad(tmp_path / "atlas.h5ad")
    table = pl.DataFrame(
        {"gene": ["A", None], "q": [0.5, None], "n": [1, 2], "found": [True, False], "of/all": [1.0, 2.0]}
    )
    content = {"effects": table, "nothing": None, "settings": {"layer": "last", "genes": ["A", "B"]}}
    out = write_uns(str(tmp_path / "atlas.h5ad"), tmp_path / "out.h5ad", "found", content, STORE)
    found = anndata.read_h5ad(out).uns["found"]
    assert set(found) == {"effects", "settings"}
    assert found["effects"]["n"].tolist() == [1, 2]
    assert found["effects"]["found"].tolist() == [True, False]
    assert found["effects"]["gene"].isna().tolist() == [False, True]
    assert np.isnan(found["effects"]["q"].tolist()[1])
    assert found["effects"]["of_all"].tolist() == [1.0, 2.0]
    assert list(found["settings"]["genes"]) == ["A", "B"]
    with pytest.raises(InputError, match="cannot name an entry"):
        write_uns(str(tmp_path / "atlas.h5ad"), tmp_path / "no.h5ad", "a/b", content, STORE)
    assert not (tmp_path / "no.h5ad").exists()
