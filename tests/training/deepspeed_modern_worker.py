"""`deepspeed_worker.py` with an encoder that has every option; same arguments, same results."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed_worker

from genescale.training.cells import MemoryCells
from genescale.training.model import EncoderConfig, MaskedGeneModel, new_model


def model(cells: MemoryCells) -> MaskedGeneModel:
    config = EncoderConfig(
        vocabulary_size=cells.vocabulary.size, width=32, layers=2, heads=2, feed_forward=40, positions=32,
        hidden_dropout=0.1, attention_dropout=0.1, norm="pre", activation="geglu", biases=False, rank_knots=8,
        rotary_base=100.0, rank_neighbours=2, query_key_norm=True, attention_width=16, seen_genes=True,
    )  # fmt: skip
    return new_model(config, seed=1)


deepspeed_worker.model = model

if __name__ == "__main__":
    deepspeed_worker.main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [int(stage) for stage in sys.argv[4:]])
