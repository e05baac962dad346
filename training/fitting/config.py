"""What is fitted on which cells or genes, how the data are split, and how the fit runs: one flat, checked record.

Every field can stand in a TOML file (`genescale finetune --config`) and in the search space of a sweep. What cannot be
known without the corpus (whether a column exists, whether there are enough donors) is checked by `prepare`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genescale.platform.errors import SettingsError
from genescale.training.averaging import check_average
from genescale.training.embedder import TOKENS_PER_BATCH, HeadPooling, Layer
from genescale.training.labels.splits import check_fractions

TargetKind = Literal["classes", "number"]
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TaskTarget:
    """One of several things that heads on one encoder learn from the same cells."""

    label: str
    """Corpus column."""
    kind: TargetKind = "classes"
    weight: float = 1.0
    """How much an example of this target counts in the loss."""

    def __post_init__(self) -> None:
        if not self.label:
            raise SettingsError("a target needs a column.", where="tasks: label", fix="Name a column of the corpus.")
        if not 0 < self.weight < float("inf"):
            raise SettingsError(
                f"{self.weight} is no weight.", where=f"tasks: {self.label}: weight", fix="Use a number above 0."
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is fitted on which cells or genes, and how. Defaults suit a cell-type head on a frozen encoder."""

    # What is learned.
    unit: Literal["cells", "genes"] = "cells"
    """`cells`: labels stand in corpus columns. `genes`: labels stand in gene lists, and a gene is read in its cells."""
    label: str = "cell_type"
    """Corpus column with the labels; for genes the name that the label gets."""
    kind: TargetKind = "classes"
    """Of `label`: names, or a number (age, dose)."""
    tasks: tuple[TaskTarget, ...] = ()
    """Several targets at once, each with its own head; empty means `label` alone. A cell may lack some of them."""
    genes: str = ""
    """Address of the gene lists (unit `genes`)."""
    where: str = ""
    """Polars SQL over the corpus' cell columns: only these cells are used; empty means all."""

    # Which part trains, chooses the epoch, and measures.
    split: Literal["grouped", "random", "balanced", "lists"] = "grouped"
    group: str = "donor_id"
    """Corpus column whose values never stand in two parts; splits `grouped` and `balanced`."""
    balance: tuple[str, ...] = ()
    """Columns whose values should be spread alike over the parts; split `balanced`."""
    lists: str = ""
    """Address of id lists, one for each part; split `lists`."""
    folds: int = 0
    """Cross-validation with so many folds; 0 means one split."""
    fractions: tuple[float, ...] = (0.8, 0.1, 0.1)
    """Train, validation and test parts."""
    min_cells_per_class: int = 1
    """Classes with fewer cells are left out, and counted."""
    max_cells: int = 0
    """Labelled cells used at most, drawn at random; for genes, cells they are read from. 0 means all."""
    max_cells_per_class: int = 0
    """Cells of one class used at most, drawn at random; 0 means all."""
    max_rows_per_gene: int = 100
    """Cells that one gene is read from at most, drawn at random; 0 means all."""

    # What the head reads, and what it is.
    layer: Layer = "second_to_last"
    pooling: HeadPooling = "mean_genes"
    """How a cell becomes one vector; a gene is read from its own token."""
    head: Literal["linear", "nearest"] = "linear"
    """`nearest` votes among the most similar labelled examples, without training."""
    neighbours: int = 15
    """Examples that vote; head `nearest`."""
    hidden: int = 0
    """Width of the head's hidden layers; 0 makes it linear."""
    depth: int = 1
    """Hidden layers, when `hidden` is not 0."""
    activation: Literal["relu", "tanh"] = "relu"
    """Of the hidden layers; published classifiers use tanh."""
    dropout: float = 0.1
    """Dropout of the head."""
    gene_weights: bool = False
    """Beside the network, a weight for each gene and class: a linear model on which genes a cell has, fitted by itself
    once the network is; the answer is the mean of both logits."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weighs a class by the inverse of its training examples."""
    label_smoothing: float = 0.0
    """Part of each label that is spread over all classes in training."""
    gene_dropout: float = 0.0
    """Share of a cell's genes that is left out at random, each time a trained encoder learns from the cell;
    the others keep their ranks."""

    # How it is fitted.
    encoder: Literal["frozen", "trained", "lora"] = "frozen"
    """`lora` trains low-rank additions to the encoder's matrices; they are merged into the weights at the end."""
    frozen_layers: int = 0
    """With a trained encoder: its first so many layers (and, from 1 on, the embeddings) stay as they are."""
    lora_rank: int = 8
    lora_alpha: float = 16.0
    """The additions are scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    lora_matrices: tuple[str, ...] = ("query", "value")
    """Which matrices get additions: some of query, key, value, output, widen, narrow."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder; the head and its loss are computed in fp32."""
    epochs: int = 50
    """Passes over the training examples at most."""
    patience: int = 10
    """Stop after so many epochs without a better one; 0 runs all epochs. The best epoch is kept either way."""
    refit: bool = False
    """Once the best epoch is known, fit again on train and validation together for so many epochs (frozen encoder)."""
    learning_rate: float = 1e-2
    """Highest learning rate of the head."""
    encoder_learning_rate: float = 5e-5
    """Highest learning rate of what is trained in the encoder."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = 0.05
    """Part of all steps in which the learning rate rises from zero."""
    weight_decay: float = 0.001
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    weight_average: float = 0.0
    """Judge and keep an average of the weights over the steps instead of the last ones: the mean age of what is
    averaged, as a share of the steps done (see `training/averaging.py`). 0 is none, 0.1 a good one, 0.5 the plain mean.
    """
    cells_per_batch: int = 64
    """Examples of a step on cached vectors; cells of a step when the encoder is trained."""
    tokens_per_batch: int = TOKENS_PER_BATCH
    """Most tokens of a batch when the encoder runs."""
    workers: int = 1
    """Processes that train the encoder together (Ray Train); 1 needs no Ray."""
    lanes: int = 4
    """Micro-batches of a step when the encoder is trained; `workers` must divide it, and it decides the batches."""
    zero_stage: int = 1
    """What DeepSpeed divides among several workers (see `OptimizerConfig`)."""
    compile: bool = False
    """Compile the encoder's layers; on CUDA only."""
    device: str = "auto"
    seed: int = 0
    """Of the fit: the first weights, the order of the rows, dropout."""
    data_seed: int | None = None
    """Draws which cells are used and how they are split; left out, `seed` does."""

    def __post_init__(self) -> None:
        check_fractions(self.fractions)
        self._check_ranges()
        self._check_data()
        self._check_fit()

    @property
    def drawing_seed(self) -> int:
        """The seed that draws cells and splits."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def targets(self) -> tuple[TaskTarget, ...]:
        """What is learned, one head for each."""
        return self.tasks or (TaskTarget(label=self.label, kind=self.kind),)

    def _check_ranges(self) -> None:
        zero = ("max_cells", "max_cells_per_class", "max_rows_per_gene", "folds", "patience")
        least = dict.fromkeys((*zero, "frozen_layers", "weight_decay", "hidden", "seed"), 0)
        one = ("epochs", "cells_per_batch", "tokens_per_batch", "depth", "neighbours", "lora_rank", "workers", "lanes")
        least |= dict.fromkeys((*one, "min_cells_per_class"), 1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SettingsError(f"{getattr(self, name)} is too small.", where=name, fix=f"Use {bound} or more.")
        for name in ("learning_rate", "encoder_learning_rate", "gradient_clip", "lora_alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingsError(f"{getattr(self, name)} is out of range.", where=name, fix="Use more than 0.")
        for name in ("warmup_fraction", "dropout", "lora_dropout", "label_smoothing", "gene_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{getattr(self, name)} is out of range.", where=name, fix="Use 0 up to below 1.")
        if self.folds == 1:
            raise SettingsError(
                "one fold is no cross-validation.", where="folds", fix="Use 0 (one split), or 2 or more."
            )

    def _check_data(self) -> None:
        needs = {
            "group": self.unit == "cells" and self.split in ("grouped", "balanced") and not self.group,
            "balance": self.split == "balanced" and not self.balance,
            "lists": self.split == "lists" and not self.lists,
            "genes": self.unit == "genes" and not self.genes,
            "label": not self.label and not self.tasks,
        }
        fixes = {
            "group": f"a {self.split} split needs a group column.|Name one, or split at random.",
            "balance": "a balanced split needs columns to balance.|For example balance = ['sex', 'age'].",
            "lists": "a split by lists needs the lists.|Give the address of a file with the ids of each part.",
            "genes": "a gene task needs gene lists.|Give their file: genes = 'genes.csv'.",
            "label": "nothing is to be learned.|Name a label column.",
        }
        for name, missing in needs.items():
            if missing:
                what, fix = fixes[name].split("|")
                raise SettingsError(what, where=name, fix=fix)
        numbers = any(target.kind == "number" for target in self.targets)
        if self.gene_weights and (self.unit == "genes" or numbers or self.head == "nearest"):
            raise SettingsError(
                "only networks that tell classes of cells apart have weights of genes beside them.",
                where="gene_weights",
                fix="Set gene_weights = false.",
            )
        if self.unit == "genes" and (self.tasks or self.kind == "number"):
            raise SettingsError(
                "genes have one label of classes.",
                where="tasks" if self.tasks else "kind",
                fix="Fit one task at a time.",
            )
        if self.folds and self.split == "lists":
            raise SettingsError("id lists say one split.", where="folds", fix="Set folds = 0.")
        labels = [target.label for target in self.tasks]
        if twice := _doubled(labels):
            raise SettingsError(f"'{twice}' stands there twice.", where="tasks", fix="Name each column once.")

    def _check_fit(self) -> None:
        if self.encoder == "frozen" and self.frozen_layers:
            raise SettingsError(
                "the whole encoder is frozen already.", where="frozen_layers", fix="Set encoder = 'trained' as well."
            )
        if self.encoder == "frozen" and self.workers > 1:
            raise SettingsError(
                "several workers train an encoder, and this one is frozen.",
                where="workers",
                fix="Set encoder = 'trained' or 'lora' as well, or workers = 1.",
            )
        check_average(self.weight_average, self.zero_stage)
        if self.weight_average and self.head == "nearest":
            raise SettingsError(
                "the nearest-neighbour head has no weights to average.",
                where="weight_average",
                fix="Set weight_average = 0, or head = 'linear'.",
            )
        if self.gene_dropout and (self.encoder == "frozen" or self.unit == "genes"):
            raise SettingsError(
                "genes are left out of cells whose own class or number trains the encoder.",
                where="gene_dropout",
                fix="Set gene_dropout = 0.",
            )
        if self.encoder != "frozen" and self.head == "nearest":
            raise SettingsError(
                "the nearest-neighbour head has no loss to train an encoder with.",
                where="head",
                fix="Set encoder = 'frozen', or head = 'linear'.",
            )
        if self.encoder != "frozen" and self.refit:
            raise SettingsError(
                "only a head on a frozen encoder is fitted again.", where="refit", fix="Set refit = false."
            )


def _doubled(names: Sequence[str]) -> str:
    return next((name for position, name in enumerate(names) if name in names[:position]), "")
