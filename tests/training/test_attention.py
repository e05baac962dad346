"""Attention back ends compute the same numbers, and no token sees another cell."""

from __future__ import annotations

import pytest
import torch

from genescale.platform.errors import SettingsError
from genescale.training.attention import Segments, attend, attention_weights, check_backend, drop_values

LENGTHS = (7, 7, 1, 12, 3, 3, 3)
HEADS, WIDTH = 2, 8


def random_qkv(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["segments", "padded", "auto"])
def test_back_ends_agree_with_the_written_out_softmax(backend: str) -> None:
    segments = Segments.of(LENGTHS)
    expected_inputs, inputs = random_qkv(), random_qkv()
    expected = attend(*expected_inputs, segments, "eager")
    found = attend(*inputs, segments, check_backend(backend))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    for ours, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["segments", "padded", "eager"])
def test_a_cell_does_not_see_its_neighbours(backend: str) -> None:
    segments, start = Segments.of(LENGTHS), sum(LENGTHS[:3])
    query, key, value = (x.detach() for x in random_qkv())
    before = attend(query, key, value, segments, check_backend(backend))
    for changed in (key, value):
        changed[start : start + LENGTHS[3]] += 100.0
    after = attend(query, key, value, segments, check_backend(backend))
    same = torch.ones(sum(LENGTHS), dtype=torch.bool)
    same[start : start + LENGTHS[3]] = False
    torch.testing.assert_close(after[same], before[same], atol=0, rtol=0)
    assert not torch.allclose(after[~same], before[~same])


def test_weights_of_a_token_sum_to_one_within_its_cell() -> None:
    query, key, _ = random_qkv()
    weights = attention_weights(query, key, Segments.of(LENGTHS))
    assert [tuple(w.shape) for w in weights] == [(HEADS, length, length) for length in LENGTHS]
    for w in weights:
        torch.testing.assert_close(w.sum(-1), torch.ones(w.shape[:2]))


def test_neighbours_of_one_length_are_one_run() -> None:
    assert Segments.of(LENGTHS).runs() == [(7, 2), (1, 1), (12, 1), (3, 3)]


def test_no_cells_give_an_empty_answer() -> None:
    empty = torch.zeros(0, HEADS, WIDTH)
    assert attend(empty, empty, empty, Segments.of(()), "segments").shape == (0, HEADS, WIDTH)


def test_dropout_keeps_the_mean_and_the_published_variance() -> None:
    """Dropping values for all queries at once must not change the distribution of one output (see attention.py)."""
    length, probability, draws = 40, 0.3, 4_000
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(length, 1, 1, generator=generator)
    weights = torch.softmax(torch.randn(length, generator=generator), 0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        outputs = torch.stack(
            [(weights[:, None, None] * drop_values(value, probability, training=True)).sum() for _ in range(draws)]
        )
    plain = (weights[:, None, None] * value).sum()
    # Each term is kept with probability 1 - p and divided by it: the variance of that, summed over keys.
    variance = (probability / (1 - probability) * (weights * value[:, 0, 0]) ** 2).sum()
    assert abs(outputs.mean() - plain) < 4 * (variance / draws).sqrt()
    assert 0.9 < outputs.var() / variance < 1.1


def test_dropout_is_off_outside_training() -> None:
    value = torch.ones(5, 2, 4)
    assert drop_values(value, 0.5, training=False) is value
    dropped = drop_values(value, 0.5, training=True)
    # A (token, head) is kept whole or dropped whole.
    assert bool(((dropped == 0).all(-1) | (dropped == 2).all(-1)).all())


def test_varlen_says_why_it_cannot_run_here() -> None:
    with pytest.raises(SettingsError, match="CUDA"):
        attend(*random_qkv(), Segments.of(LENGTHS), "varlen")


def test_an_unknown_back_end_is_refused() -> None:
    with pytest.raises(SettingsError, match="segments"):
        check_backend("flash")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_agrees_on_a_gpu() -> None:
    segments = Segments.of(LENGTHS).to("cuda")
    qkv = [x.detach().to("cuda", torch.bfloat16) for x in random_qkv()]
    expected = attend(*(x.float() for x in qkv), segments, "eager")
    torch.testing.assert_close(attend(*qkv, segments, "auto").float(), expected, atol=2e-2, rtol=0)
