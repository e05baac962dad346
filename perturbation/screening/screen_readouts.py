"""The states and the head of a screen: where they come from, and what of them decides the numbers."""

from __future__ import annotations

import hashlib
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.answers import Readouts
from genescale.perturbation.readouts.class_change import head_of_classes, model_of_classes
from genescale.perturbation.readouts.states import States
from genescale.perturbation.readouts.states_file import read_states, states_bytes
from genescale.perturbation.screening.plan import Plan
from genescale.perturbation.screening.results import STATES_FILE
from genescale.perturbation.screening.spec import ReadoutsConfig, ScreenConfig
from genescale.platform.bundle import Bundle
from genescale.platform.errors import SettingsError
from genescale.platform.progress import Progress
from genescale.platform.storage import Store, join
from genescale.training.embedder import Embedder, Pooling
from genescale.training.heads.head_files import heads_of
from genescale.training.heads.predict import HeadModel


def pooling_of(readouts: ReadoutsConfig) -> Pooling:
    """How cells become the vectors that are compared with states."""
    return "cls" if readouts.measure == "cls" else "mean_genes"


def given_states(config: ScreenConfig, bundle: Bundle, store: Store, *, states: States | None = None) -> States | None:
    """The states that are there before the screen starts: given in Python, or saved in a file.

    Raises InputError for states of another model, layer or pooling, and for a file that holds none.
    """
    wanted = config.readouts.states
    if states is None and wanted is not None and wanted.file:
        states = read_states(wanted.file, store)
    if states is not None:
        states.check_fits(
            width=int(bundle.config["hidden_size"]),
            layer=config.readouts.layer,
            pooling=pooling_of(config.readouts),
            model_digest=bundle.digest,
        )
    return states


def check_head(config: ScreenConfig, head: Bundle | None) -> None:
    """SettingsError unless a head is given exactly when the config names one; InputError for one without classes."""
    if bool(config.readouts.head) != (head is not None):
        raise SettingsError(
            "readouts.head and the bundle of a head belong together.", where="readouts", fix="Give both or none."
        )
    if head is not None:
        classes_of(config, head)


def digests(states: States | None, head: Bundle | None) -> dict[str, Any]:
    """What of states and head decides the numbers; labels in the corpus are part of the config."""
    found: dict[str, Any] = {}
    if states is not None:
        found["states_digest"] = hashlib.sha256(states_bytes(states)).hexdigest()
    if head is not None:
        found["head_digest"] = head.digest
    return found


def states_of(
    given: States | None,
    bundle: Bundle,
    corpus: Corpus,
    config: ScreenConfig,
    *,
    uri: str,
    store: Store,
    progress: Progress,
) -> States | None:
    """The states of a screen; those of labels are worked out once and kept beside the results."""
    wanted = config.readouts.states
    if given is not None or wanted is None:
        return given
    address = join(uri, STATES_FILE)
    if store.exists(address):
        return read_states(address, store)
    progress.start(None, "cells of the states")
    states = States.of_corpus(
        Embedder.load(bundle, device=config.compute.device, attention=config.compute.attention),
        corpus,
        wanted.column,
        start=wanted.start,
        goal=wanted.goal,
        alternatives=wanted.alternatives,
        where=wanted.where,
        layer=config.readouts.layer,
        pooling=pooling_of(config.readouts),
        max_cells=wanted.max_cells,
        seed=config.cells.seed,
    )
    store.write(address, states_bytes(states))
    # The file is what a run that goes on will read, so this one reads it as well.
    return read_states(address, store)


def readouts_of(config: ScreenConfig, plan: Plan, states: States | None, head: HeadModel | None) -> Readouts:
    """What workers compare."""
    return Readouts(
        layer=config.readouts.layer,
        measure=config.readouts.measure,
        states=states,
        head=None if head is None else model_of_classes(head, config.readouts.head_label),
        gene_shifts_of=plan.affected,
        # For fewer deletions a cell it would cost more than it saves.
        share_first_layer=plan.edits.every_gene and plan.edits.options.kind == "delete",
    )


def described(states: States | None) -> dict[str, Any]:
    """States for the record of a screen."""
    if states is None:
        return {}
    cells = dict(zip(states.names, states.cells, strict=True)) if states.cells else {}
    return {"names": list(states.names), "start": states.start, "goal": states.goal, "cells": cells}


def classes_of(config: ScreenConfig, head: Bundle) -> tuple[str, ...]:
    """Classes whose probabilities the head of a screen answers."""
    specs = [one.spec for one in heads_of(head)]
    return specs[head_of_classes(specs, config.readouts.head_label, where=str(head.folder))].classes
