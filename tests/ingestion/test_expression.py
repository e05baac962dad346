"""Expression read back from the sources of a corpus equals what the files say, and other files are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.annotation.genes import gene_table_bytes, map_genes
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.corpus import Corpus
from genescale.ingestion.expression import log_normalised
from genescale.ingestion.opening import stat_source
from genescale.ingestion.plan import Unit, opened
from genescale.ingestion.table.records import NewPart, Source
from genescale.ingestion.tokenise import write_part
from genescale.platform.errors import CorpusError, InputError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

UNKNOWN, RETIRED = "ENSG00009999999", "ENSG90000000001"


@pytest.fixture
def sources(counts_of: Any, vocabulary: Vocabulary) -> dict[str, Any]:
    """Counts of two files whose last columns are a retired id of the first gene and a gene no vocabulary has."""
    return {name: counts_of(40, seed=seed) for name, seed in (("one", 1), ("two", 2))}


@pytest.fixture
def corpus(
    sources: dict[str, Any],
    write_atlas: Callable[..., Path],
    tmp_path: Path,
    vocabulary: Vocabulary,
    local_store: Store,
) -> Corpus:
    """The two files ingested without Ray; cells with fewer than 26 genes were dropped, so rows have gaps."""
    genes = [*vocabulary.gene_ids[: len(vocabulary.gene_ids) - 2], RETIRED, UNKNOWN]
    config = IngestConfig(min_genes=26)
    made = Corpus.create(str(tmp_path / "made"), vocabulary, local_store)
    for name, counts in sources.items():
        uri = str(write_atlas(f"{name}.h5ad", counts, genes=genes))
        entry = stat_source(uri, local_store)
        with opened(uri, entry.etag, "X", config, local_store) as atlas:
            mapped = map_genes(atlas, vocabulary, rules=config)
            answer, _ = write_part(
                Unit(uri=uri, etag=entry.etag, slot="X", start=0, stop=40),
                atlas,
                mapped,
                vocabulary=vocabulary,
                cell_rules=config,
                obs_mapping={},
                allow_fractional=False,
                bad_values="refuse",
                corpus_uri=made.uri,
                dataset_id=name,
                store=local_store,
            )
        known = {"size_bytes": entry.size_bytes, "etag": entry.etag, "vocabulary_digest": vocabulary.digest}
        source = Source(uri=uri, recipe=config.recipe(), **known)
        # Only one of the two has the side file: sources of the first release have none.
        files = {"genes.parquet": gene_table_bytes(mapped, vocabulary)} if name == "one" else {}
        details = {"kept": answer["part"]["rows"], "counts_slot": "X"}
        made = made.commit_source(source, name, [NewPart(**answer["part"])], details, files=files)
    return made


def directly(corpus: Corpus, sources: dict[str, Any], index: int) -> np.ndarray:
    """log1p of counts per 10,000 of one cell by token, from the matrix itself."""
    cell = corpus.cells(["dataset_id", "source_row"]).slice(index, 1).to_pylist()[0]
    counts_g = sources[cell["dataset_id"]].toarray()[cell["source_row"]].astype(np.float64)
    expected_t = np.zeros(corpus.vocabulary.size)
    tokens = [corpus.vocabulary.token(gene) for gene in corpus.vocabulary.gene_ids[:-2]]
    np.add.at(expected_t, [*tokens, tokens[0]], counts_g[:-1])
    return np.log1p(expected_t / counts_g.sum() * 10_000)


def test_expression_is_that_of_the_files(corpus: Corpus, sources: dict[str, Any]) -> None:
    assert 20 < corpus.n_cells < 80
    asked_n = np.random.default_rng(0).permutation(corpus.n_cells)[:20]
    found_nt = log_normalised(corpus, asked_n)
    assert (found_nt.shape, found_nt.dtype) == ((20, corpus.vocabulary.size), np.float32)
    expected_nt = np.stack([directly(corpus, sources, int(index)) for index in asked_n])
    assert np.allclose(found_nt.toarray(), expected_nt, rtol=1e-6)
    # The two columns of the first gene are summed, and the unknown gene is in the library only.
    assert found_nt.toarray()[:, corpus.vocabulary.token("OLDNAME")].any()
    tokens_t = corpus.tokens([int(asked_n[0])])[0]
    assert set(found_nt[[0]].indices.tolist()) == set(tokens_t.tolist()) - set(corpus.vocabulary.special.values())


def test_nothing_is_asked_and_nothing_is_returned(corpus: Corpus) -> None:
    assert log_normalised(corpus, np.empty(0, dtype=np.int64)).shape == (0, corpus.vocabulary.size)
    with pytest.raises(InputError, match="outside"):
        log_normalised(corpus, np.array([corpus.n_cells]))


def test_a_source_that_is_gone_or_changed_is_an_error(corpus: Corpus) -> None:
    every_n = np.arange(corpus.n_cells)
    datasets_n = np.array(corpus.cells(["dataset_id"])["dataset_id"].to_pylist())
    Path(corpus.dataset("one").source_uri).unlink()
    with pytest.raises(CorpusError, match=f"{(datasets_n == 'one').sum()} cells of dataset 'one'.*gone"):
        log_normalised(corpus, every_n)
    assert log_normalised(corpus, every_n[datasets_n == "two"]).shape[0] == (datasets_n == "two").sum()
    changed = Path(corpus.dataset("two").source_uri)
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(CorpusError, match="changed since"):
        log_normalised(corpus, every_n[datasets_n == "two"])


def test_cells_of_other_names_are_refused(corpus: Corpus, planted: Any, tmp_path: Path) -> None:
    record = corpus.dataset("two")
    other = Corpus.create(str(tmp_path / "other"), corpus.vocabulary, corpus.store)
    part = planted.parts(other, "two", [planted.cells(3, 0)])
    other = other.commit_source(Source(**record.details["source"]), "two", part, {"counts_slot": "X"})
    with pytest.raises(CorpusError, match="should be 'two-0', but is 'cell0'"):
        log_normalised(other, np.arange(3))
