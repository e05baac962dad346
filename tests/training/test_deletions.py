"""A cell without one of its tokens by the short cut, against the encoder itself, for every form of encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from genescale.training import deletions as deletions_module
from genescale.training.deletions import Deletions, has_short_cut
from genescale.training.model import Encoder, EncoderConfig, new_model, pack

FORMS: dict[str, dict[str, Any]] = {
    "published": {},
    "pre-norm, rotary, gated": {
        "norm": "pre", "rotary_base": 100.0, "activation": "geglu", "query_key_norm": True, "biases": False,
        "type_vocabulary_size": 1,
    },
    "rank knots": {"rank_knots": 8},
}  # fmt: skip


def encoder_of(**changes: Any) -> Encoder:
    config = EncoderConfig(
        **{
            "vocabulary_size": 300, "width": 32, "layers": 3, "heads": 2, "feed_forward": 48, "positions": 256,
            "initializer_range": 0.4, **changes,
        }
    )  # fmt: skip
    return new_model(config, seed=0).encoder.eval()


def drawn_cell(length: int) -> np.ndarray:
    return np.random.default_rng(length).choice(np.arange(4, 300), length, replace=False).astype(np.uint16)


@torch.inference_mode()
def farthest(encoder: Encoder, cell: np.ndarray, counts: list[int]) -> float:
    """Largest difference of any hidden state, relative to their spread."""
    prepared, worst = Deletions(encoder, cell, counts), 0.0
    for at in range(len(cell)):
        batch, states = prepared.without(at)
        assert batch.tokens_t.tolist() == np.delete(cell, at).tolist()
        for count, state_td in zip(counts, states, strict=True):
            expected_td = encoder(pack([np.delete(cell, at)]), layers=count)
            worst = max(worst, float((state_td - expected_td).abs().nan_to_num(torch.inf).max() / expected_td.std()))
    return worst


@pytest.mark.parametrize("form", FORMS)
def test_every_deletion_is_what_the_encoder_computes(form: str) -> None:
    """Lengths around the blocks in which sums are kept, and states after one layer, some and all."""
    encoder = encoder_of(**FORMS[form])
    for length in (2, 64, 65, 150):
        assert farthest(encoder, drawn_cell(length), [1, 3]) < 2e-5


def test_a_token_that_has_all_attention_can_be_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains beside it is too small to be summed: the encoder computes such a deletion itself."""
    encoder = encoder_of(initializer_range=6.0)
    cell = drawn_cell(20)
    assert farthest(encoder, cell, [1]) < 1e-3
    monkeypatch.setattr(deletions_module, "SMALLEST_TOTAL", 0.0)
    assert not farthest(encoder, cell, [1]) < 1e-3


def test_encoders_without_the_short_cut_are_known() -> None:
    assert has_short_cut(encoder_of(), [1])
    assert not has_short_cut(encoder_of(), [0, 3])
    assert not has_short_cut(encoder_of(rank_neighbours=1), [1])
    named = new_model(encoder_of().config, seed=0, attention="padded").encoder.eval()
    assert not has_short_cut(named, [1])
