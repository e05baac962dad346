"""Read-out: does a cell still expect a gene after an edit? The change of the gene's masked-gene log-probability.

The gene is hidden behind `<mask>` in the cell and in the edited cell, and the model's masked-gene head says how
probable it is there: `log p(gene | rest of the edited cell) - log p(gene | rest of the cell)`, in nats. Below 0:
without the edit's gene the cell speaks less for this one. Embeddings move for many reasons, among them the ranks that
an edit shifts; this asks the one question the model was trained to answer.

One hidden gene a pass would cost as many passes as there are genes. So genes are hidden in groups, at most
`hidden_share` of the cell at a time, the share that pretraining hides: what the model has to do is what it has learned.
Genes of a group do not see each other, before and after the edit alike. The edited genes are never hidden.

A gene that was deleted is a candidate for every hidden place again, and the more expected it is, the less is left for
all others. That says nothing about any of them, so probabilities are those under which no edited gene is hidden:
`p(gene) / (1 - p(edited genes))`, on both sides.

Legend: `k` genes that stand in both cells and were not edited, `t` tokens of a cell, `m` hidden tokens, `v` vocabulary,
`e` edited genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from genescale.perturbation.editing.cell import gene_span
from genescale.perturbation.editing.edits import Edit
from genescale.platform.errors import InputError, SettingsError
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.training.model import MaskedGeneModel

HIDDEN_SHARE = 0.15
TOKENS_PER_BATCH = 8_192


@dataclass(frozen=True, kw_only=True)
class MaskedGeneReadout:
    """How genes are hidden."""

    hidden_share: float = HIDDEN_SHARE
    """Largest share of a cell's genes hidden together; below one gene a cell, each is hidden alone."""
    seed: int = 0
    """Of the groups."""
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __post_init__(self) -> None:
        if not 0.0 <= self.hidden_share < 1.0:
            raise SettingsError(
                f"hidden_share is {self.hidden_share}.",
                fix="Use the share that pretraining hides, such as 0.15, or 0 to hide each gene alone.",
            )
        if self.seed < 0 or self.tokens_per_batch < 1:
            raise SettingsError(
                f"seed is {self.seed} and tokens_per_batch {self.tokens_per_batch}.",
                fix="Use a seed of at least 0 and at least 1 token a batch.",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedGeneChange:
    """How probable the genes of one cell are before and after an edit."""

    genes_k: np.ndarray
    """(k,) int64 tokens, by their rank in the edited cell."""
    before_k: np.ndarray
    """(k,) float64 log-probability, in nats, in the cell that the edit is compared with."""
    after_k: np.ndarray
    """(k,) float64, in the edited cell."""

    @property
    def change_k(self) -> np.ndarray:
        """(k,) float64: below 0 where the edit made the gene less expected."""
        return self.after_k - self.before_k


def masked_gene_changes(
    model: MaskedGeneModel,
    edits: Sequence[Edit],
    vocabulary: Vocabulary,
    *,
    genes: Sequence[int] | Literal["all"] = "all",
    readout: MaskedGeneReadout | None = None,
) -> list[MaskedGeneChange]:
    """The change of each of `genes` under each edit, in the order of `edits`; genes that a cell lacks have no entry.

    `model` is in evaluation mode and has the head it was pretrained with. Edits of one cell share the passes over the
    unedited cell. Raises InputError for genes that are not of the vocabulary.
    """
    readout = readout or MaskedGeneReadout()
    wanted = None if isinstance(genes, str) else _checked(genes, vocabulary)
    edited_of = _edited_genes(edits)
    known: dict[bytes, _Found] = {}
    changes = []
    for edit in edits:
        kept = np.arange(len(edit.kept)) if wanted is None else np.flatnonzero(np.isin(edit.tokens[edit.kept], wanted))
        groups = list(_groups(edit, kept, vocabulary, readout))
        edited_e = np.array(edit.genes, dtype=np.int64)
        of_cell_e = edited_of[edit.baseline.tobytes()]
        before = [_hidden(edit.baseline, edit.kept_baseline[group], of_cell_e, vocabulary) for group in groups]
        after = [_hidden(edit.tokens, edit.kept[group], edited_e, vocabulary) for group in groups]
        missing = [one for one in before if one.key not in known]
        found = _log_probabilities(model, [*missing, *after], readout.tokens_per_batch)
        known |= {one.key: values for one, values in zip(missing, found, strict=False)}
        before_k, after_k = np.zeros(len(edit.kept)), np.zeros(len(edit.kept))
        for group, one, values in zip(groups, before, found[len(missing) :], strict=True):
            before_k[group] = known[one.key].without(np.isin(of_cell_e, edited_e))
            after_k[group] = values.without(np.ones(len(edited_e), dtype=bool))
        changes.append(
            MaskedGeneChange(
                genes_k=edit.tokens[edit.kept][kept].astype(np.int64), before_k=before_k[kept], after_k=after_k[kept]
            )
        )
    return changes


def passes_of_cell(
    tokens_t: np.ndarray, vocabulary: Vocabulary, *, genes: Sequence[int] | Literal["all"], readout: MaskedGeneReadout
) -> tuple[int, int]:
    """How many passes each variant of a cell takes, and how many of `genes` are hidden in them."""
    span = gene_span(tokens_t, vocabulary)
    hidden_t = np.zeros(len(tokens_t), dtype=bool)
    hidden_t[span] = isinstance(genes, str) or np.isin(tokens_t[span], np.asarray(genes, dtype=np.int64))
    return len(np.unique(_dealt(span, len(tokens_t), readout)[hidden_t])), int(hidden_t.sum())


def _edited_genes(edits: Sequence[Edit]) -> dict[bytes, np.ndarray]:
    """The genes `(e,)` that any of the edits of a cell edits, by the tokens of the cell."""
    genes: dict[bytes, dict[int, None]] = {}
    for edit in edits:
        genes.setdefault(edit.baseline.tobytes(), {}).update(dict.fromkeys(edit.genes))
    return {cell: np.array(list(of_cell), dtype=np.int64) for cell, of_cell in genes.items()}


def _checked(genes: Sequence[int], vocabulary: Vocabulary) -> np.ndarray:
    tokens = np.asarray(list(genes), dtype=np.int64)
    if strange := sorted(set(tokens.tolist()) - set(vocabulary.token_ids.tolist())):
        raise InputError(
            f"token {strange[0]} is no gene of the vocabulary.",
            where=vocabulary.name,
            fix="Give tokens of genes, as `Vocabulary.token` finds them.",
        )
    return tokens


def _groups(edit: Edit, kept: np.ndarray, vocabulary: Vocabulary, readout: MaskedGeneReadout) -> Iterator[np.ndarray]:
    """`kept`, dealt into groups that are hidden together.

    A gene's group follows from the unedited cell alone, so edits of one cell hide the same genes and can be compared.
    """
    dealt_t = _dealt(gene_span(edit.baseline, vocabulary), len(edit.baseline), readout)
    group_k = dealt_t[edit.kept_baseline[kept]]
    for group in np.unique(group_k):
        yield kept[group_k == group]


def _dealt(span: slice, n_tokens: int, readout: MaskedGeneReadout) -> np.ndarray:
    """The group `(t,)` of every gene of a cell; special tokens have none (-1)."""
    n_genes = span.stop - span.start
    size = max(1, int(n_genes * readout.hidden_share))
    number = -(-n_genes // size)
    dealt_t = np.full(n_tokens, -1, dtype=np.int64)
    if n_genes:
        dealt_t[span] = np.random.default_rng(readout.seed).permutation(n_genes) % number
    return dealt_t


@dataclass(frozen=True, eq=False)
class _Hidden:
    """A cell `(t,)` with genes behind `<mask>`: where `(m,)`, what stood there `(m,)`, and edited genes `(e,)`."""

    tokens: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    edited: np.ndarray

    @property
    def key(self) -> bytes:
        return self.tokens.tobytes() + self.labels.tobytes()


@dataclass(frozen=True, eq=False)
class _Found:
    """Log-probabilities at the hidden places of a cell: of what stood there `(m,)`, of edited genes `(m, e)`."""

    label_m: np.ndarray
    edited_me: np.ndarray

    def without(self, which_e: np.ndarray) -> np.ndarray:
        """Log-probability (m,) of what stood there, given that it is none of these edited genes."""
        taken_m = np.exp(self.edited_me[:, which_e]).sum(axis=1)
        # A probability within rounding of 1 leaves nothing to divide by.
        return self.label_m - np.log1p(-np.minimum(taken_m, 1.0 - 1e-12))


def _hidden(tokens_t: np.ndarray, positions: np.ndarray, edited_e: np.ndarray, vocabulary: Vocabulary) -> _Hidden:
    tokens = tokens_t.astype(np.int64)
    labels = tokens[positions]
    tokens[positions] = vocabulary.mask
    return _Hidden(tokens, positions, labels, edited_e)


def _log_probabilities(model: MaskedGeneModel, cells: Sequence[_Hidden], tokens_per_batch: int) -> list[_Found]:
    """What the model makes of the hidden places of each cell."""
    import torch

    from genescale.training.model import pack

    device = next(model.parameters()).device
    found: list[_Found] = []
    with torch.inference_mode():
        for chunk in _chunks(cells, tokens_per_batch):
            starts = np.cumsum([0, *(len(one.tokens) for one in chunk)])
            places = [start + one.positions for start, one in zip(starts, chunk, strict=False)]
            positions_m = torch.from_numpy(np.concatenate(places)).to(device)
            logits_mv = model(pack([one.tokens for one in chunk]).to(device), positions_m).double()
            for one, of_cell_mv in zip(chunk, logits_mv.split([len(one.labels) for one in chunk]), strict=True):
                log_mv = torch.log_softmax(of_cell_mv, dim=-1)
                labels_m1 = torch.from_numpy(one.labels)[:, None].to(device)
                edited_me = log_mv[:, torch.from_numpy(one.edited).to(device)]
                found.append(_Found(log_mv.gather(1, labels_m1)[:, 0].cpu().numpy(), edited_me.cpu().numpy()))
    return found


def _chunks(cells: Sequence[_Hidden], tokens_per_batch: int) -> Iterator[list[_Hidden]]:
    chunk: list[_Hidden] = []
    n_tokens = 0
    for one in cells:
        if chunk and n_tokens + len(one.tokens) > tokens_per_batch:
            yield chunk
            chunk, n_tokens = [], 0
        chunk.append(one)
        n_tokens += len(one.tokens)
    if chunk:
        yield chunk
