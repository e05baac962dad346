"""Our encoder against `transformers`' BertForMaskedLM, and against outputs of the published code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from genescale.training.model import EncoderConfig, MaskedGeneModel, PackedBatch, new_model, pack
from genescale.training.weights import encoder_from_hf, from_hf, to_hf

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

VOCABULARY, WINDOW = 120, 64
LENGTHS = (5, 64, 17, 17, 1, 30)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def cells() -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [draws.integers(2, VOCABULARY, size=length).astype(np.uint16) for length in LENGTHS]


@pytest.fixture(scope="module")
def theirs() -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        hidden_act="relu",
        max_position_embeddings=WINDOW,
        initializer_range=0.15,
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config)
        for name, parameter in model.named_parameters():
            # Biases and norms start at 0 and 1, where a mix-up of two of them would not show.
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=float("LayerNorm.weight" in name), std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> MaskedGeneModel:
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    config = EncoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
    return from_hf(load_file(folder / "model.safetensors"), config)


def outputs_of_theirs(model: Any, cell: np.ndarray) -> Any:
    """One cell alone, without padding."""
    with torch.no_grad():
        return model(
            torch.from_numpy(cell.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(cell), dtype=torch.int64),
            output_hidden_states=True,
        )


def every_position(batch: PackedBatch) -> torch.Tensor:
    return torch.arange(len(batch.tokens_t))


@pytest.mark.parametrize("backend", ["segments", "padded", "eager"])
def test_a_saved_model_of_theirs_loads_here_and_agrees(
    theirs: Any, ours: MaskedGeneModel, cells: list[np.ndarray], backend: str
) -> None:
    ours.encoder.attention = backend  # type: ignore[assignment]
    batch = pack(cells)
    with torch.no_grad():
        states = ours.encoder.hidden_states(batch)
        logits = ours(batch, every_position(batch))
    for cell, start in zip(cells, batch.offsets[:-1].tolist(), strict=True):
        expected = outputs_of_theirs(theirs, cell)
        here = slice(start, start + len(cell))
        assert len(states) == len(expected.hidden_states)
        for state, expected_state in zip(states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state[here], expected_state[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(logits[here], expected.logits[0], atol=TOLERANCE, rtol=0)


def test_our_saved_model_loads_there_and_agrees(cells: list[np.ndarray], tmp_path: Path) -> None:
    config = EncoderConfig(
        vocabulary_size=VOCABULARY,
        width=32,
        layers=2,
        heads=4,
        feed_forward=64,
        positions=WINDOW,
        initializer_range=0.2,
    )
    model = new_model(config, seed=3).eval()
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    save_file(to_hf(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, loading = transformers.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    batch = pack(cells)
    with torch.no_grad():
        logits = model(batch, every_position(batch))
    for cell, start in zip(cells, batch.offsets[:-1].tolist(), strict=True):
        expected = outputs_of_theirs(theirs.eval(), cell).logits[0]
        torch.testing.assert_close(logits[start : start + len(cell)], expected, atol=TOLERANCE, rtol=0)


def test_gradients_agree(theirs: Any, cells: list[np.ndarray], tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    config = EncoderConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    ours = from_hf(load_file(tmp_path / "model.safetensors"), config)
    batch = pack(cells)
    masked = torch.tensor([0, 3, 20, 70, 80, 100, 120])
    labels = torch.tensor([7, 8, 9, 10, 11, 12, 13])
    torch.nn.functional.cross_entropy(ours(batch, masked), labels, reduction="sum").backward()
    theirs.zero_grad()
    padded = torch.zeros(len(cells), max(LENGTHS), dtype=torch.int64)
    expected = torch.full_like(padded, -100)
    stream_labels = torch.full((sum(LENGTHS),), -100).index_put((masked,), labels)
    for row, (cell, start) in enumerate(zip(cells, batch.offsets[:-1].tolist(), strict=True)):
        padded[row, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
        expected[row, : len(cell)] = stream_labels[start : start + len(cell)]
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    logits = theirs(padded, attention_mask=real.long()).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten(), reduction="sum").backward()
    ours_by_name = gradients_under_their_names(ours)
    for name, parameter in theirs.named_parameters():
        if name.endswith("decoder.bias"):
            continue
        ours_gradient, gradient = torch.from_numpy(ours_by_name[name]), parameter.grad.clone()
        if name.endswith("word_embeddings.weight"):
            # Their embedding passes no gradient to the padding row; we never have padding to begin with, and what
            # both get from the tied decoder is compared in every other row.
            ours_gradient, gradient = ours_gradient[1:], gradient[1:]
        torch.testing.assert_close(
            ours_gradient, gradient, atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def gradients_under_their_names(model: MaskedGeneModel) -> Mapping[str, np.ndarray]:
    twin = MaskedGeneModel(model.config)
    twin.load_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
    return to_hf(twin)


def test_attention_weights_agree(theirs: Any, ours: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    theirs.set_attn_implementation("eager")
    batch = pack(cells)
    with torch.no_grad():
        weights = ours.encoder.attention_weights(batch, layer=1)
        for cell, found in zip(cells, weights, strict=True):
            tokens = torch.from_numpy(cell.astype(np.int64))[None]
            expected = theirs(tokens, attention_mask=torch.ones_like(tokens), output_attentions=True).attentions[1][0]
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    theirs.set_attn_implementation("sdpa")


# --- outputs of the published code -----------------------------------------------------------------------------------


def golden_cells(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "cells.parquet").to_pydict()
    return dict(zip(table["cell_id"], map(np.asarray, table["input_ids"]), strict=True))


def vectors(table: Any) -> np.ndarray:
    columns = sorted((name for name in table.column_names if name.isdigit()), key=int)
    return np.stack([table[name].to_numpy() for name in columns], axis=1)


@pytest.mark.shared
@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("published_layer", [0, -1])
def test_embeddings_of_the_published_code(shared_data: Path, version: str, published_layer: int) -> None:
    folder = shared_data / "golden" / f"forward_{version}"
    config = EncoderConfig.from_hf(json.loads((folder / "model" / "config.json").read_text()))
    encoder = encoder_from_hf(load_file(folder / "model" / "model.safetensors"), config)
    cells = golden_cells(folder)
    with torch.no_grad():
        hidden = encoder(pack(list(cells.values())), layers=config.layers + published_layer)
    split = hidden.split([len(cell) for cell in cells.values()])
    states = dict(zip(cells, (state.numpy() for state in split), strict=True))
    # <cls> and <eos> frame the cells of the second layout and do not count as genes.
    genes = {name: state[1:-1] if version == "V2" else state for name, state in states.items()}
    checked = 0
    for pooling, found in {
        "cell": {name: state.mean(0) for name, state in genes.items()},
        "cls": {name: state[0] for name, state in states.items()},
    }.items():
        path = folder / f"embeddings_{pooling}_layer{published_layer}.parquet"
        if not path.is_file():
            continue
        table = pq.read_table(path)
        expected = dict(zip(table["cell_id"].to_pylist(), vectors(table), strict=True))
        assert set(expected) == set(cells)
        for name, vector in expected.items():
            np.testing.assert_allclose(found[name], vector, atol=2e-5, rtol=0)
        checked += 1
    assert checked >= 1


@pytest.mark.shared
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_gene_embeddings_of_the_published_code(shared_data: Path, version: str) -> None:
    folder = shared_data / "golden" / f"forward_{version}"
    config = EncoderConfig.from_hf(json.loads((folder / "model" / "config.json").read_text()))
    encoder = encoder_from_hf(load_file(folder / "model" / "model.safetensors"), config)
    batch = pack(list(golden_cells(folder).values()))
    with torch.no_grad():
        hidden = encoder(batch, layers=config.layers - 1).numpy().astype(np.float64)
    tokens = batch.tokens_t.numpy()
    table = pq.read_table(folder / "embeddings_gene_layer-1.parquet")
    layout = "gc30M" if version == "V1" else "gc104M"
    rows = (shared_data / "vocabularies" / f"geneformer_{layout}_genes.tsv").read_text().splitlines()[1:]
    token_of = {name: int(token) for name, token, *_ in (row.split("\t") for row in rows)}
    named = np.array([token_of[name] for name in table["token"].to_pylist()])
    sums = np.zeros((config.vocabulary_size, config.width))
    np.add.at(sums, tokens, hidden)
    means = sums[named] / np.bincount(tokens, minlength=config.vocabulary_size)[named, None]
    np.testing.assert_allclose(means, vectors(table), atol=2e-5, rtol=0)
