"""A model bundle as a function from cells to vectors.

Axis suffixes: `n` cells, `t` tokens of one cell or of a packed batch, `d` width, `g` genes.

The published code numbers layers from the end: 0 is the last encoder layer and -1, its default, the one before. Here
they are `last` and `second_to_last`. Only the layers up to the wanted one are computed, and no vocabulary logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, LimitError, SettingsError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.choices import LAYERS as LAYERS
from genescale.training.choices import POOLINGS as POOLINGS
from genescale.training.choices import TOKENS_PER_BATCH as TOKENS_PER_BATCH
from genescale.training.choices import HeadPooling as HeadPooling
from genescale.training.choices import Layer as Layer
from genescale.training.choices import Pooling as Pooling
from genescale.training.choices import Precision as Precision
from genescale.training.deletions import Deletions, has_short_cut
from genescale.training.model import Encoder, PackedBatch, pack
from genescale.training.weights import load_encoder


def layers_to_run(layer: Layer, n_layers: int) -> int:
    """How many encoder layers give `layer`; SettingsError for a name that is not a layer."""
    if layer not in LAYERS:
        raise SettingsError(f"'{layer}' is not a layer.", where="layer", fix=f"Use one of {', '.join(LAYERS)}.")
    return n_layers if layer == "last" else n_layers - 1


def check_pooling(pooling: HeadPooling, vocabulary: Vocabulary) -> None:
    """Raise SettingsError for an unknown pooling, and for `cls` with a vocabulary that has no <cls>."""
    if pooling not in get_args(HeadPooling):
        raise SettingsError(f"'{pooling}' is not a pooling.", where="pooling", fix=f"Use one of {', '.join(POOLINGS)}.")
    if pooling == "cls" and vocabulary.cls is None:
        raise SettingsError(
            f"vocabulary '{vocabulary.name}' has no <cls> token to take the cell embedding from.",
            where="pooling",
            fix="Use pooling 'mean_genes'.",
        )


def pick_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda` or `cuda:1`; SettingsError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise SettingsError(
            f"'{device}' is not a device.", where="device", fix="Use auto, cpu, cuda or cuda:1."
        ) from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "torch sees no CUDA device.",
            where="device",
            fix="Use device 'cpu' or 'auto', or install a CUDA build of torch.",
        )
    return chosen


def plan_batches(lengths_n: np.ndarray, tokens_per_batch: int) -> Iterator[np.ndarray]:
    """Positions of cells, longest first, cut so that no batch of several cells has more than `tokens_per_batch` tokens.

    Ties in length keep their order, so the plan is a function of its arguments alone.
    """
    order_n = np.argsort(-lengths_n, kind="stable")
    start, tokens = 0, 0
    for stop, length in enumerate(lengths_n[order_n]):
        if stop > start and tokens + length > tokens_per_batch:
            yield order_n[start:stop]
            start, tokens = stop, 0
        tokens += int(length)
    if start < len(order_n):
        yield order_n[start:]


def pool(hidden_td: torch.Tensor, batch: PackedBatch, pooling: HeadPooling, specials: torch.Tensor) -> torch.Tensor:
    """Hidden states (t, d) of a packed batch to one vector per cell, (n, d); keeps gradients.

    `cls` and `first_token` take the first token of each cell; `mean_genes` the mean over its tokens that are not in
    `specials`.
    """
    if pooling != "mean_genes":
        return hidden_td[batch.offsets[:-1].long()]
    if len(batch.lengths) == 1:
        return hidden_td[~torch.isin(batch.tokens_t, specials)].mean(dim=0, keepdim=True)
    gene_t = ~torch.isin(batch.tokens_t, specials)
    cell_t = batch.cells_t()[gene_t]
    sums_nd = hidden_td.new_zeros(len(batch.lengths), hidden_td.shape[1]).index_add(0, cell_t, hidden_td[gene_t])
    return sums_nd / torch.bincount(cell_t, minlength=len(batch.lengths)).unsqueeze(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class HiddenBatch:
    """Hidden states of some of the cells that were asked for."""

    cells: np.ndarray
    """(n) int64: positions among the asked cells, in the order of the packed stream."""
    batch: PackedBatch
    hidden_td: torch.Tensor
    """(t, d) float32 on the embedder's device."""

    def per_cell(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each cell's position and its hidden states (t, d), specials included."""
        return zip(self.cells.tolist(), self.hidden_td.split(self.batch.lengths), strict=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class GeneTable:
    """Mean embedding of every gene that occurs in some cells, by rising token id."""

    gene_ids: tuple[str, ...]
    tokens_g: np.ndarray
    """(g) int64."""
    embeddings_gd: np.ndarray
    """(g, d) float32; the mean over the cells that have the gene."""
    cells_g: np.ndarray
    """(g) int64: how many cells have the gene."""


class Embedder:
    """The encoder of one bundle, ready to embed tokenised cells.

    On a CPU every cell is computed by itself: a batch of n equals n single calls bit for bit, and it costs nothing from
    about 120 tokens a cell on (measured on two cores: 17,300 against 19,000 tokens/s at 120 tokens, 15,600 against
    15,000 at 600, width 256). On CUDA cells are packed up to `tokens_per_batch`, longest first; results then depend on
    their neighbours in the last bits only.
    """

    def __init__(
        self, bundle: Bundle, encoder: Encoder, *, device: torch.device, tokens_per_batch: int, precision: Precision
    ) -> None:
        self.bundle, self.vocabulary = bundle, bundle.vocabulary
        self.device, self.tokens_per_batch, self.precision = device, tokens_per_batch, precision
        self._encoder = encoder.to(device).requires_grad_(False).eval()
        self._specials = torch.tensor(sorted(self.vocabulary.special.values()), device=device)

    @classmethod
    def load(
        cls,
        bundle: Bundle,
        *,
        device: str = "auto",
        tokens_per_batch: int = TOKENS_PER_BATCH,
        attention: str = "auto",
        precision: Precision = "float32",
    ) -> Embedder:
        """The embedder of a verified bundle, whatever its kind; `device` is auto, cpu, cuda or cuda:N.

        The 16-bit precisions hold where torch's autocast does; the variable-length CUDA kernel needs one of them.
        Single-gene shifts are smaller than the rounding of bfloat16: that one is for embeddings, not for perturbation.
        """
        if tokens_per_batch < 1:
            raise SettingsError(f"tokens_per_batch is {tokens_per_batch}.", fix="Use a whole number of at least 1.")
        if precision not in get_args(Precision):
            raise SettingsError(
                f"'{precision}' is not a precision.", fix=f"Use one of {', '.join(get_args(Precision))}."
            )
        encoder = load_encoder(bundle, attention=attention)
        return cls(bundle, encoder, device=pick_device(device), tokens_per_batch=tokens_per_batch, precision=precision)

    @property
    def encoder(self) -> Encoder:
        """The encoder itself, for what reads more of it than embeddings: in evaluation mode, without gradients."""
        return self._encoder

    @property
    def width(self) -> int:
        """Numbers in one embedding."""
        return self._encoder.config.width

    @property
    def window(self) -> int:
        """Longest cell in tokens, specials included."""
        return min(self.vocabulary.window, self._encoder.config.positions)

    def embed_cells(
        self, cells: Sequence[np.ndarray], *, layer: Layer = "second_to_last", pooling: HeadPooling = "mean_genes"
    ) -> np.ndarray:
        """One vector per cell: (n, d) float32, in the order of `cells` (token arrays as `rank_value_tokens` makes).

        `mean_genes` is the mean over gene tokens, special tokens excluded; `cls` is the vector of <cls>.
        Raises InputError for a cell without genes or with tokens outside the vocabulary, LimitError for one longer than
        the window, SettingsError for `cls` with a vocabulary that has none.
        """
        check_pooling(pooling, self.vocabulary)
        if pooling == "cls":
            self._check_framed(cells)
        embeddings_nd = np.empty((len(cells), self.width), dtype=np.float32)
        for found in self.hidden(cells, layer=layer):
            pooled_nd = pool(found.hidden_td, found.batch, pooling, self._specials)
            embeddings_nd[found.cells] = pooled_nd.cpu().numpy()
        return embeddings_nd

    def embed_genes(self, cells: Sequence[np.ndarray], *, layer: Layer = "second_to_last") -> list[np.ndarray]:
        """One vector per token of each cell, special tokens included: (t, d) float32 each, in the order of `cells`."""
        embeddings: list[np.ndarray] = [np.empty(0)] * len(cells)
        for found in self.hidden(cells, layer=layer):
            for position, hidden_td in found.per_cell():
                embeddings[position] = hidden_td.cpu().numpy()
        return embeddings

    def hidden(self, cells: Sequence[np.ndarray], *, layer: Layer = "second_to_last") -> Iterator[HiddenBatch]:
        """The hidden states of all cells, batch by batch, so that a caller can reduce them without holding them all."""
        return (found[0] for found in self.hidden_of_layers(cells, (layer,)))

    def hidden_of_layers(
        self, cells: Sequence[np.ndarray], layers: Sequence[Layer]
    ) -> Iterator[tuple[HiddenBatch, ...]]:
        """As `hidden`, for several layers of one run through the encoder, in the order of `layers`."""
        counts = [layers_to_run(layer, self._encoder.config.layers) for layer in layers]
        check_cells(cells, self.vocabulary, self.window)
        lengths_n = np.fromiter((len(cell) for cell in cells), dtype=np.int64, count=len(cells))
        budget = 1 if self.device.type == "cpu" else self.tokens_per_batch
        for positions_n in plan_batches(lengths_n, budget):
            batch = pack([cells[i] for i in positions_n]).to(self.device)
            yield tuple(
                HiddenBatch(cells=positions_n, batch=batch, hidden_td=hidden_td)
                for hidden_td in self._run(batch, counts)
            )

    def shares_first_layer(self, layers: Sequence[Layer]) -> bool:
        """Whether `deletions` can be had for these layers.

        Not on CUDA, in bfloat16, with an attention back end that was asked for by name, for encoders that mix
        neighbouring ranks before the first layer, or for a state below it.
        """
        counts = [layers_to_run(layer, self._encoder.config.layers) for layer in layers]
        return self.device.type == "cpu" and self.precision == "float32" and has_short_cut(self._encoder, counts)

    @torch.inference_mode()
    def deletions(self, cell: np.ndarray, layers: Sequence[Layer]) -> Deletions:
        """A cell prepared to be encoded without one of its tokens: worth it from about ten times on.

        The hidden states are those of `hidden`, in other last bits. Only where `shares_first_layer`.
        """
        check_cells([cell], self.vocabulary, self.window)
        return Deletions(self._encoder, cell, [layers_to_run(layer, self._encoder.config.layers) for layer in layers])

    @torch.inference_mode()
    def _run(self, batch: PackedBatch, counts: Sequence[int]) -> list[torch.Tensor]:
        """Hidden states after so many layers each."""
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            if len(counts) == 1:
                return [self._encoder(batch, layers=counts[0]).float()]
            states = self._encoder.hidden_states(batch, layers=max(counts))
            return [states[count].float() for count in counts]

    def _check_framed(self, cells: Sequence[np.ndarray]) -> None:
        for position, cell in enumerate(cells):
            if len(cell) and cell[0] != self.vocabulary.cls:
                raise InputError(
                    "the cell does not begin with <cls>.",
                    where=f"cell {position}",
                    fix="Rank it with this vocabulary, or use pooling 'mean_genes'.",
                )


def gene_table(embedder: Embedder, cells: Sequence[np.ndarray], *, layer: Layer = "second_to_last") -> GeneTable:
    """The mean embedding of every gene over the cells that have it (the published `gene` table; specials left out)."""
    size = embedder.vocabulary.size
    sums_td = torch.zeros(size, embedder.width, dtype=torch.float64, device=embedder.device)
    cells_t = torch.zeros(size, dtype=torch.int64, device=embedder.device)
    for found in embedder.hidden(cells, layer=layer):
        sums_td.index_add_(0, found.batch.tokens_t, found.hidden_td.double())
        cells_t += torch.bincount(found.batch.tokens_t, minlength=size)
    cells_t[torch.tensor(list(embedder.vocabulary.special.values()), device=embedder.device)] = 0
    tokens_g = torch.nonzero(cells_t).flatten()
    means_gd = sums_td[tokens_g] / cells_t[tokens_g].unsqueeze(1)
    return GeneTable(
        gene_ids=tuple(embedder.vocabulary.gene_of_token(token) for token in tokens_g.tolist()),
        tokens_g=tokens_g.cpu().numpy(),
        embeddings_gd=means_gd.float().cpu().numpy(),
        cells_g=cells_t[tokens_g].cpu().numpy(),
    )


def check_cells(cells: Sequence[np.ndarray], vocabulary: Vocabulary, window: int) -> None:
    """Refuse the first cell that cannot be embedded: InputError (no genes, foreign tokens), LimitError (too long)."""
    specials = np.array(sorted(vocabulary.special.values()))
    for position, cell in enumerate(cells):
        where = f"cell {position}"
        if len(cell) > window:
            raise LimitError(
                f"the cell has {len(cell):,} tokens, the window is {window:,}.",
                where=where,
                fix="Rank cells with the vocabulary of this model: it crops them to the window.",
            )
        if len(cell) and (int(np.min(cell)) < 0 or int(np.max(cell)) >= vocabulary.size):
            raise InputError(
                f"the cell has a token outside 0 to {vocabulary.size - 1}.",
                where=where,
                fix=f"Tokenise it with vocabulary '{vocabulary.name}' ({vocabulary.digest[:12]}).",
            )
        if len(cell) <= len(specials) and np.isin(cell, specials).all():
            raise InputError(
                "the cell has no gene of the vocabulary.", where=where, fix="Leave empty cells out before embedding."
            )
        if (np.asarray(cell) == vocabulary.pad).any():
            raise InputError("the cell holds <pad>.", where=where, fix="Give each cell without padding.")
