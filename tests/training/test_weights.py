"""Weights keep their values on the way out and in, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genescale.platform.errors import IntegrityError
from genescale.training.model import EncoderConfig, MaskedGeneModel, new_model, pack
from genescale.training.weights import encoder_from_hf, from_hf, to_hf

CONFIG = EncoderConfig(vocabulary_size=30, width=8, layers=2, heads=2, feed_forward=16, positions=10)
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def model() -> MaskedGeneModel:
    return new_model(CONFIG, seed=0).eval()


@pytest.fixture
def tensors(model: MaskedGeneModel) -> dict[str, np.ndarray]:
    return to_hf(model)


def test_there_and_back(model: MaskedGeneModel, tensors: dict[str, np.ndarray]) -> None:
    again = from_hf(tensors, CONFIG)
    assert not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_written_tensors_are_copies(model: MaskedGeneModel, tensors: dict[str, np.ndarray]) -> None:
    tensors[WORDS][:] = 9.0
    assert not bool((model.encoder.embeddings.tokens.weight == 9.0).any())


def test_half_precision_is_read_as_float32(tensors: dict[str, np.ndarray]) -> None:
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    assert {parameter.dtype for parameter in from_hf(half, CONFIG).parameters()} == {torch.float32}


def test_the_encoder_alone_passes_over_heads(model: MaskedGeneModel, tensors: dict[str, np.ndarray]) -> None:
    headless = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    headless |= {"bert.pooler.dense.weight": np.zeros((8, 8)), "classifier.weight": np.zeros((3, 8))}
    batch = pack([np.array([4, 5, 6])])
    with torch.no_grad():
        torch.testing.assert_close(encoder_from_hf(headless, CONFIG)(batch), model.encoder(batch), atol=0, rtol=0)


def test_copies_that_other_writers_leave_are_accepted(tensors: dict[str, np.ndarray]) -> None:
    tensors["cls.predictions.decoder.weight"] = tensors[WORDS].copy()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
    tensors["bert.embeddings.position_ids"] = np.arange(10)[None]
    from_hf(tensors, CONFIG)


def test_an_untied_decoder_is_refused(tensors: dict[str, np.ndarray]) -> None:
    tensors["cls.predictions.decoder.weight"] = tensors[WORDS] + 1
    with pytest.raises(IntegrityError, match="ties"):
        from_hf(tensors, CONFIG)


@pytest.mark.parametrize("load", [from_hf, encoder_from_hf])
def test_a_missing_tensor_is_named(load: object, tensors: dict[str, np.ndarray]) -> None:
    del tensors["bert.encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(IntegrityError, match=r"layer\.1\.attention\.self\.key\.weight"):
        load(tensors, CONFIG)  # type: ignore[operator]


@pytest.mark.parametrize("load", [from_hf, encoder_from_hf])
def test_an_unexpected_tensor_is_named(load: object, tensors: dict[str, np.ndarray]) -> None:
    tensors["bert.encoder.layer.2.output.dense.weight"] = np.zeros((8, 16))
    with pytest.raises(IntegrityError, match=r"unexpected.*layer\.2"):
        load(tensors, CONFIG)  # type: ignore[operator]


@pytest.mark.parametrize("name", [WORDS, "bert.encoder.layer.0.attention.self.query.weight"])
def test_a_tensor_of_another_shape_is_named(name: str, tensors: dict[str, np.ndarray]) -> None:
    tensors[name] = tensors[name][:-1]
    with pytest.raises(IntegrityError, match=name):
        from_hf(tensors, CONFIG)
