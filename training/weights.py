"""Weights in and out: our module names to and from the layout of Hugging Face's `BertForMaskedLM`.

A bundle and a published Geneformer checkpoint hold the same tensors under the same names: one table serves both.
Queries, keys and values are separate there and one matrix here. The decoder is tied to the token embedding and is not
written; a copy of it in a checkpoint must be equal. Tensors are float32.

An encoder with options of its own has no counterpart there: its tensors have our names, `encoder.` and `head.` before
them, so that nothing takes them for a BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from genescale.platform.errors import IntegrityError
from genescale.training.model import Encoder, EncoderConfig, MaskedGeneModel

if TYPE_CHECKING:
    from genescale.platform.bundle import Bundle

Model = TypeVar("Model", bound=torch.nn.Module)

_EMBEDDINGS = {
    "embeddings.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embeddings.positions.weight": "bert.embeddings.position_embeddings.weight",
    "embeddings.types.weight": "bert.embeddings.token_type_embeddings.weight",
    "embeddings.norm.weight": "bert.embeddings.LayerNorm.weight",
    "embeddings.norm.bias": "bert.embeddings.LayerNorm.bias",
}
_LAYER = {
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "output_norm": "output.LayerNorm",
}
_QKV = ("query", "key", "value")
_HEAD = {
    "head.dense.weight": "cls.predictions.transform.dense.weight",
    "head.dense.bias": "cls.predictions.transform.dense.bias",
    "head.norm.weight": "cls.predictions.transform.LayerNorm.weight",
    "head.norm.bias": "cls.predictions.transform.LayerNorm.bias",
    "head.bias": "cls.predictions.bias",
}
# Written by some releases of transformers: copies that must be equal to what they copy, and a constant.
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_CONSTANT = {"bert.embeddings.position_ids"}
# Parts of other models on the same encoder: they are no fault when only the encoder is wanted.
_NOT_ENCODER = ("cls.", "bert.pooler.", "classifier.")
_OWN_HEAD = ("head.", "seen_amount")


def to_hf(model: MaskedGeneModel) -> dict[str, np.ndarray]:
    """The model's weights under their names in a checkpoint, float32, on the host."""
    return _named(model.state_dict(), _name_table(model.config, head=True))


def encoder_to_hf(state: Mapping[str, torch.Tensor], config: EncoderConfig) -> dict[str, np.ndarray]:
    """The state of an `Encoder` under its names in a checkpoint, float32, on the host."""
    names = {name.removeprefix("encoder."): hf for name, hf in _name_table(config, head=False).items()}
    return _named(state, names)


def _named(state: Mapping[str, torch.Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    tensors: dict[str, torch.Tensor] = {}
    for name, hf_names in names.items():
        tensors.update(zip(hf_names, state[name].chunk(len(hf_names)), strict=True))
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}


def from_hf(
    tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, attention: str = "auto", where: str = "weights"
) -> MaskedGeneModel:
    """The model with these weights, on the CPU, in evaluation mode.

    Raises IntegrityError when a tensor is missing, unexpected, of another shape, or when the decoder is not tied.
    """
    _check_tied(tensors, where)
    with torch.device("meta"):
        model = MaskedGeneModel(config, attention=attention)
    allowed = _CONSTANT | set(_TIED)
    return _fill(model, tensors, _name_table(config, head=True), lambda name: name in allowed, where)


def encoder_from_hf(
    tensors: Mapping[str, np.ndarray], config: EncoderConfig, *, attention: str = "auto", where: str = "weights"
) -> Encoder:
    """The encoder alone with these weights, on the CPU, in evaluation mode; tensors of heads are passed over.

    Raises IntegrityError as `from_hf` does.
    """
    with torch.device("meta"):
        encoder = Encoder(config, attention=attention)
    names = {name.removeprefix("encoder."): hf for name, hf in _name_table(config, head=False).items()}
    heads = _NOT_ENCODER if config.is_published else _OWN_HEAD
    return _fill(encoder, tensors, names, lambda name: name in _CONSTANT or name.startswith(heads), where)


def load_model(bundle: Bundle, *, attention: str = "auto") -> MaskedGeneModel:
    """The masked-gene model of a verified bundle, on the CPU, in evaluation mode."""
    config = EncoderConfig.from_hf(bundle.config)
    return from_hf(bundle.weights(), config, attention=attention, where=str(bundle.folder))


def load_encoder(bundle: Bundle, *, attention: str = "auto") -> Encoder:
    """The encoder of a verified bundle, whatever head it has, on the CPU, in evaluation mode."""
    config = EncoderConfig.from_hf(bundle.config)
    return encoder_from_hf(bundle.weights(), config, attention=attention, where=str(bundle.folder))


def _name_table(config: EncoderConfig, *, head: bool) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the names in a checkpoint whose tensors, put on top of each other, it is."""
    if not config.is_published:
        return _own_names(config, head=head)
    table: dict[str, tuple[str, ...]] = {f"encoder.{name}": (hf_name,) for name, hf_name in _EMBEDDINGS.items()}
    for layer in range(config.layers):
        ours, theirs = f"encoder.layers.{layer}", f"bert.encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            table[f"{ours}.attention.qkv.{kind}"] = tuple(f"{theirs}.attention.self.{part}.{kind}" for part in _QKV)
            table.update({f"{ours}.{name}.{kind}": (f"{theirs}.{hf}.{kind}",) for name, hf in _LAYER.items()})
    if head:
        table.update({name: (hf_name,) for name, hf_name in _HEAD.items()})
    return table


def _own_names(config: EncoderConfig, *, head: bool) -> dict[str, tuple[str, ...]]:
    with torch.device("meta"):
        names = list(MaskedGeneModel(config).state_dict())
    return {name: (name,) for name in names if head or name.startswith("encoder.")}


def _fill(
    model: Model,
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, tuple[str, ...]],
    may_be_extra: Callable[[str], bool],
    where: str,
) -> Model:
    wanted = {hf_name for hf_names in names.values() for hf_name in hf_names}
    missing = sorted(wanted - set(tensors))
    unexpected = sorted(name for name in set(tensors) - wanted if not may_be_extra(name))
    for problem, found in (("missing", missing), ("unexpected", unexpected)):
        if found:
            raise IntegrityError(
                f"{len(found)} tensors are {problem}, {found[0]} among them.",
                where=where,
                fix="The weights do not belong to this config.json.",
            )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    state = {}
    for name, hf_names in names.items():
        parts = [np.asarray(tensors[hf_name]) for hf_name in hf_names]
        _check_shapes(parts, hf_names, shapes[name], where)
        state[name] = torch.from_numpy(np.concatenate(parts).astype(np.float32))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _check_shapes(parts: list[np.ndarray], names: tuple[str, ...], shape: tuple[int, ...], where: str) -> None:
    expected = (shape[0] // len(parts), *shape[1:])
    for part, name in zip(parts, names, strict=True):
        if part.shape != expected:
            raise IntegrityError(f"{name} has shape {part.shape}, config.json says {expected}.", where=where)


def _check_tied(tensors: Mapping[str, np.ndarray], where: str) -> None:
    for name, original in _TIED.items():
        if name in tensors and original in tensors and not np.array_equal(tensors[name], tensors[original]):
            raise IntegrityError(
                f"{name} differs from {original}; this architecture ties them.",
                where=where,
                fix="A decoder of its own cannot be loaded.",
            )
