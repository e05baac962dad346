"""Checkpoints of other software: in from a Hugging Face folder, out to one that `transformers` loads.

In: `BertForMaskedLM`, `BertForSequenceClassification` (cell classes) and `BertForTokenClassification` (gene classes),
in safetensors or as `pytorch_model.bin`, in one file or in the parts that an index names. A pickled file is read by
torch's weights-only loader, which builds tensors and nothing else. What comes in is checked against the architecture,
tensor by tensor, and becomes a bundle in safetensors; nothing pickled goes on.

Out: a bundle's config and weights are in that layout already; for heads see `heads/published_heads.py`.
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
from genescale.training.heads.head_files import head_files
from genescale.training.heads.published_heads import SEQUENCE, TOKEN, export_head, import_head, without_layers_above
from genescale.training.heads.spec import HEAD_BUNDLES, bundle_kind
from genescale.training.model import EncoderConfig
from genescale.training.weights import encoder_from_hf, from_hf, to_hf

MASKED_LM = "BertForMaskedLM"
ARCHITECTURES = (MASKED_LM, SEQUENCE, TOKEN)
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
    architecture = next((name for name in config.get("architectures") or () if name in ARCHITECTURES), "")
    if not architecture:
        raise InputError(
            f"is a {config.get('architectures')}, which cannot be imported.",
            where=where,
            fix=f"Give one of {', '.join(ARCHITECTURES)}.",
        )
    shape = EncoderConfig.from_hf(config)
    _check_vocabulary(shape, vocabulary, where)
    tensors, digests = _tensors(folder)
    weights, kind, extra = _parts(architecture, tensors, shape, config, vocabulary, where)
    return write_bundle(
        out,
        kind=kind,
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
    InputError for a head or an encoder without a counterpart, AlreadyExistsError when the folder holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AlreadyExistsError("something else is here.", where=str(out), fix="Choose a new folder.")
    if options := EncoderConfig.from_hf(bundle.config).chosen():
        raise InputError(
            f"`transformers` has no such encoder: it differs from the published one in {', '.join(options)}.",
            where=str(bundle.folder),
            fix="Keep the bundle, which every genescale command reads, or pretrain a published recipe.",
        )
    weights: Tensors = dict(bundle.weights())
    config = {**bundle.config, "architectures": [MASKED_LM]}
    if bundle.kind in HEAD_BUNDLES and not encoder_only:
        head = export_head(bundle)
        weights = without_layers_above(weights, head.layers) | head.tensors
        config |= {"architectures": [head.architecture], **head.config}
    elif not any(name.startswith("cls.") for name in weights):
        config["architectures"] = ["BertModel"]
        weights = {name.removeprefix("bert."): values for name, values in weights.items()}
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
    return str(config["architectures"][0])


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
) -> tuple[Tensors, str, Extra]:
    """(weights of the bundle, its kind, its further files); every tensor is checked on the way."""
    if architecture == MASKED_LM:
        # Some were saved together with a pooler that masked-gene training never uses.
        own = {name: values for name, values in tensors.items() if not name.startswith("bert.pooler.")}
        return to_hf(from_hf(own, shape, where=where)), "masked_gene_model", {}
    encoder_from_hf(tensors, shape, where=where)
    known = {
        name: values
        for name, values in tensors.items()
        if name.startswith("bert.") and not name.startswith("bert.pooler.") and not name.endswith("position_ids")
    }
    head = import_head(architecture, tensors, config, vocabulary, where)
    return known, bundle_kind([head.spec]), head_files([head])
