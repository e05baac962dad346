"""An encoder with every option under DeepSpeed, divided among two workers: the curve of plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genescale.training.engine import TorchEngine

WORKER_FILE = Path(__file__).with_name("deepspeed_modern_worker.py")
# Whole weights on every worker, and every weight in pieces.
STAGES = (1, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed_follows_the_curve_of_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(WORKER_FILE.parent))
    import deepspeed_modern_worker as modern
    import deepspeed_worker as shared

    engine = TorchEngine(modern.model(shared.source()), shared.optimizer(), total_steps=shared.STEPS)
    reference = shared.train(engine)
    assert reference["losses"][-1] < reference["losses"][0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER_FILE), str(rank), "2", str(tmp_path), *map(str, STAGES)],
            env={**environment, "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)[-6_000:]
    for stage in STAGES:
        result = json.loads((tmp_path / f"stage{stage}_workers2.json").read_text())
        np.testing.assert_allclose(result["undisturbed"]["losses"], reference["losses"], rtol=1e-5)
        np.testing.assert_allclose(result["continued"]["losses"], reference["losses"][shared.SAVED_AT :], rtol=1e-5)
        assert result["undisturbed"]["weights"] == pytest.approx(reference["weights"], rel=1e-4, abs=1e-5)
