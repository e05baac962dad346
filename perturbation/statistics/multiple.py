"""Many tests at once: the Benjamini-Hochberg correction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def benjamini_hochberg(p_e: Floats) -> Floats:
    """Adjusted p values (q) of the tests that have one; NaN stays NaN and counts for nothing.

    Benjamini and Hochberg, "Controlling the False Discovery Rate", J. R. Statist. Soc. B 57, 1995.
    """
    from scipy.stats import false_discovery_control

    q_e = np.full(len(p_e), np.nan)
    known_e = np.isfinite(p_e)
    if known_e.any():
        q_e[known_e] = false_discovery_control(p_e[known_e], method="bh")
    return q_e
