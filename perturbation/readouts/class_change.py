"""Read-out: the change of a fitted head's class probabilities, after an edit minus before.

Which head is read is decided here, once for a screen; the probabilities are taken where the hidden states are (the
comparison of edited cells). A model of several heads answers for one of them at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.platform.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from genescale.training.heads.predict import HeadModel
    from genescale.training.heads.spec import HeadSpec


def head_of_classes(specs: Sequence[HeadSpec], label: str = "", *, where: str = "") -> int:
    """Position of the head of cell classes that answers `label`, or of the only such head.

    Raises InputError when there is none (genes and numbers have no cell classes), none of that label, or when there are
    several and none is named.
    """
    by_label = {spec.label: at for at, spec in enumerate(specs) if spec.kind == "cell_classes"}
    if not by_label:
        kinds = ", ".join(spec.kind for spec in specs)
        raise InputError(
            f"the model has no head of cell classes ({kinds}).",
            where=where,
            fix="Fit one to a column of cell labels with `genescale finetune`.",
        )
    if label and label not in by_label:
        hint = did_you_mean(label, by_label) or f"Heads: {', '.join(by_label)}."
        raise InputError(f"the model has no head '{label}' of cell classes.", where=where, fix=hint)
    if not label and len(by_label) > 1:
        raise InputError(
            f"the model has {len(by_label)} heads of cell classes.",
            where=where,
            fix=f"Name one: {', '.join(by_label)}.",
        )
    return by_label[label or next(iter(by_label))]


def model_of_classes(model: HeadModel, label: str = "") -> HeadModel:
    """`model` with that one head alone; raises as `head_of_classes`."""
    at = head_of_classes(model.specs, label, where=str(model.embedder.bundle.folder))
    references = (model.references[at],) if model.references else ()
    return dataclasses.replace(model, heads=(model.heads[at],), references=references)
