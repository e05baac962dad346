"""Checkpoints of other software: in from a Hugging Face folder, out to one that `transformers` loads.

In: `BertForMaskedLM`, `BertForSequenceClassification` (cell classes) and `BertForTokenClassification` (gene classes),
in safetensors or as `pytorch_model.bin`, in one file or in the parts that an index names. A pickled file is read by
torch's weights-only loader, which builds tensors and nothing else. What comes in is checked against the architecture,
tensor by tensor, and becomes a bundle in safetensors; nothing pickled goes on.

Out: a bundle's config and weights are in that layout already. A cell-class head goes out when it is of the published
form (the first token, tanh, linear); any other has no counterpart in `transformers`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from genescale.platform.bundle import CONFIG, VOCABULARY, WEIGHTS, Bundle, write_bundle
from genescale.platform.errors import AlreadyExistsError, InputError, IntegrityError, VocabularyError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.heads.cell_classes import HEAD_JSON, HEAD_TENSORS, CellClassHead, HeadSpec, head_of
from genescale.training.model import EncoderConfig
from genescale.training.weights import encoder_from_hf, from_hf, to_hf

MASKED_LM = "BertForMaskedLM"
CELL_CLASSES = "BertForSequenceClassification"
GENE_CLASSES = "BertForTokenClassification"
KINDS = {MASKED_LM: "masked_gene_model", CELL_CLASSES: "cell_classifier", GENE_CLASSES: "gene_classifier"}
PICKLED = "pytorch_model.bin"
# Names that releases of transformers before 2020 wrote.
OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
# What torch's loader raises for a pickle with more in it than tensors.
UnpicklingError: type[Exception] = torch.serialization.pickle.UnpicklingError
Tensors = dict[str, np.ndarray]
Extra = dict[str, bytes | Mapping[str, np.ndarray]]


def import_checkpoint(folder: Path, vocabulary: Vocabulary, out: Path) -> Bundle:
    """Make a bundle in `out` from a Hugging Face folder and the vocabulary it was trained with.

    Raises InputError for another architecture, VocabularyError for another vocabulary, IntegrityError for weights that
    are damaged or do not fit the config.
    """
    config, where = _config(folder), str(folder)
    architecture = next((name for name in config.get("architectures") or () if name in KINDS), "")
    if not architecture:
        raise InputError(
            f"is a {config.get('architectures')}, which cannot be imported.",
            where=where,
            fix=f"Give one of {', '.join(KINDS)}.",
        )
    shape = EncoderConfig.from_hf(config)
    _check_vocabulary(shape, vocabulary, where)
    tensors, digests = _tensors(folder)
    weights, extra = _parts(architecture, tensors, shape, config, vocabulary, where)
    return write_bundle(
        out,
        kind=KINDS[architecture],
        config=shape.to_hf(),
        weights=weights,
        vocabulary=vocabulary,
        lineage={
            "stage": "import",
            "imported_from": folder.resolve().name,
            "architecture": architecture,
            "files": digests,
            "vocabulary_digest": vocabulary.digest,
        },
        extra=extra,
    )


def export_checkpoint(bundle: Bundle, out: Path, *, encoder_only: bool = False) -> str:
    """Write a folder that `transformers` loads, with the vocabulary beside it; the name of its architecture.

    encoder_only: leave a classifier's head out, which gives a BertForMaskedLM when the bundle has its head. Raises
    InputError for a head without a counterpart, AlreadyExistsError when the folder holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AlreadyExistsError("something else is here.", where=str(out), fix="Choose a new folder.")
    weights: Tensors = dict(bundle.weights())
    architecture = MASKED_LM
    head: Tensors = {}
    classes: tuple[str, ...] = ()
    if bundle.kind == "cell_classifier" and not encoder_only:
        architecture = CELL_CLASSES
        head, classes = _published_head(bundle)
    elif bundle.kind == "gene_classifier" and not encoder_only:
        architecture = GENE_CLASSES
        head, classes = _gene_head(bundle)
    elif not any(name.startswith("cls.") for name in weights):
        architecture = "BertModel"
        weights = {name.removeprefix("bert."): values for name, values in weights.items()}
    if head:
        weights = {name: values for name, values in weights.items() if not name.startswith("cls.")} | head
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    config = {**bundle.config, "architectures": [architecture], **(labels if classes else {})}
    # A bundle writes tensors so that `transformers` takes them; its other files are ours.
    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        written = write_bundle(
            Path(scratch) / "b",
            kind="masked_gene_model",
            config=config,
            weights=weights,
            vocabulary=bundle.vocabulary,
            lineage={},
        )
        out.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, VOCABULARY):
            (out / name).write_bytes(written.read(name))
    return architecture


# --- in --------------------------------------------------------------------------------------------------------------


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"holds no {CONFIG}.", where=str(folder), fix="Give the folder of one model, as save_pretrained writes it."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise IntegrityError(f"is not JSON: {error}.", where=str(path), fix="Fetch it again.") from error


def _check_vocabulary(shape: EncoderConfig, vocabulary: Vocabulary, where: str) -> None:
    if shape.vocabulary_size != vocabulary.size or shape.positions < vocabulary.window:
        raise VocabularyError(
            f"the model has {shape.vocabulary_size:,} tokens and {shape.positions:,} positions, the vocabulary "
            f"{vocabulary.size:,} tokens and a window of {vocabulary.window:,}.",
            where=where,
            fix="Give the vocabulary that this model was trained with: --vocabulary.",
        )


def _tensors(folder: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a folder under today's names, float32, and the sha256 of each file."""
    files = _files(folder)
    found: dict[str, torch.Tensor] = {}
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        found |= _load(path)
    return {_today(name): tensor.float().numpy() for name, tensor in found.items()}, digests


def _files(folder: Path) -> list[Path]:
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if bad := [part for part in named if Path(part).name != part or not (folder / part).is_file()]:
                raise InputError(f"the part {bad[0]} is not there.", where=str(index), fix="Fetch the folder again.")
            return sorted(folder / part for part in named)
    raise InputError(
        f"holds neither {WEIGHTS} nor {PICKLED}.", where=str(folder), fix="Fetch the weights beside config.json."
    )


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Tensors and plain containers only: anything else in the pickle is refused, and nothing in it is run.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    except (
        SafetensorError,
        torch.serialization.pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        AttributeError,
    ) as error:
        raise IntegrityError(
            f"cannot be read as weights alone: {str(error).splitlines()[0]}",
            where=str(path),
            fix="Fetch it again; a pickle that holds more than tensors is not read.",
        ) from error


def _today(name: str) -> str:
    for old, new in OLD_ENDINGS.items():
        if name.endswith(f"LayerNorm{old}"):
            return name.removesuffix(old) + new
    return name


def _parts(
    architecture: str,
    tensors: Tensors,
    shape: EncoderConfig,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    where: str,
) -> tuple[Tensors, Extra]:
    """(weights of the bundle, its further files); every tensor is checked on the way."""
    if architecture == MASKED_LM:
        # Some were saved together with a pooler that masked-gene training never uses.
        own = {name: values for name, values in tensors.items() if not name.startswith("bert.pooler.")}
        return to_hf(from_hf(own, shape, where=where)), {}
    encoder_from_hf(tensors, shape, where=where)
    known = {
        name: values
        for name, values in tensors.items()
        if name.startswith("bert.") and not name.startswith("bert.pooler.") and not name.endswith("position_ids")
    }
    classes = _classes(tensors, config, where)
    if architecture == GENE_CLASSES:
        text = json.dumps({"schema_version": 1, "classes": classes}, indent=2)
        head = {"weight": tensors["classifier.weight"], "bias": tensors["classifier.bias"]}
        return known, {HEAD_JSON: text.encode(), HEAD_TENSORS: head}
    return known, _cell_head(tensors, shape, classes, vocabulary, where).to_files()


def _classes(tensors: Tensors, config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    missing = [name for name in ("classifier.weight", "classifier.bias") if name not in tensors]
    if missing:
        raise IntegrityError(f"has no {missing[0]}.", where=where, fix="The weights do not belong to this config.json.")
    count = len(tensors["classifier.bias"])
    named = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    return tuple(named.get(number, f"LABEL_{number}") for number in range(count))


def _cell_head(
    tensors: Tensors, shape: EncoderConfig, classes: tuple[str, ...], vocabulary: Vocabulary, where: str
) -> CellClassHead:
    """The published head as ours: the first token of the last layer, a layer with tanh, and a linear one."""
    spec = HeadSpec(
        classes=classes,
        label="label",
        width=shape.width,
        layer="last",
        pooling="first_token" if vocabulary.cls is None else "cls",
        hidden=shape.width,
        activation="tanh",
    )
    head = CellClassHead(spec)
    names = {"widen": "bert.pooler.dense", "output": "classifier"}
    state = head.state_dict()
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            values = tensors.get(f"{theirs}.{part}")
            if values is None or values.shape != tuple(state[f"{ours}.{part}"].shape):
                raise IntegrityError(f"{theirs}.{part} is missing or of another shape.", where=where)
            state[f"{ours}.{part}"] = torch.from_numpy(values.copy())
    head.load_state_dict(state)
    return head.eval()


# --- out -------------------------------------------------------------------------------------------------------------


def _published_head(bundle: Bundle) -> tuple[Tensors, tuple[str, ...]]:
    head = head_of(bundle)
    spec = head.spec
    published = (
        spec.activation == "tanh"
        and spec.hidden == spec.width
        and spec.layer == "last"
        and spec.pooling != "mean_genes"
        and not head.mean_d.any()
        and bool((head.scale_d == 1).all())
    )
    if not published or head.widen is None:
        raise InputError(
            "its head has no counterpart in transformers.",
            where=str(bundle.folder),
            fix="Export the encoder alone: --encoder.",
        )
    layers = {"bert.pooler.dense": head.widen, "classifier": head.output}
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach().numpy()
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }
    return tensors, spec.classes


def _gene_head(bundle: Bundle) -> tuple[Tensors, tuple[str, ...]]:
    classes = tuple(json.loads(bundle.read(HEAD_JSON))["classes"])
    return {f"classifier.{name}": values for name, values in bundle.tensors(HEAD_TENSORS).items()}, classes
