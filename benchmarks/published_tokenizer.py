"""The baseline: rank-value tokens made in the way of the published tokenizer, written from its description.

The published transcriptome tokenizer (Theodoris et al., Nature 2023, and its documentation) goes through an h5ad file
in chunks of 512 cells, divides each chunk by library size and gene medians as a SciPy matrix, sorts cell by cell with
`argsort`, appends the tokens of every cell to one Python list, collects the metadata columns as lists, and at the end
turns the dictionary of lists into a Hugging Face `datasets` table, crops every cell in `map`, and saves it.

Its sort leaves equal values in an order that differs from processor to processor; here the sort is stable and genes
stand in the order of their tokens, so that the result can be compared token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from genescale.platform.vocabulary import Vocabulary

CHUNK_CELLS = 512
TARGET_SUM = 10_000
PROCESSES = 1


def ranked(values: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return tokens[np.argsort(-values, kind="stable")]


def with_sizes(atlas: Any) -> Any:
    """The atlas with the column `n_counts` that the published tokenizer asks its users to add."""
    atlas.obs["n_counts"] = np.asarray(atlas.X.sum(axis=1)).ravel().astype(np.float64)
    return atlas


class PublishedTokenizer:
    """Gene dictionaries and the loop over cells."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.tokens = dict(zip(vocabulary.gene_ids, vocabulary.token_ids.tolist(), strict=True))
        self.medians = dict(zip(vocabulary.gene_ids, vocabulary.medians.tolist(), strict=True))

    def rank_chunks(self, atlas: Any) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of each cell, most characteristic gene first, without special tokens: the exact NumPy loop."""
        gene_ids = list(atlas.var_names)
        places = np.array([i for i, gene in enumerate(gene_ids) if gene in self.tokens])
        tokens_g = np.array([self.tokens[gene_ids[i]] for i in places])
        medians_g = np.array([self.medians[gene_ids[i]] for i in places])
        for start in range(0, atlas.n_obs, CHUNK_CELLS):
            chosen = np.arange(start, min(start + CHUNK_CELLS, atlas.n_obs))
            sizes = atlas[chosen].obs["n_counts"].values[:, None]
            chunk = atlas[chosen, :].X[:, places]
            values = sparse.csr_matrix(chunk / sizes * TARGET_SUM / medians_g)
            for n in range(values.shape[0]):
                yield ranked(values[n].data, tokens_g[values[n].indices])

    def tokenize_file(self, path: Path) -> tuple[list[Any], dict[str, list[Any]]]:
        """Tokens and metadata of all cells of an h5ad file, in Python lists."""
        import anndata

        atlas = with_sizes(anndata.read_h5ad(path))
        tokens = list(self.rank_chunks(atlas))
        return tokens, {name: atlas.obs[name].tolist() for name in atlas.obs.columns}

    def save(self, tokens: list[Any], metadata: dict[str, list[Any]], folder: Path) -> Any:
        """Crop, frame and save as a `datasets` table."""
        from datasets import Dataset

        capacity, cls, eos = self.vocabulary.window - 2, self.vocabulary.cls, self.vocabulary.eos

        def framed(example: dict[str, Any]) -> dict[str, Any]:
            ids = [cls, *example["input_ids"][:capacity], eos]
            return {"input_ids": ids, "length": len(ids)}

        dataset = Dataset.from_dict({"input_ids": tokens, **metadata})
        dataset = dataset.map(framed, num_proc=PROCESSES)
        dataset.save_to_disk(str(folder))
        return dataset

    def run(self, path: Path, folder: Path) -> Any:
        """From file to saved table."""
        return self.save(*self.tokenize_file(path), folder)
