"""What became of the genes of a source: per fate how many, what share of the counts they stand for, and examples.

Axis suffixes: `g` gene columns of the file.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from genescale.ingestion.annotation.gene_names import FATES, UNMAPPED
from genescale.platform.vocabulary import Vocabulary

if TYPE_CHECKING:
    from genescale.ingestion.annotation.genes import GeneMap

MOST_EXAMPLES = 20
GENES_SCHEMA = pa.schema(
    [
        pa.field("gene", pa.string(), nullable=False),
        pa.field("fate", pa.string(), nullable=False),
        pa.field("token", pa.int32()),
        pa.field("gene_id", pa.string()),
        pa.field("symbol", pa.string()),
        pa.field("counted", pa.bool_(), nullable=False),
        pa.field("mitochondrial", pa.bool_(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FateReport:
    """Gene columns of one fate; shares are of all gene columns and of all counts of all cells read."""

    genes: int
    share_of_genes: float
    counts: float
    share_of_counts: float
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneReport:
    """Fates that occur, in the order of FATES, and the columns that were added to another column of their gene."""

    fates: Mapping[str, FateReport]
    measured: int
    """Vocabulary genes that the file has."""
    summed_columns: int
    """Columns that share their gene with another one."""
    summed_genes: int
    summed_examples: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        fates = {fate: {**dataclasses.asdict(r), "examples": list(r.examples)} for fate, r in self.fates.items()}
        summed = {"columns": self.summed_columns, "genes": self.summed_genes, "examples": list(self.summed_examples)}
        return {"measured": self.measured, "fates": fates, "summed": summed}


def gene_report(gene_map: GeneMap, counts_by_fate: Mapping[str, float]) -> GeneReport:
    """The report of a source from its gene map and the counts that its cells hold by fate."""
    return _report(gene_map.genes, gene_map.fate_g, gene_map.targets_g, counts_by_fate)


def gene_report_of_table(data: bytes, counts_by_fate: Mapping[str, float]) -> GeneReport:
    """As `gene_report`, from what `gene_table_bytes` wrote."""
    table = pq.read_table(io.BytesIO(data), columns=["gene", "fate", "token"])
    codes = {fate: code for code, fate in enumerate(FATES)}
    fate_g = np.array([codes[fate] for fate in table.column("fate").to_pylist()], dtype=np.uint8)
    targets_g = table.column("token").fill_null(UNMAPPED).to_numpy()
    return _report(table.column("gene").to_pylist(), fate_g, targets_g, counts_by_fate)


def gene_table_bytes(gene_map: GeneMap, vocabulary: Vocabulary) -> bytes:
    """Every gene column of a source as a Parquet table (see GENES_SCHEMA), for the side file `genes.parquet`."""
    ids = {int(token): gene for token, gene in zip(vocabulary.token_ids, vocabulary.gene_ids, strict=True)}
    found = [ids.get(token) for token in gene_map.targets_g.tolist()]
    columns = [
        pa.array(gene_map.genes, pa.string()),
        pa.array([FATES[code] for code in gene_map.fate_g.tolist()], pa.string()),
        pa.array(gene_map.targets_g, pa.int32(), mask=gene_map.targets_g == UNMAPPED),
        pa.array(found, pa.string()),
        pa.array([None if gene is None else vocabulary.symbol_of(gene) for gene in found], pa.string()),
        pa.array(gene_map.counted_g),
        pa.array(gene_map.mito_g),
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=GENES_SCHEMA), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _report(
    genes: Sequence[str],
    fate_g: npt.NDArray[np.uint8],
    targets_g: npt.NDArray[np.int32],
    counts_by_fate: Mapping[str, float],
) -> GeneReport:
    total = sum(counts_by_fate.values())
    fates = {}
    for code, fate in enumerate(FATES):
        columns = np.flatnonzero(fate_g == code)
        counts = float(counts_by_fate.get(fate, 0.0))
        if columns.size or counts:
            fates[fate] = FateReport(
                genes=int(columns.size),
                share_of_genes=columns.size / max(len(genes), 1),
                counts=counts,
                share_of_counts=counts / total if total else 0.0,
                examples=tuple(genes[i] for i in columns[:MOST_EXAMPLES]),
            )
    reached, times = np.unique(targets_g[targets_g != UNMAPPED], return_counts=True)
    shared = np.flatnonzero(np.isin(targets_g, reached[times > 1]))
    return GeneReport(
        fates=fates,
        measured=int(reached.size),
        summed_columns=int(shared.size),
        summed_genes=int((times > 1).sum()),
        summed_examples=tuple(genes[i] for i in shared[:MOST_EXAMPLES]),
    )
