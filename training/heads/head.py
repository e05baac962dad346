"""The two heads: a small network that is trained, and a vote of nearest labelled examples that is not.

Axis suffixes: `r` or `b` rows (one vector each), `d` width, `c` classes (1 for a number), `k` reference examples,
`m` neighbours, `v` genes of the vocabulary by token.

A network may have a weight for each gene and class beside it, a linear model on which genes a cell has; it then answers
with the mean of both logits.

Both standardise their input with the mean and scale of the training rows: the coordinates of an embedding differ in
size by orders of magnitude, and without this the small ones never count. A number is learned in standard units too and
answered in its own.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from genescale.platform.errors import InputError
from genescale.training.heads.spec import HeadSpec

SMALLEST_SCALE = 1e-6
SMALLEST_DISTANCE = 1e-6
ROWS_AT_ONCE = 65_536
SIMILARITIES_AT_ONCE = 8_000_000


class Head(nn.Module):
    """From vectors of the encoder to class probabilities or numbers."""

    mean_d: torch.Tensor
    scale_d: torch.Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean_d", torch.zeros(spec.width))
        self.register_buffer("scale_d", torch.ones(spec.width))

    def standardise(self, rows_rd: np.ndarray) -> None:
        """Set mean and scale from the vectors of training rows, (r, d)."""
        mean_d, scale_d = rows_rd.mean(axis=0, dtype=np.float64), rows_rd.std(axis=0, dtype=np.float64)
        self.mean_d.copy_(torch.from_numpy(mean_d))
        self.scale_d.copy_(torch.from_numpy(np.maximum(scale_d, SMALLEST_SCALE)))

    def standard(self, rows_bd: torch.Tensor) -> torch.Tensor:
        """Rows (b, d) with mean 0 and scale 1 over the training rows."""
        return (rows_bd - self.mean_d) / self.scale_d

    @torch.inference_mode()
    def answer(self, rows_rd: np.ndarray, cells: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Probabilities (r, c), or numbers (r, 1) in the target's unit, float32; in evaluation mode whatever it was.

        cells: the tokens of the cell behind each row; only a head with weights of genes looks at them, and raises
        InputError without.
        """
        was_training, device = self.training, self.mean_d.device
        self.eval()
        answers_rc = np.empty((len(rows_rd), self.spec.outputs), dtype=np.float32)
        step = self._rows_at_once()
        for start in range(0, len(rows_rd), step):
            rows_bd = torch.as_tensor(rows_rd[start : start + step], device=device)
            found = self._answer(rows_bd, None if cells is None else cells[start : start + step])
            answers_rc[start : start + step] = found.cpu().numpy()
        self.train(was_training)
        return answers_rc

    @abstractmethod
    def _answer(self, rows_bd: torch.Tensor, cells: Sequence[np.ndarray] | None) -> torch.Tensor:
        """Answers (b, c) of some rows."""

    def _rows_at_once(self) -> int:
        return ROWS_AT_ONCE


class LinearHead(Head):
    """Standardise, drop out, then hidden layers (none by default) with an activation and dropout each, then linear."""

    target_mean_1: torch.Tensor
    target_scale_1: torch.Tensor
    gene_weights_vc: torch.Tensor
    gene_bias_c: torch.Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        if spec.kind == "number":
            self.register_buffer("target_mean_1", torch.zeros(1))
            self.register_buffer("target_scale_1", torch.ones(1))
        if spec.genes:
            self.register_buffer("gene_weights_vc", torch.zeros(spec.genes, spec.outputs))
            self.register_buffer("gene_bias_c", torch.zeros(spec.outputs))
        self.dropout = nn.Dropout(spec.dropout)
        widths = [spec.width] + [spec.hidden] * spec.hidden_layers
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], spec.outputs)

    def standardise_target(self, numbers_r: np.ndarray) -> None:
        """Set mean and scale of the number from its training values (r); those that are missing (NaN) do not count."""
        self.target_mean_1.fill_(float(np.nanmean(numbers_r)))
        self.target_scale_1.fill_(max(float(np.nanstd(numbers_r)), SMALLEST_SCALE))

    def standard_target(self, numbers_b: torch.Tensor) -> torch.Tensor:
        """Numbers (b) in standard units."""
        return (numbers_b - self.target_mean_1) / self.target_scale_1

    def forward(self, rows_bd: torch.Tensor) -> torch.Tensor:
        """Logits (b, c), or numbers in standard units (b, 1)."""
        return self.from_standard(self.standard(rows_bd))

    def from_standard(self, rows_bd: torch.Tensor) -> torch.Tensor:
        """As `forward`, for rows that are standardised already: a fit on cached vectors does that once."""
        hidden = self.dropout(rows_bd)
        activation = torch.tanh if self.spec.activation == "tanh" else torch.relu
        for layer in self.hidden:
            hidden = self.dropout(activation(layer(hidden)))
        return self.output(hidden)

    def _answer(self, rows_bd: torch.Tensor, cells: Sequence[np.ndarray] | None) -> torch.Tensor:
        outputs_bc = self(rows_bd)
        if self.spec.genes:
            outputs_bc = (outputs_bc + self._of_genes(cells)) / 2
        if self.spec.kind == "number":
            return outputs_bc * self.target_scale_1 + self.target_mean_1
        return torch.softmax(outputs_bc, dim=1)

    def _of_genes(self, cells: Sequence[np.ndarray] | None) -> torch.Tensor:
        """Logits (b, c) of the linear model on which genes each cell has."""
        if cells is None:
            raise InputError(
                f"the head '{self.spec.label}' has weights of genes, and the genes of the cells are not given.",
                fix="Ask it about cells, not about vectors.",
            )
        tokens = [torch.as_tensor(np.asarray(cell, dtype=np.int64), device=self.mean_d.device) for cell in cells]
        # Cell by cell, so that a cell's answer does not depend on the cells beside it.
        return torch.stack([self.gene_weights_vc[token_t].sum(dim=0) for token_t in tokens]) + self.gene_bias_c


class NearestHead(Head):
    """The `neighbours` labelled examples with the highest cosine to a row vote, each by one over its cosine distance.

    Cosines are between standardised vectors: raw vectors of an encoder share one large direction, beside which the
    difference between cells is small.
    """

    reference_kd: torch.Tensor
    targets_k: torch.Tensor

    def __init__(self, spec: HeadSpec, examples: int = 0) -> None:
        super().__init__(spec)
        self.register_buffer("reference_kd", torch.zeros(examples, spec.width))
        codes = torch.float32 if spec.kind == "number" else torch.int64
        self.register_buffer("targets_k", torch.zeros(examples, dtype=codes))

    def remember(self, rows_rd: np.ndarray, targets_r: np.ndarray) -> None:
        """Keep labelled training rows (r, d) and their codes or numbers (r) as the reference."""
        self.standardise(rows_rd)
        rows = torch.from_numpy(np.ascontiguousarray(rows_rd, dtype=np.float32))
        self.reference_kd = functional.normalize(self.standard(rows), dim=1)
        self.targets_k = torch.from_numpy(np.asarray(targets_r)).to(self.targets_k.dtype)

    def _answer(self, rows_bd: torch.Tensor, cells: Sequence[np.ndarray] | None) -> torch.Tensor:
        similarity_bk = functional.normalize(self.standard(rows_bd), dim=1) @ self.reference_kd.T
        nearest_bm, which_bm = similarity_bk.topk(min(self.spec.neighbours, len(self.targets_k)), dim=1)
        vote_bm = 1 / (1 - nearest_bm).clamp_min(SMALLEST_DISTANCE)
        vote_bm = vote_bm / vote_bm.sum(dim=1, keepdim=True)
        targets_bm = self.targets_k[which_bm]
        if self.spec.kind == "number":
            return (vote_bm * targets_bm).sum(dim=1, keepdim=True)
        return vote_bm.new_zeros(len(rows_bd), self.spec.outputs).scatter_add_(1, targets_bm, vote_bm)

    def _rows_at_once(self) -> int:
        return max(1, SIMILARITIES_AT_ONCE // max(1, len(self.targets_k)))


def new_head(spec: HeadSpec) -> Head:
    """An unfitted head of this form; a network draws its weights from torch's current random state."""
    return NearestHead(spec) if spec.type == "nearest" else LinearHead(spec)
