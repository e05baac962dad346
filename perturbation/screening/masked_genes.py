"""The masked-gene read-out in a screen: which genes are hidden, what that costs, and what came of it.

Legend: `n` chosen cells.

Each unedited and edited cell goes through the whole model once more for every group of genes that is hidden in it
(`readouts/masked_gene.py`): about seven times for all genes, and never more often than it has genes of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from genescale.perturbation.editing.cell import Cell
from genescale.perturbation.editing.edits import apply
from genescale.perturbation.editing.requests import EditRequest
from genescale.perturbation.readouts.masked_gene import MaskedGeneReadout, masked_gene_changes, passes_of_cell
from genescale.perturbation.screening.cells import read_cells
from genescale.perturbation.screening.moments import Moments, merge, observed
from genescale.perturbation.screening.spec import EVERY_GENE, NO_GENE, ScreenConfig
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, SettingsError
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.screening.plan import Affected
    from genescale.training.embedder import Embedder
    from genescale.training.model import MaskedGeneModel

KIND = "masked_gene_model"
READOUT = MaskedGeneReadout()
# Edited copies of a cell that are held at once; each such part computes the unedited cell anew.
EDITS_AT_ONCE = 256
Asked = Sequence[tuple[int, EditRequest]]
"""Edits of one cell, each with the code that its numbers are kept under."""


def check_masked(config: ScreenConfig, bundle: Bundle) -> None:
    """SettingsError when masked genes are asked of a model without the head that predicts them."""
    if config.readouts.masked_genes != NO_GENE and bundle.kind != KIND:
        raise SettingsError(
            f"the model is of kind '{bundle.kind}', which has no head for masked genes.",
            where="readouts: masked_genes",
            fix=f"Screen with the pretrained model itself (kind '{KIND}'), or leave masked_genes out.",
        )


def masked_tokens(config: ScreenConfig, vocabulary: Vocabulary, store: Store) -> tuple[Affected, int]:
    """Tokens of the genes to be hidden, and how many names of a file of lists the vocabulary lacks.

    Raises UnknownGeneError for a name that is no gene, InputError for lists without a known one.
    """
    wanted = config.readouts.masked_genes
    if wanted == NO_GENE:
        return None, 0
    if wanted == EVERY_GENE:
        return "all", 0
    if len(wanted) > 1:
        return tuple(dict.fromkeys(vocabulary.token(gene) for gene in wanted)), 0
    from genescale.perturbation.attention.named_lists import named_lists

    lists = named_lists(wanted[0], vocabulary, store)
    tokens = tuple(sorted({token for one in lists for token in one.tokens}))
    if not tokens:
        raise InputError("no gene is named.", where="readouts: masked_genes", fix="Give ids, symbols or a lists file.")
    return tokens, len({name for one in lists for name in one.outside})


def masked_passes(genes: Affected, corpus: Corpus, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Further passes (n) of each variant of a cell, and the genes (n) that are hidden in them all together."""
    if genes is None:
        return np.zeros(len(cells), dtype=np.int64), np.zeros(len(cells), dtype=np.int64)
    found = [
        passes_of_cell(tokens_t, corpus.vocabulary, genes=genes, readout=READOUT)
        for tokens_t in read_cells(corpus, cells)
    ]
    table_n2 = np.array(found, dtype=np.int64).reshape(-1, 2)
    return table_n2[:, 0], table_n2[:, 1]


def masked_gene_model(embedder: Embedder) -> MaskedGeneModel:
    """The whole model around the encoder of an embedder, which it shares."""
    from genescale.training.weights import load_model

    model = load_model(embedder.bundle)
    model.encoder = embedder.encoder
    return model.to(embedder.device).requires_grad_(False).eval()


def masked_moments(
    model: MaskedGeneModel,
    embedder: Embedder,
    genes: Affected,
    tokens_t: np.ndarray,
    asked: Asked,
    *,
    whole: bool,
) -> Moments:
    """Changes of one cell under edits that it knows. `whole`: the cell holds all its genes, for a refill."""
    assert genes is not None
    vocabulary = embedder.vocabulary
    cell = Cell.of(tokens_t, vocabulary)
    # The same deletion may be an edit and the control of several others: it is computed once.
    codes: dict[EditRequest, list[int]] = {}
    for code, request in asked:
        codes.setdefault(request, []).append(code)
    requests, found = list(codes), []
    for start in range(0, len(requests), EDITS_AT_ONCE):
        part = requests[start : start + EDITS_AT_ONCE]
        edits = [
            apply(one, cell, vocabulary, window=embedder.window, uncropped_t=tokens_t if whole else None)
            for one in part
        ]
        changes = masked_gene_changes(model, edits, vocabulary, genes=genes, readout=READOUT)
        for request, change in zip(part, changes, strict=True):
            found += [
                observed(np.full(len(change.genes_k), code), change.genes_k, change.change_k) for code in codes[request]
            ]
    return merge(found)
