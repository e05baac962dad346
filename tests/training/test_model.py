"""The encoder: packing, early stop, masked head, initial weights, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genescale.platform.errors import LimitError, SettingsError
from genescale.training.model import EncoderConfig, MaskedGeneModel, new_model, pack

LENGTHS = (9, 1, 20, 9, 14)
BACKENDS = ("segments", "padded", "eager")


def small_config(**changes: object) -> EncoderConfig:
    values = {"vocabulary_size": 50, "width": 16, "layers": 3, "heads": 2, "feed_forward": 32, "positions": 20}
    return EncoderConfig(**{**values, "initializer_range": 0.3, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cells() -> list[np.ndarray]:
    draws = np.random.default_rng(1)
    return [draws.integers(2, 50, size=length).astype(np.uint16) for length in LENGTHS]


@pytest.fixture(scope="module")
def model() -> MaskedGeneModel:
    return new_model(small_config(), seed=0).eval()


@torch.no_grad()
def test_a_packed_batch_equals_its_cells_one_by_one(model: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    together = model.encoder(pack(cells)).split(list(LENGTHS))
    for cell, state in zip(cells, together, strict=True):
        torch.testing.assert_close(state, model.encoder(pack([cell])), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
@torch.no_grad()
def test_a_cell_is_not_changed_by_its_company(cells: list[np.ndarray], backend: str, changed: int) -> None:
    model = new_model(small_config(), seed=0, attention=backend).eval()
    others = [cell if number != changed else 51 - cell for number, cell in enumerate(cells)]
    before, after = (model.encoder(pack(batch)).split(list(LENGTHS)) for batch in (cells, others))
    for number, (here, elsewhere) in enumerate(zip(before, after, strict=True)):
        # To the last bit: one addend from another cell, however small, would show.
        assert torch.equal(here, elsewhere) == (number != changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_reaches_another_cell(cells: list[np.ndarray], backend: str) -> None:
    model = new_model(small_config(), seed=0, attention=backend).eval()
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: object, states: torch.Tensor) -> None:
        states.retain_grad()
        embedded.append(states)

    model.encoder.embeddings.register_forward_hook(keep)
    model.encoder(pack(cells)).split(list(LENGTHS))[2].square().sum().backward()
    gradient = embedded[0].grad
    assert gradient is not None
    reached = [bool(part.any()) for part in gradient.split(list(LENGTHS))]
    assert reached == [False, False, True, False, False]


@pytest.mark.parametrize("backend", ["segments", "eager"])
@torch.no_grad()
def test_packed_equals_padded(cells: list[np.ndarray], backend: str) -> None:
    def logits(name: str) -> torch.Tensor:
        model = new_model(small_config(), seed=0, attention=name).eval()
        return model(pack(cells), torch.arange(sum(LENGTHS)))

    torch.testing.assert_close(logits(backend), logits("padded"), atol=1e-5, rtol=0)


@torch.no_grad()
def test_stopping_early_gives_the_states_of_a_full_run(model: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    batch = pack(cells)
    states = model.encoder.hidden_states(batch)
    assert len(states) == 4
    for layers, state in enumerate(states):
        torch.testing.assert_close(model.encoder(batch, layers=layers), state, atol=0, rtol=0)
    torch.testing.assert_close(model.encoder(batch), states[-1], atol=0, rtol=0)


@torch.no_grad()
def test_logits_are_those_of_the_masked_positions(model: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    batch = pack(cells)
    everywhere = model(batch, torch.arange(len(batch.tokens_t)))
    chosen = torch.tensor([0, 9, 10, 40, 52])
    logits = model(batch, chosen)
    assert logits.shape == (5, 50)
    torch.testing.assert_close(logits, everywhere[chosen], atol=1e-5, rtol=0)


def test_the_head_is_computed_at_masked_positions_only(model: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    """With 25,426 genes the decoder costs as much as the encoder: no row of it may be computed for nothing."""
    rows: list[int] = []
    hook = model.head.register_forward_hook(lambda head, given, logits: rows.extend([len(given[0]), len(logits)]))
    try:
        model(pack(cells), torch.tensor([4, 10, 31]))
    finally:
        hook.remove()
    assert rows == [3, 3]


def test_the_decoder_is_tied_to_the_token_embedding(model: MaskedGeneModel, cells: list[np.ndarray]) -> None:
    twin = MaskedGeneModel(model.config).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        before = twin(pack(cells), torch.tensor([3]))
        twin.encoder.embeddings.tokens.weight[49] += 1.0  # a token that no cell of the batch has at position 3
        after = twin(pack([np.where(cell == 49, 48, cell) for cell in cells]), torch.tensor([3]))
    assert before[0, 49] != after[0, 49]
    names = [name for name, _ in twin.named_parameters()]
    assert not any("decoder" in name for name in names)


@pytest.mark.parametrize("backend", ["segments", "padded"])
def test_back_ends_train_alike_with_dropout(cells: list[np.ndarray], backend: str) -> None:
    def gradients(name: str) -> dict[str, torch.Tensor]:
        config = small_config(hidden_dropout=0.2, attention_dropout=0.3)
        model = new_model(config, seed=0, attention=name).train()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model(pack(cells), torch.tensor([1, 20, 30])).square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected, found = gradients("eager"), gradients(backend)
    assert set(found) == set(expected) == {name for name, _ in new_model(small_config(), seed=0).named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (new_model(small_config(), seed=seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.layers.0.widen.weight"], other["encoder.layers.0.widen.weight"])


def test_initial_weights_are_those_of_the_published_architecture() -> None:
    model = new_model(small_config(width=128, vocabulary_size=2_000, initializer_range=0.02), seed=0)
    tokens = model.encoder.embeddings.tokens.weight.detach()
    assert abs(float(tokens[1:].std()) - 0.02) < 5e-4
    assert not tokens[0].any()
    assert not model.encoder.layers[1].attention.qkv.bias.any()
    assert bool((model.head.norm.weight == 1).all())


def test_a_cell_longer_than_the_window_is_refused(model: MaskedGeneModel) -> None:
    with pytest.raises(LimitError, match=r"21 tokens.*window is 20"):
        model.encoder(pack([np.arange(21)]))


def test_a_cell_without_tokens_is_refused() -> None:
    with pytest.raises(LimitError, match="cell 1"):
        pack([np.array([3]), np.array([], dtype=np.uint16)])


@pytest.mark.parametrize("layers", [-1, 4])
def test_layers_that_are_not_there_are_refused(model: MaskedGeneModel, cells: list[np.ndarray], layers: int) -> None:
    with pytest.raises(LimitError):
        model.encoder(pack(cells), layers=layers)
    with pytest.raises(LimitError):
        model.encoder.attention_weights(pack(cells), layer=layers)


@pytest.mark.parametrize(
    "changes",
    [{"heads": 3}, {"layers": 0}, {"hidden_dropout": 1.0}, {"attention_dropout": -0.1}, {"pad_token": 50}],
)
def test_shapes_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        small_config(**changes)


def test_the_config_travels_through_the_hugging_face_layout() -> None:
    config = small_config(hidden_dropout=0.1, attention_dropout=0.05)
    assert EncoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("position_embedding_type", "relative_key"), ("model_type", "roberta")]
)
def test_another_architecture_is_refused(key: str, value: str) -> None:
    with pytest.raises(SettingsError, match=key):
        EncoderConfig.from_hf({**small_config().to_hf(), key: value})


def test_a_config_without_its_sizes_is_refused() -> None:
    content = small_config().to_hf()
    del content["hidden_size"]
    with pytest.raises(SettingsError, match="hidden_size"):
        EncoderConfig.from_hf(content)


def test_cells_of_tokens_are_numbered(cells: list[np.ndarray]) -> None:
    batch = pack(cells)
    assert batch.cells_t().tolist() == np.repeat(np.arange(len(LENGTHS)), LENGTHS).tolist()
    assert batch.max_length == 20
    assert batch.offsets.tolist() == [0, 9, 10, 30, 39, 53]
