"""What a head reads from the encoder and what it answers: the part of a bundle's head that is not numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genescale.platform.errors import SettingsError
from genescale.training.embedder import HeadPooling, Layer

HeadKind = Literal["cell_classes", "gene_classes", "number"]
BUNDLE_KINDS: dict[HeadKind, str] = {
    "cell_classes": "cell_classifier",
    "gene_classes": "gene_classifier",
    "number": "cell_regressor",
}
SEVERAL = "multi_task"
HEAD_BUNDLES = (*BUNDLE_KINDS.values(), SEVERAL)


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What a head reads and what it answers."""

    label: str
    """What the answer is called: the corpus column, or the name of the gene task."""
    width: int
    """Width of the vector."""
    layer: Layer
    pooling: HeadPooling
    """How a cell becomes one vector; heads of gene classes read the gene's own token and do not pool."""
    classes: tuple[str, ...] = ()
    """Two or more names; empty for a number."""
    kind: HeadKind = "cell_classes"
    type: Literal["linear", "nearest"] = "linear"
    hidden: int = 0
    """Width of the hidden layers; 0 makes the head linear."""
    depth: int = 1
    """Hidden layers, when `hidden` is not 0."""
    dropout: float = 0.1
    activation: Literal["relu", "tanh"] = "relu"
    """Of the hidden layers; published classifiers use tanh."""
    neighbours: int = 15
    """Labelled examples that vote; type `nearest`."""
    weight: float = 1.0
    """How much an example counts in the loss beside other heads."""
    genes: int = 0
    """Size of the vocabulary each gene of which has a weight of its own for every class; 0 means that none has."""

    def __post_init__(self) -> None:
        if self.kind == "number":
            if self.classes:
                raise SettingsError("a head that answers a number has no classes.", where=self.label)
        elif len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise SettingsError(f"{len(self.classes)} classes, or one named twice.", fix="A head needs two or more.")
        if self.genes and (self.type, self.kind) != ("linear", "cell_classes"):
            raise SettingsError("only linear heads of cell classes have weights of genes.", where=self.label)
        if self.width < 1 or self.hidden < 0 or self.depth < 1 or self.neighbours < 1 or not 0 <= self.dropout < 1:
            raise SettingsError(
                f"width {self.width}, hidden {self.hidden}, depth {self.depth}, neighbours {self.neighbours}, dropout "
                f"{self.dropout} make no head."
            )

    @property
    def outputs(self) -> int:
        """Numbers in one answer: one for each class, or one."""
        return len(self.classes) or 1

    @property
    def hidden_layers(self) -> int:
        """Layers before the output."""
        return self.depth if self.hidden else 0


def bundle_kind(specs: Sequence[HeadSpec]) -> str:
    """The kind of bundle that holds these heads."""
    return SEVERAL if len(specs) > 1 else BUNDLE_KINDS[specs[0].kind]
