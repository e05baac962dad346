"""What the OpenAPI document says of choosing a model."""

from __future__ import annotations

from typing import Any

from genescale.serving.described import parameter
from genescale.serving.models.state import MODEL_PARAMETER

CHOOSING = (
    "/v1/embeddings",
    "/v1/tokens",
    "/v1/perturbations",
    "/v1/classify",
    "/v1/neighbors",
    "/v1/reference/map",
    "/v1/reference/examples",
    "/v1/info",
)
"""Addresses whose answers come from one model."""
MODEL = parameter(
    MODEL_PARAMETER,
    "query",
    {"type": "string"},
    "Name of the model that is asked, of those in `/v1/models`; the first one without it.",
)
REFUSALS = {"404": "No model has this name, or nothing else is of that name here.", "422": "It is named twice."}


def describe_model_choice(document: dict[str, Any]) -> None:
    """Add to an OpenAPI document that questions may name a model, and what an unknown name is answered with."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswered"}}}
    for path in CHOOSING:
        for operation in document["paths"][path].values():
            operation["parameters"] = [*operation.get("parameters", []), MODEL]
            for status, description in REFUSALS.items():
                operation["responses"].setdefault(status, {"description": description, "content": error})
