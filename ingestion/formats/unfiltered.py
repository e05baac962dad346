"""Tell the matrix of all barcodes of a 10x run, most of them empty droplets, from the matrix of its cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from genescale.platform.errors import AtlasError

# A whitelist has 737,280 barcodes or more; a run has thousands of cells, a large pool of runs tens of thousands.
FEWEST_BARCODES = 10_000
FEW_GENES = 10


def refuse_unfiltered(stored_before: npt.NDArray[np.int64], where: str) -> None:
    """AtlasError when most of very many barcodes have next to nothing: droplets without a cell would become cells.

    stored_before: values before each barcode (n+1). A barcode's counts are at least its values, so that none is read.
    """
    stored_n = np.diff(stored_before)
    share = float((stored_n < FEW_GENES).mean())
    if stored_n.size >= FEWEST_BARCODES and share > 0.5:
        raise AtlasError(
            f"{stored_n.size:,} barcodes, and {share:.0%} of them with fewer than {FEW_GENES} detected genes: "
            "this is the unfiltered matrix, whose barcodes are mostly empty droplets.",
            where=where,
            fix="Give the filtered matrix of the same run (filtered_feature_bc_matrix), or take every barcode with "
            "--allow-unfiltered.",
        )
