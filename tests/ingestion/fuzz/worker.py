"""Reads mutated atlases as an ingestion does, one after the other: a JSON line in, a JSON line out.

A crash or a hang of the reader takes this process with it, which is what the test looks for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from mutations import mutate
from originals import vocabulary

from genescale.ingestion.annotation.genes import map_genes
from genescale.ingestion.opening import open_atlas
from genescale.ingestion.pipeline import IngestConfig
from genescale.ingestion.plan import Unit, pieces, planned
from genescale.ingestion.tokenise import write_part
from genescale.platform.errors import GenescaleError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store

CONFIG = IngestConfig(unit_nonzeros=1_500)
# What a file of a few kilobytes may make a process claim, above what the libraries take.
MEMORY_BYTES = 2 * 1024**3


def rows_of(path: Path, folder: Path) -> dict[str, str]:
    """Digest of the tokens of every kept row, by its number in the source."""
    store, known, found = Store(StorageSettings()), vocabulary(), {}
    with open_atlas(str(path), store) as atlas:
        if atlas.slot not in ("X", "matrix"):
            raise AssertionError(f"took {atlas.slot} for the counts")
        genes = map_genes(atlas, known, rules=CONFIG)
        plan = planned(atlas, CONFIG)
        for start, stop in plan["ranges"]:
            unit = Unit(uri=atlas.uri, etag="", slot=atlas.slot, start=start, stop=stop, whole=plan["whole"])
            for piece in pieces(atlas, unit, CONFIG.unit_nonzeros):
                answer, _ = write_part(
                    piece, atlas, genes, vocabulary=known, cell_rules=CONFIG, obs_mapping={}, allow_fractional=False,
                    bad_values="refuse", corpus_uri=str(folder), dataset_id="fuzz", store=store,
                )  # fmt: skip
                if answer["part"]:
                    table = pq.read_table(folder / answer["part"]["path"], partitioning=None)
                    for row, tokens in zip(table["source_row"].to_pylist(), table["input_ids"], strict=True):
                        assert str(row) not in found, "a row twice"
                        found[str(row)] = digest(tokens.values.to_numpy())
    return found


def digest(tokens: Any) -> str:
    return hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()[:16]


def outcome(path: Path, folder: Path) -> dict[str, Any]:
    try:
        return {"rows": rows_of(path, folder)}
    except GenescaleError as error:
        return {"refused": error.code, "message": str(error)}
    except Exception as error:  # noqa: BLE001 (whatever it is, the test must name it)
        return {"broken": type(error).__name__, "message": "".join(traceback.format_exception(error))[-1_500:]}


def main() -> None:
    answers, limited = os.fdopen(os.dup(1), "w"), False
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for line in sys.stdin:
        job = json.loads(line)
        path, folder = Path(job["path"]), Path(job["folder"])
        said = mutate(job["kind"], Path(job["original"]), path, job["seed"]) if "seed" in job else "none"
        result = {"mutation": said, **outcome(path, folder)}
        if not limited:
            # After the first file, which loads and compiles what all of them need.
            base = int(Path("/proc/self/statm").read_text().split()[0])
            limit = base * resource.getpagesize() + MEMORY_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            limited = True
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
