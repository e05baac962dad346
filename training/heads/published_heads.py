"""Heads in the layouts of `transformers`: `BertForSequenceClassification` and `BertForTokenClassification`.

Axis suffixes: `d` width, `h` hidden width, `c` classes.

The first reads the first token of the last layer through a dense layer with tanh (`bert.pooler.dense`) and a linear one
(`classifier`); with one label it answers a number. The second is a linear layer on every token of the last layer.

Ours standardise their input, which these layouts do not: on the way out mean and scale are folded into the first
matrix, which gives the same answers. A head that reads the second-to-last layer goes out on an encoder without its last
layer, whose last is then that one. Other heads have no counterpart and are refused with what would fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import layers_to_run
from genescale.training.heads.head import Head, LinearHead
from genescale.training.heads.head_files import heads_of
from genescale.training.heads.spec import HeadSpec

SEQUENCE, TOKEN = "BertForSequenceClassification", "BertForTokenClassification"
POOLER, CLASSIFIER = "bert.pooler.dense", "classifier"
_LAYER = "bert.encoder.layer."
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedHead:
    """A head as a published checkpoint has it."""

    architecture: str
    config: dict[str, Any]
    """What the head adds to config.json or changes in it."""
    tensors: Tensors
    layers: int
    """Layers that the encoder keeps."""


def import_head(
    architecture: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], vocabulary: Vocabulary, where: str
) -> LinearHead:
    """The head of a published checkpoint as ours, in evaluation mode; IntegrityError for tensors that do not fit."""
    classes, width = _classes(tensors, config, where), int(config["hidden_size"])
    genes = architecture == TOKEN
    if genes and len(classes) < 2:
        raise IntegrityError("it tells genes of one class apart.", where=where, fix="A head needs two classes or more.")
    number = len(classes) == 1
    spec = HeadSpec(
        label="label",
        width=width,
        layer="last",
        pooling="mean_genes" if genes else "first_token" if vocabulary.cls is None else "cls",
        classes=() if number else classes,
        kind="gene_classes" if genes else "number" if number else "cell_classes",
        hidden=0 if genes else width,
        activation="relu" if genes else "tanh",
    )
    with torch.random.fork_rng(devices=[]):
        head = LinearHead(spec)
    state = head.state_dict()
    for ours, theirs in {"output": CLASSIFIER, **({} if genes else {"hidden.0": POOLER})}.items():
        for part in ("weight", "bias"):
            values = tensors.get(f"{theirs}.{part}")
            if values is None or values.shape != tuple(state[f"{ours}.{part}"].shape):
                raise IntegrityError(f"{theirs}.{part} is missing or of another shape.", where=where)
            state[f"{ours}.{part}"] = torch.from_numpy(np.array(values, dtype=np.float32))
    head.load_state_dict(state)
    return head.eval()


def export_head(bundle: Bundle) -> PublishedHead:
    """The head of a bundle in its published layout; InputError, with what would fit, when there is none."""
    heads = heads_of(bundle)
    spec, where = heads[0].spec, str(bundle.folder)
    if len(heads) > 1:
        raise _no_counterpart(f"it holds {len(heads)} heads, and the layout holds one.", where, "Fit one target.")
    layers = layers_to_run(spec.layer, int(bundle.config["num_hidden_layers"]))
    if not layers:
        raise _no_counterpart("it reads the embeddings below the only layer.", where, "Fit it with layer = 'last'.")
    tensors = _tensors(heads[0], where)
    return PublishedHead(
        architecture=TOKEN if spec.kind == "gene_classes" else SEQUENCE,
        config={**_labels(spec), "num_hidden_layers": layers},
        tensors=tensors,
        layers=layers,
    )


def without_layers_above(weights: Mapping[str, np.ndarray], layers: int) -> Tensors:
    """The weights of an encoder that ends after so many layers, and of nothing on top of it."""
    return {
        name: values
        for name, values in weights.items()
        if not name.startswith("cls.")
        and not (name.startswith(_LAYER) and int(name.removeprefix(_LAYER).split(".")[0]) >= layers)
    }


def _tensors(head: Head, where: str) -> Tensors:
    """The tensors of the published layout, float32, with standardisation folded in."""
    spec = head.spec
    if not isinstance(head, LinearHead):
        raise _no_counterpart("it votes among stored examples.", where, "Fit it with head = 'linear'.")
    if spec.genes:
        raise _no_counterpart("it has weights of genes.", where, "Fit it with gene_weights = false.")
    if spec.kind == "gene_classes":
        if spec.hidden_layers:
            raise _no_counterpart("the layout for genes is linear, and it has hidden layers.", where, "Set hidden = 0.")
        weight_cd, bias_c = _folded(head, head.output)
        return {f"{CLASSIFIER}.weight": weight_cd, f"{CLASSIFIER}.bias": bias_c}
    form = (spec.hidden_layers, spec.hidden, spec.activation)
    if spec.pooling == "mean_genes" or form != (1, spec.width, "tanh"):
        raise _no_counterpart(
            "the layout for cells is the first token, one hidden layer of the encoder's width, tanh and linear.",
            where,
            f"Fit it with pooling = 'cls' (first_token without <cls>), hidden = {spec.width}, activation = 'tanh'.",
        )
    weight_hd, bias_h = _folded(head, head.hidden[0])
    weight_ch, bias_c = head.output.weight.detach().double(), head.output.bias.detach().double()
    if spec.kind == "number":
        weight_ch = weight_ch * head.target_scale_1.double()
        bias_c = bias_c * head.target_scale_1.double() + head.target_mean_1.double()
    return {
        f"{POOLER}.weight": weight_hd,
        f"{POOLER}.bias": bias_h,
        f"{CLASSIFIER}.weight": weight_ch.float().numpy(),
        f"{CLASSIFIER}.bias": bias_c.float().numpy(),
    }


def _folded(head: LinearHead, layer: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias that do on raw vectors what `layer` does on standardised ones."""
    weight = layer.weight.detach().double() / head.scale_d.double()
    bias = layer.bias.detach().double() - weight @ head.mean_d.double()
    return weight.float().numpy(), bias.float().numpy()


def _labels(spec: HeadSpec) -> dict[str, Any]:
    if spec.kind == "number":
        return {"id2label": {0: spec.label}, "label2id": {spec.label: 0}, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(spec.classes)),
        "label2id": {name: number for number, name in enumerate(spec.classes)},
    }


def _classes(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    missing = [name for name in (f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias") if name not in tensors]
    if missing:
        raise IntegrityError(f"has no {missing[0]}.", where=where, fix="The weights do not belong to this config.json.")
    count = len(tensors[f"{CLASSIFIER}.bias"])
    named = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    return tuple(named.get(number, f"LABEL_{number}") for number in range(count))


def _no_counterpart(why: str, where: str, fix: str) -> InputError:
    return InputError(
        f"its head has no counterpart in transformers: {why}",
        where=where,
        fix=f"{fix} Or export the encoder alone: --encoder.".strip(),
    )
