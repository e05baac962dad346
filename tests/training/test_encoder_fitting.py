"""Fitting heads together with the encoder: what is read and learned, what stays, and how a run goes on after a kill."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder
from genescale.training.engine import TorchEngine
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_fitting import fit_encoder
from genescale.training.fitting.encoder_model import HeadedEncoder, LabelledRows
from genescale.training.fitting.encoder_plan import ExampleCells, FitPlan, LabelledCells
from genescale.training.fitting.encoder_worker import optimizer_config
from genescale.training.fitting.epochs import Epoch, Fitted, judge
from genescale.training.fitting.examples import NO_LABEL, POOLED, Examples, gene_examples
from genescale.training.heads.spec import HeadSpec
from genescale.training.weights import load_encoder

SHARED = runpy.run_path(str(Path(__file__).with_name("deepspeed_fit_worker.py")))
CONFIG: FinetuneConfig = SHARED["CONFIG"]
CELLS: HeadSpec = SHARED["CELLS"]
labelled, parts, reader, fit = (SHARED[name] for name in ("labelled", "parts", "reader", "fit"))
Weights = dict[str, np.ndarray]
FirstFit = tuple[Fitted, Weights, list[Epoch]]


@pytest.fixture(scope="module")
def fitted(tiny_bundle: Bundle, tiny_corpus: Corpus) -> FirstFit:
    told: list[Epoch] = []
    return *fit(tiny_bundle, tiny_corpus, on_epoch=told.append, rhythm=SHARED["RHYTHM"]), told


def written(folder: Path, bundle: Bundle, weights: Weights) -> Bundle:
    return write_bundle(
        folder, kind=bundle.kind, config=bundle.config, weights=weights, vocabulary=bundle.vocabulary, lineage={}
    )


# --- what is learned -------------------------------------------------------------------------------------------------


def test_it_learns_and_tells_every_epoch_once(fitted: FirstFit) -> None:
    result, _, told = fitted
    assert [epoch.number for epoch in told] == [1, 2, 3, 4, 5]
    assert told == list(result.history)
    assert result.history[-1].validation_macro_f1 > 0.95
    assert result.history[-1].train_loss < 0.2 * result.history[0].train_loss


def test_what_is_returned_is_the_best_epoch(
    fitted: FirstFit, tiny_bundle: Bundle, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    result, weights, _ = fitted
    _, validation = parts(labelled(tiny_corpus))
    vectors_rd = Embedder.load(written(tmp_path / "bundle", tiny_bundle, weights)).embed_cells(
        tiny_corpus.tokens(validation.index_n.tolist()), layer="last"
    )
    found = judge(result.heads, [result.head.answer(vectors_rd)], validation)
    best = result.history[result.best_epoch - 1]
    assert found.loss == pytest.approx(best.validation_loss, rel=1e-4)
    assert best.validation_score == max(epoch.validation_score for epoch in result.history)


def test_it_stops_when_validation_gets_worse_and_keeps_the_best_epoch(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    train, validation = parts(labelled(tiny_corpus))
    # The better the training labels are learned, the worse these are predicted.
    wrong = np.where(validation.targets[0] == NO_LABEL, NO_LABEL, (validation.targets[0] + 1) % 3)
    validation = dataclasses.replace(validation, targets=(wrong,))
    config = dataclasses.replace(CONFIG, patience=2, epochs=9, learning_rate=3e-2)
    result, _ = fit_encoder(tiny_bundle, reader(tiny_corpus), train, validation, (CELLS,), config)
    assert len(result.history) == result.best_epoch + 2 < 9


@pytest.mark.parametrize("encoder", ["trained", "lora"])
def test_what_is_frozen_stays_as_it_was(tiny_bundle: Bundle, tiny_corpus: Corpus, encoder: Any) -> None:
    config = dataclasses.replace(CONFIG, epochs=1, encoder=encoder, frozen_layers=1)
    _, weights = fit(tiny_bundle, tiny_corpus, config)
    before = tiny_bundle.weights()
    assert weights.keys() == before.keys()
    changed = {name for name in before if not np.array_equal(before[name], weights[name])}
    second = {name for name in before if name.startswith("bert.encoder.layer.1.")}
    matrices = {f"bert.encoder.layer.1.attention.self.{part}.weight" for part in ("query", "value")}
    assert changed == (matrices if encoder == "lora" else second)


def test_without_frozen_layers_the_embeddings_learn_too(fitted: FirstFit, tiny_bundle: Bundle) -> None:
    name = "bert.embeddings.position_embeddings.weight"
    assert not np.array_equal(fitted[1][name], tiny_bundle.weights()[name])
    masked_gene_head = "cls.predictions.bias"
    assert np.array_equal(fitted[1][masked_gene_head], tiny_bundle.weights()[masked_gene_head])


def test_the_layers_above_the_one_that_is_read_stay(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    spec = dataclasses.replace(CELLS, layer="second_to_last")
    config = dataclasses.replace(CONFIG, epochs=1, layer="second_to_last")
    _, weights = fit_encoder(tiny_bundle, reader(tiny_corpus), *parts(labelled(tiny_corpus)), (spec,), config)
    before = tiny_bundle.weights()
    for name in before:
        if ".layer.1." in name:
            assert np.array_equal(before[name], weights[name]), name


def test_genes_are_learned_from_their_tokens(
    tiny_bundle: Bundle, tiny_corpus: Corpus, tiny_vocabulary: Vocabulary
) -> None:
    """Every other marker gene is of another class: only its own token tells, its cell has genes of both."""
    tokens_g = np.array([tiny_vocabulary.token(f"GENE{gene}") for gene in range(24)])
    codes_g = np.arange(24) % 2

    def examples(index_n: np.ndarray) -> Examples:
        cells = tiny_corpus.tokens(index_n.tolist())
        cell_r, token_r = np.concatenate(
            [[[n, t] for t in np.flatnonzero(np.isin(cell, tokens_g))] for n, cell in enumerate(cells)]
        ).T
        genes = [int(np.flatnonzero(tokens_g == cells[n][t])[0]) for n, t in zip(cell_r, token_r, strict=True)]
        lengths = np.array([len(cell) for cell in cells])
        return gene_examples(index_n, lengths, cell_r, token_r, np.array(genes), codes_g)

    train, validation = examples(np.arange(120)), examples(np.arange(120, 160))
    spec = dataclasses.replace(CELLS, kind="gene_classes", classes=("even", "odd"))
    config = dataclasses.replace(CONFIG, epochs=8, encoder_learning_rate=3e-3)
    result, _ = fit_encoder(tiny_bundle, reader(tiny_corpus), train, validation, (spec,), config)
    assert result.history[result.best_epoch - 1].validation_macro_f1 == 1.0


def test_several_heads_learn_from_the_labels_that_there_are(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    examples = labelled(tiny_corpus)
    numbers = 50.0 + 10.0 * examples.targets[0].astype(np.float64)
    numbers[examples.targets[0] == NO_LABEL] = np.nan
    numbers[::3] = np.nan
    examples = dataclasses.replace(examples, targets=(*examples.targets, numbers))
    age = dataclasses.replace(CELLS, label="age", kind="number", classes=(), weight=0.5)
    config = dataclasses.replace(CONFIG, epochs=8)
    result, _ = fit_encoder(tiny_bundle, reader(tiny_corpus), *parts(examples), (CELLS, age), config)
    scores = result.history[-1].scores
    assert scores["cell_type.macro_f1"] > 0.9
    assert scores["age.r2"] > 0.6
    assert result.heads[1].answer(np.zeros((1, 32), np.float32)).shape == (1, 1)


def test_bf16_stays_close(fitted: FirstFit, tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    result, weights = fit(tiny_bundle, tiny_corpus, dataclasses.replace(CONFIG, precision="bf16", epochs=2))
    assert result.history[0].train_loss == pytest.approx(fitted[0].history[0].train_loss, rel=0.1)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_the_same_seed_fits_the_same_and_leaves_the_random_state_alone(
    fitted: FirstFit, tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    before = torch.random.get_rng_state()
    again, weights = fit(tiny_bundle, tiny_corpus, rhythm=SHARED["RHYTHM"])
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.history == fitted[0].history
    assert all(np.array_equal(weights[name], fitted[1][name]) for name in weights)


# --- what a step computes --------------------------------------------------------------------------------------------


def model_of(bundle: Bundle, specs: Sequence[HeadSpec] = (CELLS,), config: FinetuneConfig = CONFIG) -> HeadedEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HeadedEncoder(load_encoder(bundle), specs, config)


@pytest.mark.parametrize("pooling", ["mean_genes", "cls"])
def test_rows_are_read_as_the_embedder_reads_them(
    tiny_bundle: Bundle, tiny_cells: list[np.ndarray], pooling: Any
) -> None:
    lengths = np.array([len(cell) for cell in tiny_cells])
    n = len(tiny_cells)
    examples = Examples(
        index_n=np.arange(n),
        lengths_n=lengths,
        row_cell_r=np.r_[np.arange(n), 1, 1, 5],
        row_token_r=np.r_[np.full(n, POOLED), 3, 60, 7],
        targets=(np.zeros(n + 3, np.int64),),
        unit_r=np.arange(n + 3),
    )
    spec = dataclasses.replace(CELLS, pooling=pooling)
    specials = list(tiny_bundle.vocabulary.special.values())
    cells = LabelledCells(examples, (spec,), np.ones((1, n + 3), np.float32), specials)
    batch = cells.lane(tiny_cells, np.arange(n))
    embedder = Embedder.load(tiny_bundle)
    genes = embedder.embed_genes(tiny_cells, layer="last")
    expected = np.r_[
        embedder.embed_cells(tiny_cells, layer="last", pooling=pooling), [genes[1][3], genes[1][60], genes[5][7]]
    ]
    with torch.no_grad():
        found = model_of(tiny_bundle, (spec,)).eval().vectors(batch).numpy()
    np.testing.assert_allclose(found, expected[batch.rows], atol=2e-6)


def test_the_loss_is_the_weighted_mean_over_the_rows_of_the_whole_step(
    tiny_bundle: Bundle, tiny_corpus: Corpus
) -> None:
    """Whatever lane a row is in; rows without a label and empty lanes weigh nothing."""
    config = dataclasses.replace(CONFIG, class_weights="balanced", gradient_clip=1e9, lanes=4, dropout=0.0)
    spec = dataclasses.replace(CELLS, dropout=0.0)
    train, validation = parts(labelled(tiny_corpus), train=20)
    model, twin = (model_of(tiny_bundle, (spec,), config) for _ in range(2))
    for each in (model, twin):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
    plan = FitPlan(config, list(model.heads), train, validation, tiny_bundle.vocabulary, reader(tiny_corpus))  # type: ignore[arg-type]
    engine = TorchEngine(
        model, optimizer_config(config), total_steps=plan.total_steps, objective=LabelledRows(model, config)
    )
    source = ExampleCells(train, tiny_bundle.vocabulary, reader(tiny_corpus))
    batch = next(plan.batches(source, rank=0, workers=1, first=0))
    loss, _, weight = engine.step(batch).tolist()
    rows = np.concatenate([lane.rows for lane in batch.micro_batches])  # type: ignore[attr-defined]
    codes = train.targets[0]
    counts = np.bincount(codes[codes != NO_LABEL], minlength=3)
    used = rows[codes[rows] != NO_LABEL]
    weights = torch.tensor((counts.sum() / (3 * counts))[codes[used]], dtype=torch.float32)
    single = LabelledCells(train, (spec,), np.ones((1, train.n_rows), np.float32), [0, 1, 2, 3])
    lanes = [single.lane(source.tokens([int(train.row_cell_r[row])]), train.row_cell_r[[row]]) for row in used]
    logits = torch.cat([twin(lane) for lane in lanes])
    nll = functional.cross_entropy(logits, torch.tensor(codes[used]), reduction="none")
    expected = (nll * weights).sum() / weights.sum()
    expected.backward()
    assert weight == pytest.approx(float(weights.sum()), rel=1e-6)
    assert loss / weight == pytest.approx(expected.item(), rel=1e-5)
    gradients = [parameter.grad for parameter in twin.parameters() if parameter.grad is not None]
    assert engine.gradient_norm() == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4)


def test_genes_are_left_out_of_training_cells(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    train, validation = parts(labelled(tiny_corpus))
    config = dataclasses.replace(CONFIG, epochs=2, gene_dropout=0.4)
    heads: Any = list(model_of(tiny_bundle).heads)
    plan = FitPlan(config, heads, train, validation, tiny_bundle.vocabulary, reader(tiny_corpus))
    source = ExampleCells(train, tiny_bundle.vocabulary, reader(tiny_corpus))
    specials = set(tiny_bundle.vocabulary.special.values())
    left: dict[int, list[list[int]]] = {}
    for batch in plan.batches(source, rank=0, workers=1, first=0):
        for lane in batch.micro_batches:
            packed, rows = lane.packed, lane.rows.tolist()  # type: ignore[attr-defined]
            cells, ranks = (x.split(list(packed.lengths)) for x in (packed.tokens_t, packed.positions_t))
            for row, cell, rank in zip(rows, cells, ranks, strict=False):
                number = int(train.row_cell_r[row])
                left.setdefault(number, []).append(cell.tolist())
                # What stays keeps its rank in the whole cell.
                whole = source.tokens([number])[0].tolist()
                assert [whole[at] for at in rank.tolist()] == cell.tolist()
    shares = []
    for number, (first, second) in left.items():
        whole = source.tokens([number])[0].tolist()
        for cell in (first, second):
            assert [token for token in whole if token in set(cell)] == cell
            assert [token for token in whole if token in specials] == [token for token in cell if token in specials]
        shares += [
            (len(whole) - len(cell)) / (len(whole) - len(specials.intersection(whole))) for cell in (first, second)
        ]
    assert any(first != second for first, second in left.values())
    assert np.mean(shares) == pytest.approx(0.4, abs=0.1)


def test_global_batches_are_the_same_for_any_number_of_workers(tiny_bundle: Bundle, tiny_corpus: Corpus) -> None:
    train, validation = parts(labelled(tiny_corpus))
    config = dataclasses.replace(CONFIG, lanes=4, epochs=2)
    heads: Any = list(model_of(tiny_bundle).heads)
    plan = FitPlan(config, heads, train, validation, tiny_bundle.vocabulary, reader(tiny_corpus))
    source = ExampleCells(train, tiny_bundle.vocabulary, reader(tiny_corpus))

    def steps(workers: int) -> list[tuple[float, list[list[int]], list[int]]]:
        ranks = [list(plan.batches(source, rank=rank, workers=workers, first=0)) for rank in range(workers)]
        found = []
        for batches in zip(*ranks, strict=True):
            lanes: list[Any] = [None] * 4
            for rank, batch in enumerate(batches):
                lanes[rank::workers] = batch.micro_batches
            assert len({batch.divisor for batch in batches}) == 1
            found.append(
                (batches[0].divisor, [lane.rows.tolist() for lane in lanes], [lane.dropout_seed for lane in lanes])
            )
        return found

    one = steps(1)
    assert one == steps(2) == steps(4)
    with_labels = np.flatnonzero(train.targets[0] != NO_LABEL).tolist()
    for epoch in (one[: len(one) // 2], one[len(one) // 2 :]):
        assert sorted(row for _, lanes, _ in epoch for lane in lanes for row in lane) == with_labels
