"""What `/v1/info` says, and what every answer says about where it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import get_args

from genescale.perturbation.readouts.shift import MEASURES
from genescale.platform.bundle import Bundle
from genescale.serving.config import ServingConfig
from genescale.serving.forms.media import CELL_FORMS, JSON_OR_ARROW
from genescale.serving.release import Release
from genescale.serving.schemas import (
    CorpusFacts,
    EncoderFacts,
    HeadFacts,
    InfoAnswered,
    Kind,
    Layer,
    ModelFacts,
    Output,
    Pooling,
    Provenance,
    ReferenceFacts,
    StateFacts,
    VocabularyFacts,
)

# Facts of a bundle's lineage that say where a model comes from without naming a bucket or a path.
PUBLIC_LINEAGE = ("corpus_version", "git_commit", "run_id", "parent_digest")
# Fields of the config that bound requests, beside its limits.
HEAD_FILE = "head.json"
SHOWN = ("tokens_per_batch", "max_ongoing", "max_queued", "replicas", "max_model_bytes")


def head_facts(bundle: Bundle) -> list[HeadFacts]:
    """What the heads of a bundle answer; empty for a bundle without one. Read without torch."""
    if HEAD_FILE not in bundle.files:
        return []
    content = json.loads(bundle.read(HEAD_FILE))
    heads = content.get("heads") or [{"kind": "cell_classes", **content}]
    return [
        HeadFacts(label=head.get("label", "label"), kind=head["kind"], classes=list(head["classes"])) for head in heads
    ]


def describe(
    release: Release,
    bundle: Bundle,
    config: ServingConfig,
    *,
    reference: ReferenceFacts | None = None,
    states: Sequence[StateFacts] = (),
) -> InfoAnswered:
    """What `/v1/info` says: model, vocabulary, corpus, reference, choices and limits."""
    vocabulary, lineage = bundle.vocabulary, bundle.lineage
    has_cls = vocabulary.cls is not None
    provenance = Provenance(
        model=ModelFacts(name=release.name, version=release.version, digest=release.digest),
        vocabulary=VocabularyFacts(name=vocabulary.name, digest=vocabulary.digest),
        corpus=CorpusFacts(version=lineage.get("corpus_version")),
    )
    return InfoAnswered(
        service="genescale",
        build=version("genescale"),
        models={},
        provenance=provenance,
        encoder=EncoderFacts(
            width=bundle.config["hidden_size"],
            layers=bundle.config["num_hidden_layers"],
            # Cells are cropped to what the model has positions for.
            window=min(vocabulary.window, bundle.config["max_position_embeddings"]),
            n_genes=len(vocabulary.gene_ids),
            has_cls=has_cls,
        ),
        heads=head_facts(bundle),
        reference=reference,
        states=list(states),
        lineage={key: lineage[key] for key in PUBLIC_LINEAGE if key in lineage},
        choices={
            "layer": list(get_args(Layer)),
            "content_types": list(CELL_FORMS),
            "answer_types": list(JSON_OR_ARROW),
            "output": [name for name in get_args(Output) if has_cls or name != "cls"],
            "pooling": [name for name in get_args(Pooling) if has_cls or name != "cls"],
            "measure": [name for name in MEASURES if has_cls or name != "cls"],
            "kind": list(get_args(Kind)),
        },
        limits={**asdict(config.limits), **{name: getattr(config, name) for name in SHOWN}, **config.jobs.limits},
    )
