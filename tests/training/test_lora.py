"""Low-rank additions: nothing changes at first, only they learn, and merging them changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.errors import SettingsError
from genescale.training.fitting.lora import MATRICES, LowRankLinear, add_low_rank, merged_state
from genescale.training.model import Encoder, pack
from genescale.training.weights import load_encoder

RANK, ALPHA = 4, 12.0


def adapted(
    bundle: Bundle, matrices: Sequence[str] = MATRICES, *, layers: slice = slice(None), dropout: float = 0.0
) -> Encoder:
    encoder = load_encoder(bundle).requires_grad_(False)
    add_low_rank(encoder.layers[layers], matrices=matrices, rank=RANK, alpha=ALPHA, dropout=dropout, seed=3)
    return encoder


def learned(encoder: Encoder) -> Encoder:
    """The same encoder with additions as if it had learned."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("up_por"):
                parameter.normal_(0.0, 0.1, generator=generator)
    return encoder


def test_fresh_additions_change_nothing(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> None:
    batch = pack(tiny_cells)
    assert torch.equal(adapted(tiny_bundle).eval()(batch), load_encoder(tiny_bundle)(batch))


@pytest.mark.parametrize("matrices", [MATRICES, ("query", "value"), ("key",), ("narrow", "output")])
def test_merged_weights_compute_the_same(
    tiny_bundle: Bundle, tiny_cells: list[np.ndarray], matrices: tuple[str, ...]
) -> None:
    # In fp64, so that only the algebra is compared: fp32 rounds either way of adding up by about 1e-6.
    encoder, batch = learned(adapted(tiny_bundle, matrices)).eval().double(), pack(tiny_cells)
    plain = load_encoder(tiny_bundle).double()
    before = plain(batch)
    plain.load_state_dict(merged_state(encoder))
    torch.testing.assert_close(plain(batch), encoder(batch), rtol=0, atol=1e-10)
    assert not torch.allclose(plain(batch), before, atol=1e-3)


def test_only_the_named_parts_of_a_matrix_change(tiny_bundle: Bundle) -> None:
    plain, merged = (
        load_encoder(tiny_bundle).state_dict(),
        merged_state(learned(adapted(tiny_bundle, ("query", "value")))),
    )
    assert plain.keys() == merged.keys()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {f"layers.{layer}.attention.qkv.weight" for layer in range(2)}
    for name in changed:
        query, key, value = (a.equal(b) for a, b in zip(plain[name].chunk(3), merged[name].chunk(3), strict=True))
        assert (query, key, value) == (False, True, False)


def test_only_the_additions_get_gradients(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> None:
    encoder = learned(adapted(tiny_bundle, layers=slice(1, 2)))
    encoder(pack(tiny_cells)).square().sum().backward()
    with_gradients = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    additions = {name for name, _ in encoder.named_parameters() if name.endswith(("down_pri", "up_por"))}
    assert with_gradients == additions
    assert {name.split(".")[1] for name in additions} == {"1"}
    assert all(bool(encoder.get_parameter(name).grad.any()) for name in additions)  # type: ignore[union-attr]


def test_the_addition_is_scaled_by_alpha_over_rank() -> None:
    base = torch.nn.Linear(6, 4)
    layer = LowRankLinear(base, rank=2, alpha=5.0, dropout=0.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up_por.fill_(0.3)
    inputs = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    expected = base(inputs) + 2.5 * inputs @ layer.down_pri[0].T @ layer.up_por[0].T
    torch.testing.assert_close(layer(inputs), expected)
    assert float(layer.down_pri.detach().std()) == pytest.approx(6**-0.5, rel=0.5)


def test_dropout_falls_on_the_addition_alone() -> None:
    base = torch.nn.Linear(6, 4)
    layer = LowRankLinear(base, rank=2, alpha=2.0, dropout=0.9, generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(50, 6)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(layer(inputs), base(inputs))
        with torch.no_grad():
            layer.up_por.fill_(1.0)
        assert bool((layer(inputs).std(dim=0) > 0.1).all())
    assert bool((layer.eval()(inputs).std(dim=0) < 1e-6).all())


@pytest.mark.parametrize("matrices", [(), ("queries",), ("key", "key")])
def test_matrices_that_are_none_are_refused(tiny_bundle: Bundle, matrices: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match=r"matri"):
        adapted(tiny_bundle, matrices)
