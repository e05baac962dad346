"""What decides how atlas files become rows: reading, genes, cells, duplicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from genescale.ingestion.annotation.cells import CellRules
from genescale.ingestion.annotation.genes import GeneRules
from genescale.ingestion.plan import ReadConfig
from genescale.platform.settings import build

# Fields that say how the work is cut or what is asked, and leave the rows as they are.
NOT_IN_RECIPE = {"dataset_id", "unit_nonzeros", "replace", "max_bad_cells", "gene_table"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig(ReadConfig, GeneRules, CellRules):
    """How atlas files become rows; each source of a list may change any of it."""

    dataset_id: str = ""
    """Name of the dataset, for a single source; by default the file's name without its ending."""
    obs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Column of the corpus -> column of obs that fills it, where the names that are looked for do not fit."""
    duplicates: Literal["report", "keep_first", "keep_primary", "off"] = "report"
    """What happens to a cell whose counts equal those of another cell of the corpus."""
    bad_values: Literal["refuse", "quarantine"] = "refuse"
    """Whether a value that is no count refuses the file, or only its cell (up to `max_bad_cells`)."""
    max_bad_cells: float = 0.001
    """Share of cells with bad values above which the file is refused all the same."""
    replace: bool = False
    """Let this source take the place of a dataset of the same name that was made otherwise."""
    gene_table_digest: str = ""
    """Digest of the content of `gene_table`; filled in when the run starts."""

    def __post_init__(self) -> None:
        for part in (ReadConfig, GeneRules, CellRules):
            part.__post_init__(self)

    def recipe(self) -> dict[str, Any]:
        """The options that change rows and differ from their defaults: part of a source's identity."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = IngestConfig()
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in sorted(given.items())
            if name not in NOT_IN_RECIPE and value != getattr(plain, name)
        }

    def changed(self, options: Mapping[str, Any], *, where: str) -> IngestConfig:
        """This config with some options replaced; SettingsError for unknown or unfit ones."""
        if not options:
            return self
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return build(IngestConfig, {**own, **options}, where=where)
