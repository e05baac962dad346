"""The embedder: batches equal single cells, pooling leaves special tokens out, layers are the right ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, LimitError, SettingsError
from genescale.training.embedder import (
    LAYERS,
    POOLINGS,
    Embedder,
    Layer,
    Pooling,
    Precision,
    gene_table,
    plan_batches,
)
from genescale.training.model import pack
from genescale.training.weights import load_encoder


@pytest.fixture(scope="module")
def embedder(tiny_bundle: Bundle) -> Embedder:
    return Embedder.load(tiny_bundle, device="cpu")


@pytest.fixture(scope="module")
def hidden_by_layer(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Hidden states of each cell after 0, 1 and 2 layers, straight from the encoder."""
    encoder = load_encoder(tiny_bundle)
    with torch.inference_mode():
        states = [encoder.hidden_states(pack([cell])) for cell in tiny_cells]
    return [[state[layer].numpy() for state in states] for layer in range(3)]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_batch_equals_single_cells_bit_for_bit(
    embedder: Embedder, tiny_cells: list[np.ndarray], layer: Layer, pooling: Pooling
) -> None:
    together_nd = embedder.embed_cells(tiny_cells, layer=layer, pooling=pooling)
    singles_nd = [embedder.embed_cells([cell], layer=layer, pooling=pooling)[0] for cell in tiny_cells]
    assert together_nd.dtype == np.float32
    assert together_nd.shape == (len(tiny_cells), embedder.width)
    assert np.array_equal(together_nd, np.stack(singles_nd))
    backwards_nd = embedder.embed_cells(tiny_cells[::-1], layer=layer, pooling=pooling)
    assert np.array_equal(backwards_nd[::-1], together_nd)


@pytest.mark.parametrize(("layer", "layers"), [("last", 2), ("second_to_last", 1)])
def test_layers_and_pooling_are_what_their_names_say(
    embedder: Embedder,
    tiny_cells: list[np.ndarray],
    hidden_by_layer: list[list[np.ndarray]],
    layer: Layer,
    layers: int,
) -> None:
    hidden = hidden_by_layer[layers]
    means_nd = embedder.embed_cells(tiny_cells, layer=layer, pooling="mean_genes")
    assert np.allclose(means_nd, np.stack([state[1:-1].mean(axis=0) for state in hidden]), atol=1e-6)
    cls_nd = embedder.embed_cells(tiny_cells, layer=layer, pooling="cls")
    assert np.allclose(cls_nd, np.stack([state[0] for state in hidden]), atol=1e-6)
    for ours_td, state_td in zip(embedder.embed_genes(tiny_cells, layer=layer), hidden, strict=True):
        assert np.allclose(ours_td, state_td, atol=1e-6)


def test_the_default_is_the_published_default(embedder: Embedder, tiny_cells: list[np.ndarray]) -> None:
    default_nd = embedder.embed_cells(tiny_cells)
    assert np.array_equal(default_nd, embedder.embed_cells(tiny_cells, layer="second_to_last", pooling="mean_genes"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_pooling_agrees_with_pooling_cell_by_cell(
    embedder: Embedder, tiny_cells: list[np.ndarray], pooling: Pooling
) -> None:
    """CUDA packs many cells into one stream and pools there; the same arithmetic is checked here on the CPU."""
    from genescale.training.embedder import pool

    batch = pack(tiny_cells)
    hidden_td = torch.from_numpy(np.concatenate(embedder.embed_genes(tiny_cells)))
    specials = torch.tensor(list(embedder.vocabulary.special.values()))
    packed_nd = pool(hidden_td, batch, pooling, specials).numpy()
    assert np.allclose(packed_nd, embedder.embed_cells(tiny_cells, pooling=pooling), atol=1e-6)


def test_batches_keep_the_token_budget_and_lose_no_cell() -> None:
    lengths_n = np.array([5, 100, 7, 30, 30, 1, 64])
    batches = list(plan_batches(lengths_n, 64))
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert all(len(batch) == 1 or lengths_n[batch].sum() <= 64 for batch in batches)
    assert np.concatenate(batches).tolist()[:2] == [1, 6]


def test_gene_table_is_the_mean_over_the_cells_with_the_gene(embedder: Embedder, tiny_cells: list[np.ndarray]) -> None:
    table = gene_table(embedder, tiny_cells)
    hidden = embedder.embed_genes(tiny_cells)
    specials = set(embedder.vocabulary.special.values())
    seen: dict[int, list[np.ndarray]] = {}
    for cell, state_td in zip(tiny_cells, hidden, strict=True):
        for token, vector_d in zip(cell.tolist(), state_td, strict=True):
            if token not in specials:
                seen.setdefault(token, []).append(vector_d)
    assert table.tokens_g.tolist() == sorted(seen)
    assert table.gene_ids == tuple(embedder.vocabulary.gene_of_token(token) for token in sorted(seen))
    assert table.cells_g.tolist() == [len(seen[token]) for token in sorted(seen)]
    assert np.allclose(table.embeddings_gd, [np.mean(seen[token], axis=0) for token in sorted(seen)], atol=1e-5)


def test_nothing_is_computed_above_the_wanted_layer(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> None:
    """With the last layer's weights destroyed, the second to last is as before, and the last is not."""
    encoder = load_encoder(tiny_bundle)
    broken = Embedder(tiny_bundle, encoder, device=torch.device("cpu"), tokens_per_batch=100, precision="float32")
    whole = Embedder.load(tiny_bundle, device="cpu")
    with torch.no_grad():
        encoder.layers[-1].widen.weight.fill_(float("nan"))
    assert np.array_equal(broken.embed_cells(tiny_cells), whole.embed_cells(tiny_cells))
    assert np.isnan(broken.embed_cells(tiny_cells, layer="last")).any()


def test_no_cells_give_no_vectors(embedder: Embedder) -> None:
    assert embedder.embed_cells([]).shape == (0, embedder.width)
    assert embedder.embed_genes([]) == []


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        ([], InputError, "cell 1: the cell has no gene"),
        ([2, 3], InputError, "cell 1: the cell has no gene"),
        ([2, 50, 204, 3], InputError, "outside 0 to 203"),
        ([2, 50, -1, 3], InputError, "outside 0 to 203"),
        ([2, 50, 60, 3, 0], InputError, "<pad>"),
        ([2, *range(4, 131), 3], LimitError, "129 tokens, the window is 128"),
    ],
)
def test_cells_that_cannot_be_embedded_are_named(
    embedder: Embedder, tiny_cells: list[np.ndarray], cell: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedder.embed_cells([tiny_cells[0], np.array(cell, dtype=np.int64)])


def test_cls_needs_a_vocabulary_and_a_cell_with_it(bare_bundle: Bundle, embedder: Embedder) -> None:
    bare = Embedder.load(bare_bundle, device="cpu")
    with pytest.raises(SettingsError, match="has no <cls>"):
        bare.embed_cells([np.array([5, 6])], pooling="cls")
    with pytest.raises(InputError, match="does not begin with <cls>"):
        embedder.embed_cells([np.array([5, 6])], pooling="cls")


def test_unknown_names_are_refused(embedder: Embedder, tiny_cells: list[np.ndarray], tiny_bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match="second_to_last"):
        embedder.embed_cells(tiny_cells, layer="middle")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="mean_genes"):
        embedder.embed_cells(tiny_cells, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="not a device"):
        Embedder.load(tiny_bundle, device="abacus")
    with pytest.raises(SettingsError, match="tokens_per_batch"):
        Embedder.load(tiny_bundle, tokens_per_batch=0)


@pytest.mark.parametrize(("precision", "rounding"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_16_bits_stay_within_their_rounding(
    embedder: Embedder, tiny_bundle: Bundle, tiny_cells: list[np.ndarray], precision: Precision, rounding: float
) -> None:
    short = Embedder.load(tiny_bundle, device="cpu", precision=precision).embed_cells(tiny_cells)
    exact = embedder.embed_cells(tiny_cells)
    assert short.dtype == np.float32
    assert not np.array_equal(short, exact)
    assert np.abs(short - exact).max() < rounding * np.abs(exact).max()
