"""The cell-class head: from the vector of a cell to the probability of each class, and back from a bundle.

Axis suffixes: `b` or `n` cells, `d` width of the cell vector, `c` classes.

A bundle of kind `cell_classifier` is a bundle of its encoder with two files more: `head.json` (classes, layer, pooling,
shape) and `head.safetensors` (weights, and the mean and scale that standardise its input).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.platform.settings import build
from genescale.training.embedder import TOKENS_PER_BATCH, Embedder, HeadPooling, Layer

KIND = "cell_classifier"
HEAD_JSON, HEAD_TENSORS = "head.json", "head.safetensors"
SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a head reads and what it answers."""

    classes: tuple[str, ...]
    label: str
    """Corpus column the classes come from."""
    width: int
    """Width of the cell vector."""
    layer: Layer
    pooling: HeadPooling
    hidden: int = 0
    """Width of a hidden layer; 0 makes the head linear."""
    dropout: float = 0.1
    activation: Literal["relu", "tanh"] = "relu"
    """Of the hidden layer; published classifiers use tanh."""

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise SettingsError(f"{len(self.classes)} classes, or one named twice.", fix="A head needs two or more.")
        if self.width < 1 or self.hidden < 0 or not 0 <= self.dropout < 1:
            raise SettingsError(f"width {self.width}, hidden {self.hidden}, dropout {self.dropout} make no head.")


class CellClassHead(nn.Module):
    """Standardise, drop out, then one linear layer, or two with an activation between."""

    mean_d: torch.Tensor
    scale_d: torch.Tensor

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("mean_d", torch.zeros(spec.width))
        self.register_buffer("scale_d", torch.ones(spec.width))
        self.dropout = nn.Dropout(spec.dropout)
        self.widen = nn.Linear(spec.width, spec.hidden) if spec.hidden else None
        self.output = nn.Linear(spec.hidden or spec.width, len(spec.classes))

    def standardise(self, cells_nd: np.ndarray) -> None:
        """Set mean and scale from the vectors of training cells, (n, d).

        The coordinates of an embedding differ in size by orders of magnitude; without this the small ones never count.
        """
        mean_d, scale_d = cells_nd.mean(axis=0, dtype=np.float64), cells_nd.std(axis=0, dtype=np.float64)
        self.mean_d.copy_(torch.from_numpy(mean_d))
        self.scale_d.copy_(torch.from_numpy(np.maximum(scale_d, SMALLEST_SCALE)))

    def forward(self, cells_bd: torch.Tensor) -> torch.Tensor:
        """Logits (b, c)."""
        hidden = self.dropout((cells_bd - self.mean_d) / self.scale_d)
        if self.widen is not None:
            activation = torch.tanh if self.spec.activation == "tanh" else torch.relu
            hidden = self.dropout(activation(self.widen(hidden)))
        return self.output(hidden)

    @torch.inference_mode()
    def probabilities(self, cells_nd: np.ndarray) -> np.ndarray:
        """Class probabilities (n, c) float32 of cell vectors; in evaluation mode, whatever the mode was."""
        was_training, device = self.training, self.mean_d.device
        self.eval()
        answers = torch.softmax(self(torch.as_tensor(cells_nd, device=device)), dim=1).cpu().numpy()
        self.train(was_training)
        return answers

    def to_files(self) -> dict[str, bytes | Mapping[str, np.ndarray]]:
        """The files of this head for `write_bundle(extra=…)`."""
        text = json.dumps({"schema_version": 1, **asdict(self.spec)}, indent=2)
        tensors = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in self.state_dict().items()}
        return {HEAD_JSON: text.encode(), HEAD_TENSORS: tensors}


def head_of(bundle: Bundle) -> CellClassHead:
    """The head in a bundle, in evaluation mode; InputError when it has none, IntegrityError when it is broken."""
    if bundle.kind != KIND:
        raise InputError(
            f"the bundle is a '{bundle.kind}', not a '{KIND}'.",
            where=str(bundle.folder),
            fix="Fit a head first: genescale finetune MODEL --corpus URI --label COLUMN.",
        )
    content: dict[str, Any] = json.loads(bundle.read(HEAD_JSON))
    if content.pop("schema_version", None) != 1:
        raise IntegrityError(
            "head.json has another schema version.", where=str(bundle.folder), fix="Fit the head anew."
        )
    with torch.device("meta"):  # no weights are drawn, so that loading leaves torch's random state alone
        head = CellClassHead(build(HeadSpec, content, where=f"{bundle.folder}/{HEAD_JSON}"))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in bundle.tensors(HEAD_TENSORS).items()}
    try:
        head.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise IntegrityError(f"head.safetensors does not fit head.json: {error}.", where=str(bundle.folder)) from error
    return head.eval()


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Classes of some cells, in their order."""

    labels: tuple[str, ...]
    """The most probable class of each cell."""
    probabilities_nc: np.ndarray
    """(n, c) float32; columns as in `classes`."""
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CellClassifier:
    """An encoder and its head: tokenised cells to classes."""

    embedder: Embedder
    head: CellClassHead

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes it knows, in the order of the probability columns."""
        return self.head.spec.classes

    def predict(self, cells: Sequence[np.ndarray]) -> Prediction:
        """Class and probabilities of each cell; raises as `Embedder.embed_cells` does."""
        spec = self.head.spec
        cells_nd = self.embedder.embed_cells(cells, layer=spec.layer, pooling=spec.pooling)
        probabilities_nc = self.head.probabilities(cells_nd)
        labels = tuple(self.classes[code] for code in probabilities_nc.argmax(axis=1))
        return Prediction(labels=labels, probabilities_nc=probabilities_nc, classes=self.classes)


def load_classifier(
    bundle: Bundle, *, device: str = "auto", tokens_per_batch: int = TOKENS_PER_BATCH, attention: str = "auto"
) -> CellClassifier:
    """The classifier in a verified bundle of kind `cell_classifier`; InputError for another kind."""
    head = head_of(bundle)
    embedder = Embedder.load(bundle, device=device, tokens_per_batch=tokens_per_batch, attention=attention)
    return CellClassifier(embedder=embedder, head=head.to(embedder.device))
