"""Reads the question of a job strictly and writes it down in the one form that a worker reads; needs no torch.

What can be known before a job runs is refused here: a section that does not fit, an address that jobs may not read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from genescale.perturbation.screening.spec import ScreenConfig, spec_of
from genescale.platform.errors import InputError, LimitError, SettingsError, UnknownGeneError
from genescale.platform.vocabulary import Vocabulary
from genescale.serving.jobs.contract import EmbedJobAsked, ScreenJobAsked
from genescale.serving.jobs.settings import JobsConfig
from genescale.serving.jobs.sources import check_source

SECTIONS = ("cells", "edits", "readouts", "two_pass")
# What stands in a screen's file for addresses that the service chooses.
SERVED, BELOW = "served", "results"
LONGEST_LIST = 100_000


def screen_asked(asked: ScreenJobAsked, config: JobsConfig, vocabulary: Vocabulary, name: str) -> dict[str, Any]:
    """A screen as a worker reads it; `name` is the model's, which may also be the head.

    Raises SettingsError for a section that does not fit, InputError for an address that jobs may not read.
    """
    content: dict[str, Any] = {
        name: value for name in SECTIONS if (value := getattr(asked, name)) is not None and value != {}
    }
    content |= {"corpus": check_source(asked.corpus, config, where="corpus")}
    _check_size(content)
    if asked.edits == {}:
        raise SettingsError("no edit is named.", where="edits", fix='For example {"genes": ["GATA4"]}.')
    screen = config_of(content)
    content = _with_checked_addresses(content, screen, config)
    _check_head(screen, name)
    _check_genes(screen, vocabulary)
    return content


def embed_asked(asked: EmbedJobAsked, config: JobsConfig) -> dict[str, Any]:
    """An embedding as a worker reads it; InputError for an address that jobs may not read."""
    source = check_source(asked.source, config, where="source")
    return {"source": source, "layer": asked.layer, "pooling": asked.pooling}


def config_of(content: Mapping[str, Any], **compute: Any) -> ScreenConfig:
    """The screen of a job, computed as `compute` says; SettingsError, in words of the request."""
    sections = {name: content[name] for name in SECTIONS if name in content}
    with _named_after_request():
        given = {**sections, "compute": compute, "model": SERVED, "corpus": content["corpus"], "output": BELOW}
        return spec_of(given, where="job").config


def addresses(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Every address in a question that was written down."""
    if "source" in content:
        return (content["source"],)
    found = [content.get("corpus", ""), content.get("edits", {}).get("sets", "")]
    readouts = content.get("readouts", {})
    found += [readouts.get("masked_genes", ""), (readouts.get("states") or {}).get("file", "")]
    return tuple(one for one in found if isinstance(one, str) and one)


def _with_checked_addresses(content: dict[str, Any], screen: ScreenConfig, config: JobsConfig) -> dict[str, Any]:
    edits, readouts = dict(content["edits"]), dict(content.get("readouts", {}))
    if screen.edits.sets:
        edits["sets"] = check_source(screen.edits.sets, config, where="edits.sets")
    masked = screen.readouts.masked_genes
    if len(masked) == 1 and "/" in masked[0]:
        readouts["masked_genes"] = check_source(masked[0], config, where="readouts.masked_genes")
    states = screen.readouts.states
    if states is not None and states.file:
        file = check_source(states.file, config, where="readouts.states.file")
        readouts["states"] = {**readouts["states"], "file": file}
    content = {**content, "edits": edits}
    return {**content, "readouts": readouts} if readouts else content


def _check_head(screen: ScreenConfig, name: str) -> None:
    if screen.readouts.head not in ("", name):
        raise InputError(
            "the head of a job's screen is that of the model which is asked.",
            where="readouts.head",
            fix=f"Write '{name}', or leave it out.",
        )


def _check_genes(screen: ScreenConfig, vocabulary: Vocabulary) -> None:
    """UnknownGeneError now instead of after a wait in the queue."""
    edits = screen.edits
    listed = {
        "genes": [gene for text in edits.genes for gene in text.split("+")],
        "pairs": edits.pairs,
        "not_controls": edits.not_controls,
        "anchor": [edits.anchor] if edits.anchor else [],
    }
    for name, genes in listed.items():
        for gene in genes:
            try:
                vocabulary.token(gene.strip())
            except UnknownGeneError as error:
                raise UnknownGeneError(error.what, where=f"edits.{name}", fix=error.fix) from None


def _check_size(content: Mapping[str, Any]) -> None:
    for section in ("edits", "readouts"):
        for name, value in content.get(section, {}).items():
            if isinstance(value, list) and len(value) > LONGEST_LIST:
                raise LimitError(f"{len(value):,} are given; {LONGEST_LIST:,} are allowed.", where=f"{section}.{name}")


@contextlib.contextmanager
def _named_after_request() -> Iterator[None]:
    """Places of an error as they stand in the request, not in the file that a command would read."""
    try:
        yield
    except InputError as error:
        where = error.where.removeprefix("job: ").removeprefix("job")
        raise type(error)(error.what, where=where, fix=error.fix) from None
