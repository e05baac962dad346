"""Averaged weights: the average that is meant, judged and kept in place of the last weights, the same after a stop."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.errors import IntegrityError, SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.training.averaging import WeightAverage
from genescale.training.batches import evaluation_batches, step_batches
from genescale.training.engine import TorchEngine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.epochs import Epoch, judge
from genescale.training.fitting.examples import cell_examples
from genescale.training.fitting.vector_fitting import fit_vectors, fit_vectors_for
from genescale.training.heads.spec import HeadSpec
from genescale.training.masking import Masking
from genescale.training.shards import SavedState, Snapshot

HERE = Path(__file__).parent
ENGINES = runpy.run_path(str(HERE / "deepspeed_worker.py"))
FITS = runpy.run_path(str(HERE / "deepspeed_fit_worker.py"))
STEPS, SAVED_AT = ENGINES["STEPS"], ENGINES["SAVED_AT"]
CONFIG: FinetuneConfig = dataclasses.replace(FITS["CONFIG"], weight_average=0.2)
REACH = 0.2


def engine_of(reach: float) -> TorchEngine:
    model = ENGINES["model"](ENGINES["source"]())
    return TorchEngine(model, ENGINES["optimizer"](), total_steps=STEPS, average=reach)


def trained(engine: TorchEngine, *, first: int = 0) -> list[dict[str, np.ndarray]]:
    """Weights after each step, as the engine keeps them."""
    cells = ENGINES["source"]()
    masking = Masking(vocabulary=cells.vocabulary, seed=5)
    kept = []
    for batch in step_batches(cells, ENGINES["plan"](cells), masking, rank=0, workers=1, first=first, last=STEPS):
        engine.step(batch)
        kept.append(engine.weights())
    return kept


def evaluated(engine: TorchEngine) -> np.ndarray:
    cells = ENGINES["source"]()
    masking = Masking(vocabulary=cells.vocabulary, seed=5)
    batches = evaluation_batches(cells, ENGINES["plan"](cells), masking, rank=0, workers=1)
    return engine.total(torch.stack([engine.evaluate(batch.micro_batches) for batch in batches]).sum(0))


def by_hand(steps: list[np.ndarray], reach: float) -> np.ndarray:
    """The weights of the average written out: of step s after t steps, its share times what later steps left of it."""
    order = 1 / reach - 1
    shares = [order / (step + order - 1) for step in range(1, len(steps) + 1)]
    left = [share * np.prod([1 - later for later in shares[s + 1 :]]) for s, share in enumerate(shares)]
    assert sum(left) == pytest.approx(1)
    return np.tensordot(left, np.stack(steps).astype(np.float64), axes=1)


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [REACH, 0.5])
def test_an_engine_keeps_and_judges_the_average_and_trains_as_without(reach: float) -> None:
    plain, engine = engine_of(0), engine_of(reach)
    steps, kept = trained(plain), trained(engine)
    for name, found in kept[-1].items():
        expected = by_hand([step[name] for step in steps], reach)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=name)
        if reach == 0.5:
            mean = np.mean([step[name] for step in steps], axis=0)
            np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7, err_msg=name)
    # What it steps with is not the average: the next loss is that of an engine without one.
    last = engine.snapshot().fragments
    assert all(torch.equal(values, last[key]) for key, values in plain.snapshot().fragments.items())
    # An engine whose weights are the average measures the same.
    other = engine_of(0)
    averages = {key.replace("average/", "weight/"): last[key] for key in last if key.startswith("average/")}
    for name, parameter in other._model.named_parameters():
        parameter.data.copy_(averages[f"weight/{name}@0"].reshape(parameter.shape))
    np.testing.assert_allclose(evaluated(engine), evaluated(other), rtol=1e-6)
    assert evaluated(engine)[0] != pytest.approx(evaluated(plain)[0], rel=1e-4)


def test_the_mean_age_of_what_is_averaged_is_the_reach() -> None:
    """A weight that is the number of its step: the average says how far back it reaches."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = WeightAverage([("clock", parameter)], 0.1)
    for step in range(1, 2001):
        parameter.data.fill_(step)
        average.add(step)
    with average.in_place():
        assert 2000 - parameter.item() == pytest.approx(0.1 * 2000, rel=0.01)
    assert parameter.item() == 2000


def test_an_average_goes_on_from_a_state_exactly(tmp_path: Path) -> None:
    undisturbed = trained(engine_of(REACH))[-1]
    cells, engine = ENGINES["source"](), engine_of(REACH)
    masking = Masking(vocabulary=cells.vocabulary, seed=5)
    for batch in step_batches(cells, ENGINES["plan"](cells), masking, rank=0, workers=1, first=0, last=SAVED_AT):
        engine.step(batch)
    engine.snapshot().write(tmp_path / "shard-0")
    again = engine_of(REACH)
    again.restore(ENGINES["saved_in"](tmp_path))
    continued = trained(again, first=SAVED_AT)[-1]
    assert all(np.array_equal(continued[name], values) for name, values in undisturbed.items())


def test_a_state_without_an_average_is_refused(tmp_path: Path) -> None:
    engine_of(0).snapshot().write(tmp_path / "shard-0")
    with pytest.raises(IntegrityError, match="whole average"):
        engine_of(REACH).restore(ENGINES["saved_in"](tmp_path))


def test_the_shares_of_all_workers_make_the_average(tmp_path: Path) -> None:
    parameters = [("a", torch.nn.Parameter(torch.randn(3, 5))), ("b", torch.nn.Parameter(torch.randn(2)))]
    average = WeightAverage(parameters, REACH)
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    for rank in range(3):
        share = average.added_to(Snapshot(adam_steps=1, shapes=shapes), rank=rank, workers=3)
        share.write(tmp_path / f"shard-{rank}")
    others = [(name, torch.nn.Parameter(torch.zeros_like(parameter))) for name, parameter in parameters]
    found = WeightAverage(others, REACH)
    found.restore(SavedState(sorted(tmp_path.glob("shard-*"))))
    with found.in_place():
        for (name, parameter), (_, expected) in zip(others, parameters, strict=True):
            assert torch.equal(parameter, expected), name


# --- fits ------------------------------------------------------------------------------------------------------------


def test_a_fit_that_stops_goes_on_with_its_average(tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path) -> None:
    expected, weights = FITS["fit"](tiny_bundle, tiny_corpus, CONFIG, rhythm=FITS["RHYTHM"])
    plain, _ = FITS["fit"](tiny_bundle, tiny_corpus, FITS["CONFIG"], rhythm=FITS["RHYTHM"])
    # The same steps were taken, and others judged.
    assert [epoch.train_loss for epoch in expected.history] == [epoch.train_loss for epoch in plain.history]
    assert all(a.validation_loss != b.validation_loss for a, b in zip(expected.history, plain.history, strict=True))

    def stop(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"run_home": str(tmp_path / "run"), "store": Store(StorageSettings())}
    options |= {"corpus": tiny_corpus, "rhythm": FITS["RHYTHM"]}
    with pytest.raises(KeyboardInterrupt):
        FITS["fit"](tiny_bundle, tiny_corpus, CONFIG, on_epoch=stop, **options)
    found, same = FITS["fit"](tiny_bundle, tiny_corpus, CONFIG, **options)
    assert found.history == expected.history
    assert all(np.array_equal(same[name], values) for name, values in weights.items())


def test_heads_on_cached_vectors_are_averaged_too() -> None:
    spec = HeadSpec(classes=("a", "b"), label="x", width=4, layer="last", pooling="cls", dropout=0.0)
    generator = np.random.default_rng(0)
    codes_n = (generator.random(60) < 0.5).astype(np.int64)
    rows_nd = (generator.normal(size=(60, 4)) + codes_n[:, None]).astype(np.float32)
    examples = cell_examples(np.arange(60), np.full(60, 10), (codes_n,))
    plain = FinetuneConfig(epochs=3, cells_per_batch=60, patience=0)
    config = dataclasses.replace(plain, weight_average=0.5)

    def refitted(settings: FinetuneConfig, epochs: int) -> dict[str, np.ndarray]:
        head = fit_vectors_for([spec], rows_nd, examples, settings, epochs=epochs).head
        return {name: values.detach().numpy() for name, values in head.named_parameters()}

    # One batch an epoch: the average of three epochs is the mean of three heads.
    heads, average = [refitted(plain, epochs) for epochs in (1, 2, 3)], refitted(config, 3)
    for name, values in average.items():
        np.testing.assert_allclose(values, np.mean([head[name] for head in heads], axis=0), rtol=1e-5, err_msg=name)
    fitted = fit_vectors([spec], rows_nd, examples, rows_nd, examples, config)
    found = judge(fitted.heads, [fitted.head.answer(rows_nd)], examples)
    assert found.loss == pytest.approx(fitted.history[fitted.best_epoch - 1].validation_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_average": 0.6}, "mean age"),
        ({"weight_average": -0.1}, "mean age"),
        ({"weight_average": float("nan")}, "mean age"),
        ({"weight_average": 0.1, "zero_stage": 3}, "stage 3"),
        ({"weight_average": 0.1, "head": "nearest"}, "no weights"),
    ],
)
def test_what_cannot_be_averaged_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        FinetuneConfig(**changes)
