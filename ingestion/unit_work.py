"""What a Ray worker does with one unit: open the file, map its genes, write a part.

A large file is many units. Checking its header, reading its row pointers and mapping its genes for each of them would
cost more than the work, so a worker keeps the last file it opened and the last vocabulary it was sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from genescale.ingestion.annotation.gene_table import GeneTable
from genescale.ingestion.annotation.genes import GeneMap, GeneRules, map_genes
from genescale.ingestion.atlas import Atlas
from genescale.ingestion.config import IngestConfig
from genescale.ingestion.plan import Unit, guarded, opened, pieces
from genescale.ingestion.tokenise import write_part
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary


class Known:
    """The vocabulary and the gene tables of a run, by Ray's reference; a process fetches them once."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the corpus."""
        return self._fetched()[0]

    def table(self, config: GeneRules) -> GeneTable | None:
        """The gene table that a config names."""
        return self._fetched()[1][config.gene_table] if config.gene_table else None

    def _fetched(self) -> tuple[Vocabulary, dict[str, GeneTable]]:
        import ray

        key = self.reference.hex()
        if key not in _fetched:
            _fetched.clear()
            _fetched[key] = ray.get(self.reference)
        return _fetched[key]


@dataclasses.dataclass(frozen=True)
class Work:
    """What all units of a run share."""

    configs: dict[str, IngestConfig]
    """How to read each file, by address."""
    known: Known
    corpus_uri: str
    store: Store


@dataclasses.dataclass
class _Held:
    """The last file this process opened."""

    key: Any
    stack: contextlib.ExitStack
    atlas: Atlas
    genes: GeneMap


_held: _Held | None = None
_fetched: dict[str, tuple[Vocabulary, dict[str, GeneTable]]] = {}


def run_unit(item: dict[str, Any], *, work: Work) -> tuple[dict[str, Any], bytes]:
    """One task: a unit becomes one part (a whole file several), or a failure as data; the payload is the quarantine."""
    unit, config = Unit(**item["unit"]), work.configs[item["unit"]["uri"]]
    payload = b""

    def done() -> dict[str, Any]:
        nonlocal payload
        held = _opened(unit, config, work)
        answers = []
        for piece in pieces(held.atlas, unit, config.unit_nonzeros):
            answer, quarantine = write_part(
                piece,
                held.atlas,
                held.genes,
                vocabulary=work.known.vocabulary,
                cell_rules=config,
                obs_mapping=config.obs,
                allow_fractional=config.allow_fractional,
                bad_values=config.bad_values,
                corpus_uri=work.corpus_uri,
                dataset_id=item["dataset_id"],
                store=work.store,
            )
            answers.append(answer)
            payload += len(quarantine).to_bytes(8, "little") + quarantine
        return {"parts": answers}

    answer = {**item, **guarded(done, where=unit.uri)}
    if "failure" in answer or unit.whole:
        forget()
    return answer, payload if "failure" not in answer else b""


def tables_of(payload: bytes) -> list[bytes]:
    """The quarantines of the parts of a unit, one after the other; empty ones left out."""
    found, place = [], 0
    while place < len(payload):
        size = int.from_bytes(payload[place : place + 8], "little")
        if size:
            found.append(payload[place + 8 : place + 8 + size])
        place += 8 + size
    return found


def forget() -> None:
    """Close the file that this process keeps open."""
    global _held
    held, _held = _held, None
    if held:
        held.stack.close()


def _opened(unit: Unit, config: IngestConfig, work: Work) -> _Held:
    global _held
    vocabulary = work.known.vocabulary
    key = (unit.uri, unit.etag, unit.slot, vocabulary.digest, repr(config))
    if _held and _held.key == key:
        return _held
    forget()
    with contextlib.ExitStack() as stack:
        atlas = stack.enter_context(opened(unit.uri, unit.etag, unit.slot, config, work.store))
        genes = map_genes(atlas, vocabulary, rules=config, table=work.known.table(config))
        _held = _Held(key, stack.pop_all(), atlas, genes)
    return _held
