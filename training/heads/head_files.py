"""Heads in a bundle: `head.json` says what they read and answer, `head.safetensors` holds their numbers.

A bundle with heads is a bundle of its encoder with these two files more. Tensors of head 0 are named `0.…`, of head 1
`1.…`. A head that was fitted on a frozen encoder has three tensors `0.reference.…` more, which say what its examples
look like. Bundles of the first schema, with one head and no prefix, are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError
from genescale.platform.settings import build
from genescale.training.evaluation.out_of_distribution import Reference
from genescale.training.heads.head import Head, LinearHead, NearestHead
from genescale.training.heads.spec import HEAD_BUNDLES, HeadSpec, bundle_kind

HEAD_JSON, HEAD_TENSORS = "head.json", "head.safetensors"
REFERENCE = "reference."
SCHEMA = 2
Files = dict[str, bytes | Mapping[str, np.ndarray]]
_REPAIR = "Fetch the bundle again, or fit the head anew."


def head_files(heads: Sequence[Head], references: Sequence[Reference] = ()) -> Files:
    """The files of these heads for `write_bundle(extra=…)`; `references`, when given, holds one for each head."""
    text = json.dumps({"schema_version": SCHEMA, "heads": [asdict(head.spec) for head in heads]}, indent=2)
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().numpy().copy()
        for number, head in enumerate(heads)
        for name, tensor in head.state_dict().items()
    }
    for number, (_, usual) in enumerate(zip(heads, references, strict=True) if references else ()):
        tensors |= {f"{number}.{REFERENCE}{name}": values for name, values in vars(usual).items()}
    return {HEAD_JSON: text.encode(), HEAD_TENSORS: tensors}


def heads_of(bundle: Bundle) -> tuple[Head, ...]:
    """The heads in a bundle, in evaluation mode, on the CPU; InputError when it has none, IntegrityError for damage."""
    if bundle.kind not in HEAD_BUNDLES:
        raise InputError(
            f"the bundle is a '{bundle.kind}' and has no head.",
            where=str(bundle.folder),
            fix="Fit one first: genescale finetune MODEL --corpus URI --label COLUMN.",
        )
    content = json.loads(bundle.read(HEAD_JSON))
    tensors = {name: np.array(values) for name, values in bundle.tensors(HEAD_TENSORS).items()}
    if content.get("schema_version") == 1:
        content, tensors = _second_schema(content, tensors, bundle)
    if content.get("schema_version") != SCHEMA or not content.get("heads"):
        raise IntegrityError("head.json has another schema version.", where=str(bundle.folder), fix=_REPAIR)
    where = f"{bundle.folder}/{HEAD_JSON}"
    specs = [build(HeadSpec, values, where=f"{where}: head {n}") for n, values in enumerate(content["heads"])]
    if bundle_kind(specs) != bundle.kind:
        raise IntegrityError(f"a '{bundle.kind}' does not hold such heads.", where=where, fix=_REPAIR)
    if len({(spec.layer, spec.pooling, spec.width) for spec in specs}) > 1:
        raise IntegrityError("the heads read different vectors.", where=where, fix=_REPAIR)
    if any(spec.genes not in (0, bundle.vocabulary.size) for spec in specs):
        raise IntegrityError("the heads have weights of other genes than the vocabulary.", where=where, fix=_REPAIR)
    return tuple(_filled(spec, _of_head(tensors, number), bundle) for number, spec in enumerate(specs))


def references_of(bundle: Bundle) -> tuple[Reference | None, ...]:
    """What the examples of each head look like; None for a head whose bundle does not say.

    Raises as `heads_of` does; IntegrityError for a reference that is not whole.
    """
    heads, tensors = heads_of(bundle), bundle.tensors(HEAD_TENSORS)
    return tuple(
        _reference(_named(tensors, f"{number}.{REFERENCE}"), head.spec.width, bundle)
        for number, head in enumerate(heads)
    )


def _reference(arrays: Mapping[str, np.ndarray], width: int, bundle: Bundle) -> Reference | None:
    if not arrays:
        return None
    wanted = {field.name for field in fields(Reference)}
    if set(arrays) != wanted or arrays["whitening_dd"].shape != (width, width):
        raise IntegrityError(
            "head.safetensors holds no whole reference of the examples.", where=str(bundle.folder), fix=_REPAIR
        )
    return Reference(**arrays)


def _named(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): np.array(values) for name, values in tensors.items() if name.startswith(prefix)}


def _of_head(tensors: Mapping[str, np.ndarray], number: int) -> dict[str, torch.Tensor]:
    found = _named(tensors, f"{number}.")
    return {name: torch.from_numpy(values) for name, values in found.items() if not name.startswith(REFERENCE)}


def _filled(spec: HeadSpec, tensors: dict[str, torch.Tensor], bundle: Bundle) -> Head:
    with torch.device("meta"):  # no weights are drawn, so that loading leaves torch's random state alone
        examples = len(tensors["targets_k"]) if "targets_k" in tensors else 0
        head = NearestHead(spec, examples) if spec.type == "nearest" else LinearHead(spec)
    try:
        head.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise IntegrityError(
            f"head.safetensors does not fit head.json: {error}.", where=str(bundle.folder), fix=_REPAIR
        ) from error
    return head.eval()


def _second_schema(
    content: dict[str, Any], tensors: dict[str, np.ndarray], bundle: Bundle
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A head of the first schema as the second has it: cell classes with at most one hidden layer, or an import."""
    spec = {name: value for name, value in content.items() if name != "schema_version"}
    if bundle.kind == "gene_classifier":
        width = int(bundle.config["hidden_size"])
        spec |= {"label": "label", "width": width, "layer": "last", "pooling": "mean_genes", "kind": "gene_classes"}
        named = {"output.weight": tensors["weight"], "output.bias": tensors["bias"]}
        named |= {"mean_d": np.zeros(width, np.float32), "scale_d": np.ones(width, np.float32)}
    else:
        named = {name.replace("widen.", "hidden.0."): values for name, values in tensors.items()}
    return {"schema_version": SCHEMA, "heads": [spec]}, {f"0.{name}": values for name, values in named.items()}
