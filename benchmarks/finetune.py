"""How fast heads are fitted, against `transformers`' BertForSequenceClassification under the published way.

    make bench NAME=finetune                          all parts, about ten minutes on two cores
    make bench NAME=finetune ARGS=--quick             about a minute on two quiet cores
    make bench NAME=finetune ARGS="--only sweep"      one part; --device cuda for a GPU

finetune   an encoder of the published 6-layer size is trained with a head from the same weights, on the same cells of
           mixed lengths, with the same batch, frozen layers and dropout, in turn; in cells per second. Ours is
           `fit_encoder` as `genescale finetune` calls it, with all it does besides (loading, validation); the baseline
           is `published_classifier.py` without them. Padding is what random batches of real cells need.
sweep      fifty heads on a frozen encoder: ours embeds once and fits on the vectors, embedding included; the baseline
           runs the encoder in each epoch of each fit. It is measured on some batches and scaled linearly to all fits.
quality    both sides learn the same labels of held-out cells equally well.

Needs no Ray.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from harness import Row, finish, in_turn, measured, parser, spending, times_faster
from published_classifier import PublishedClassifier
from published_trainer import length_grouped, shuffled
from ranked_cells import FILES, ROOT, CellPool, cell_pool, reduced

from genescale.platform.bundle import Bundle, write_bundle
from genescale.training.embedder import Embedder
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.fitting.encoder_fitting import fit_encoder
from genescale.training.fitting.examples import Examples, cell_examples
from genescale.training.fitting.vector_fitting import fit_vectors
from genescale.training.heads.spec import HeadSpec
from genescale.training.model import EncoderConfig, new_model
from genescale.training.recipe import EncoderShape, read_recipe
from genescale.training.weights import encoder_from_hf, to_hf

PACKAGES = ("numpy", "torch", "transformers")
PARTS = ("finetune", "sweep", "quality")
# Twelve is the published batch; padded to 2,048 tokens it needs more memory than small machines have.
BATCH_CELLS = {"cpu": 4, "cuda": 12}
FROZEN_LAYERS, CLASSES = 2, 3
HEADS, EPOCHS = 50, 10
BARS = {"finetune": 2.5, "sweep": 50.0}


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    pool: CellPool
    codes: np.ndarray
    """Class of each cell: the data set that it is of."""
    device: str
    quick: bool
    folder: Path

    @property
    def batch_cells(self) -> int:
        return BATCH_CELLS[self.device]


@dataclass(frozen=True, eq=False)
class Side:
    """Encoder weights as a bundle, and the cells that are fitted."""

    bundle: Bundle
    shape: EncoderConfig
    cells: list[np.ndarray]
    codes: np.ndarray

    @classmethod
    def of(cls, pool: CellPool, shape: EncoderShape, chosen: Sequence[int], codes: np.ndarray, folder: Path) -> Side:
        encoder = shape.for_vocabulary(pool.vocabulary)
        bundle = write_bundle(
            folder, kind="masked_gene_model", config=encoder.to_hf(), weights=to_hf(new_model(encoder, seed=0)),
            vocabulary=pool.vocabulary, lineage={},
        )  # fmt: skip
        return cls(bundle, encoder, [pool.cells[number] for number in chosen], codes[list(chosen)])

    @property
    def weights(self) -> dict[str, np.ndarray]:
        return self.bundle.weights()

    def spec(self, **settings: object) -> HeadSpec:
        """A head of the published layout: the first token through a tanh layer."""
        width = self.shape.width
        values = {"hidden": width, "depth": 1, "activation": "tanh", "dropout": self.shape.hidden_dropout, **settings}
        return HeadSpec(
            label="origin", width=width, layer="last", pooling="first_token", classes=("a", "b", "c"), **values
        )  # type: ignore[arg-type]

    def examples(self, numbers: np.ndarray) -> Examples:
        lengths = np.array([len(self.cells[number]) for number in numbers])
        return cell_examples(numbers, lengths, (self.codes[numbers],))

    def cells_of(self, index_n: np.ndarray) -> list[np.ndarray]:
        return [self.cells[number] for number in index_n]


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run only these parts")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = made.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parts: dict[str, Callable[[Bench], Iterator[Row]]] = {"finetune": finetune, "sweep": sweep, "quality": quality}
    with tempfile.TemporaryDirectory(prefix="genescale-") as scratch:
        pool = cell_pool()
        bench = Bench(pool, origins(pool), device, arguments.quick, Path(scratch))
        rows = [measured("Mean length of the cells", float(pool.lengths.mean()), "tokens", note=pool.origin)]
        for name in arguments.only or PARTS:
            print(f"… {name}", file=sys.stderr, flush=True)
            rows += parts[name](bench)
    name = "finetune" if not arguments.only else f"finetune-{'-'.join(arguments.only)}"
    return finish(name, rows, PACKAGES, quick=arguments.quick, output=arguments.output)


def origins(pool: CellPool) -> np.ndarray:
    """The data set of each cell; where cells are drawn, thirds by their first gene, which says nothing else."""
    folder = Path(os.environ.get("GENESCALE_SHARED", ROOT.parent / "shared" / "data")) / "golden"
    paths = [folder / f"{name}.parquet" for name in FILES]
    if not all(path.is_file() for path in paths):
        return np.array([int(cell[0]) % CLASSES for cell in pool.cells])
    import pyarrow.parquet as pq

    return np.repeat(np.arange(len(paths)), [pq.read_metadata(path).num_rows for path in paths])


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(bench: Bench) -> Iterator[Row]:
    """Training the encoder with a head: random batches, then batches of like lengths, which pad less."""
    lengths = bench.pool.lengths
    count = 2 if bench.quick else 6
    batches = shuffled(len(lengths), bench.batch_cells, seed=0)[:count]
    yield from race(bench, "random batches", batches, FROZEN_LAYERS, bar=BARS["finetune"])
    if bench.quick:
        return
    yield from race(bench, "random batches, no frozen layer", batches, 0)
    grouped = length_grouped(lengths.tolist(), bench.batch_cells, seed=0)
    grouped.sort(key=lambda batch: int(lengths[batch].max()))
    spread = [grouped[int((number + 0.5) / count * len(grouped))] for number in range(count)]
    yield from race(bench, "length-grouped batches", spread, FROZEN_LAYERS)


def race(
    bench: Bench, what: str, batches: list[list[int]], frozen_layers: int, *, bar: float | None = None
) -> Iterator[Row]:
    """Both sides train these cells in turn, once each epoch."""
    chosen = [number for batch in batches for number in batch]
    shape = read_recipe("geneformer-v1-10m").encoder
    side = Side.of(bench.pool, shape, chosen, bench.codes, bench.folder / what)
    own = [list(range(at, at + bench.batch_cells)) for at in range(0, len(chosen), bench.batch_cells)]
    theirs = PublishedClassifier(
        side.shape, side.weights, classes=CLASSES, frozen_layers=frozen_layers, learning_rate=5e-5,
        total_steps=10_000, device=bench.device,
    )  # fmt: skip
    config = FinetuneConfig(
        label="origin", encoder="trained", frozen_layers=frozen_layers, layer="last", pooling="first_token",
        hidden=side.shape.width, activation="tanh", epochs=1, patience=0, learning_rate=5e-5,
        encoder_learning_rate=5e-5, cells_per_batch=bench.batch_cells, lanes=1, device=bench.device, split="random",
    )  # fmt: skip
    everything = side.examples(np.arange(len(chosen)))
    # One short cell: the loop judges every epoch, and a race is about training.
    shortest = side.examples(np.array([int(np.argmin([len(cell) for cell in side.cells]))]))

    def train_ours() -> None:
        fit_encoder(side.bundle, side.cells_of, everything, shortest, [side.spec()], config)

    theirs.train(side.cells, side.codes, [min(own, key=lambda batch: max(len(side.cells[n]) for n in batch))])
    fit_encoder(side.bundle, side.cells_of, shortest, shortest, [side.spec()], config)
    repeats = 1 if bench.quick else 3
    spent = in_turn({"ours": train_ours, "theirs": lambda: theirs.train(side.cells, side.codes, own)}, repeats=repeats)
    fast, slow = (len(chosen) / spent[name].wall_s for name in ("ours", "theirs"))
    by_cpu = spent["theirs"].cpu_s / spent["ours"].cpu_s
    padded = sum(len(batch) * max(len(side.cells[n]) for n in batch) for batch in own)
    real = sum(map(len, side.cells))
    note = (
        f"{len(chosen)} cells of {min(map(len, side.cells))} to {max(map(len, side.cells))} tokens, batches of "
        f"{bench.batch_cells}, {frozen_layers} layers{' and the embeddings' if frozen_layers else ''} frozen on both "
        f"sides; ours with loading and validation; ratio by processor time {by_cpu:.2f}"
    )
    claim = f"Cells per second of fine-tuning, {what}"
    if bar is not None and bench.device == "cpu":
        yield times_faster(claim, fast, slow, "cells/s", bar, note=note)
    else:
        yield Row(claim=claim, value=fast, unit="cells/s", baseline=slow, ratio=fast / slow, note=note)
    yield measured(f"  pad efficiency of the baseline, {what}", real / padded, "real/padded", note="ours: 1")


# --- a sweep of heads ------------------------------------------------------------------------------------------------


def sweep(bench: Bench) -> Iterator[Row]:
    """Fifty heads of different settings on a frozen encoder."""
    n_cells, n_batches = (32, 1) if bench.quick else (320, 4)
    order = np.random.default_rng(1).permutation(len(bench.pool.cells))[:n_cells].tolist()
    shape = read_recipe("geneformer-v1-10m").encoder
    side = Side.of(bench.pool, shape, order, bench.codes, bench.folder / "sweep")
    batches = shuffled(n_cells, bench.batch_cells, seed=0)[:n_batches]
    with spending() as embedding:
        embedder = Embedder.load(side.bundle, device=bench.device)
        vectors_rd = embedder.embed_cells(side.cells, layer="last", pooling="first_token")
    with spending() as fitting:
        for config in settings(HEADS):
            fit_head(side, vectors_rd, config)
    theirs = PublishedClassifier(
        side.shape, side.weights, classes=CLASSES, frozen_layers=side.shape.layers, learning_rate=5e-5,
        total_steps=10_000, device=bench.device,
    )  # fmt: skip
    theirs.train(side.cells, side.codes, batches[:1])
    rounds = [_seconds(lambda: theirs.train(side.cells, side.codes, batches)) for _ in range(1 if bench.quick else 3)]
    per_cell = statistics.median(rounds) / (n_batches * bench.batch_cells)
    ours_s = embedding.wall_s + fitting.wall_s
    for epochs, bar in ((EPOCHS, BARS["sweep"]), (1, None)):
        theirs_s = per_cell * n_cells * epochs * HEADS
        # With one epoch ours still runs all ten: the cost of heads is what it is.
        note = (
            f"{n_cells} cells; ours {embedding.wall_s:.1f} s for the vectors and {fitting.wall_s:.1f} s for {HEADS} "
            f"fits of {EPOCHS} epochs; the baseline measured on {n_batches * bench.batch_cells} cells "
            f"({per_cell:.3f} s a cell) and scaled linearly to {HEADS} fits of {epochs} epochs ({theirs_s:,.0f} s)"
        )
        claim = f"Heads per hour on a frozen encoder, {epochs} epochs" if epochs > 1 else "  against fits of one epoch"
        fast, slow = 3600 * HEADS / ours_s, 3600 * HEADS / theirs_s
        if bar is not None:
            yield times_faster(claim, fast, slow, "heads/h", bar, note=note)
        else:
            yield Row(claim=claim, value=fast, unit="heads/h", baseline=slow, ratio=fast / slow, note=note)
    yield measured("Cells per second of head training on vectors", n_cells * EPOCHS * HEADS / fitting.wall_s, "cells/s")


def settings(count: int) -> Iterator[FinetuneConfig]:
    """Settings as a sweep draws them: rates over two decades, linear and hidden heads."""
    draws = np.random.default_rng(0)
    for seed in range(count):
        yield FinetuneConfig(
            label="origin", layer="last", pooling="first_token", epochs=EPOCHS, patience=0, split="random", seed=seed,
            learning_rate=float(10 ** draws.uniform(-4, -2)), hidden=int(draws.choice([0, 64, 256])),
        )  # fmt: skip


def fit_head(side: Side, vectors_rd: np.ndarray, config: FinetuneConfig) -> None:
    """One head on nine tenths of the vectors; the last tenth chooses the epoch."""
    numbers = np.arange(len(vectors_rd))
    train, validation = numbers[: -max(1, len(numbers) // 10)], numbers[-max(1, len(numbers) // 10) :]
    spec = side.spec(hidden=config.hidden, dropout=config.dropout)
    fit_vectors(
        [spec], vectors_rd[train], side.examples(train), vectors_rd[validation], side.examples(validation), config
    )


def _seconds(work: Callable[[], object]) -> float:
    with spending() as spent:
        work()
    return spent.wall_s


# --- quality ---------------------------------------------------------------------------------------------------------

SMALL = EncoderShape(width=64, layers=2, heads=2, feed_forward=128)


def quality(bench: Bench) -> Iterator[Row]:
    """Accuracy on held-out cells after the same epochs over the same cells, from the same encoder weights."""
    pool, codes = reduced_with_codes(bench)
    numbers = np.random.default_rng(2).permutation(len(pool.cells))
    n_train, n_test = (240, 200) if bench.quick else (800, 600)
    side = Side.of(pool, SMALL, numbers[: n_train + n_test].tolist(), codes, bench.folder / "quality")
    train, test = np.arange(n_train), np.arange(n_train, n_train + n_test)
    config = FinetuneConfig(
        label="origin", encoder="trained", layer="last", pooling="first_token", hidden=SMALL.width, activation="tanh",
        epochs=3, patience=0, learning_rate=1e-3, encoder_learning_rate=1e-3, cells_per_batch=8, lanes=1,
        warmup_fraction=0.0, dropout=side.shape.hidden_dropout, device="cpu", split="random",
    )  # fmt: skip
    ends: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(1 if bench.quick else 3):
        fitted, weights = fit_encoder(
            side.bundle, side.cells_of, side.examples(train), side.examples(train[:8]), [side.spec()],
            replace(config, seed=seed),
        )  # fmt: skip
        ends["ours"].append(_accuracy(side, _predicted(side, fitted.heads[0], weights, test), test))
        batches = [b for epoch in range(3) for b in shuffled(n_train, 8, seed=10 * seed + epoch)]
        theirs = PublishedClassifier(
            side.shape, side.weights, classes=CLASSES, frozen_layers=0, learning_rate=1e-3, total_steps=len(batches),
            seed=seed,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs.train(side.cells, side.codes, batches)
        ends["theirs"].append(_accuracy(side, theirs.predict([side.cells[n] for n in test], 16), test))
    ours, baseline = (statistics.mean(values) for values in ends.values())
    largest = float(np.bincount(side.codes[test]).max() / len(test))
    allowed = max(0.02, 3 * (baseline * (1 - baseline) / n_test) ** 0.5)
    note = f"{n_train} cells three times, {len(ends['ours'])} seeds, {n_test} held-out cells; one class {largest:.3f}"
    yield Row(
        claim="Held-out accuracy after the same epochs", value=ours, unit="of cells", baseline=baseline,
        ratio=ours / baseline, bar=f"≥ baseline - {allowed:.3f}", holds=ours >= baseline - allowed, note=note,
    )  # fmt: skip


def reduced_with_codes(bench: Bench) -> tuple[CellPool, np.ndarray]:
    """Small cells with their classes: cells that lose too many genes are left out of both."""
    by_class = [
        replace(bench.pool, cells=[cell for cell, code in zip(bench.pool.cells, bench.codes, strict=True) if code == c])
        for c in range(CLASSES)
    ]
    whole = reduced(bench.pool, n_genes=1_022, window=128)
    kept = [int((_kept_lengths(bench.pool, part.cells) >= 8).sum()) for part in by_class]
    return whole, np.repeat(np.arange(CLASSES), kept)


def _kept_lengths(pool: CellPool, cells: Sequence[np.ndarray]) -> np.ndarray:
    counts = np.bincount(np.concatenate(pool.cells))
    common = np.zeros(len(counts), dtype=bool)
    common[np.argsort(-counts, kind="stable")[:1_022]] = True
    return np.array([int(common[cell].sum()) for cell in cells])


def _predicted(side: Side, head: object, weights: dict[str, np.ndarray], numbers: np.ndarray) -> np.ndarray:
    encoder = encoder_from_hf(weights, side.shape)
    embedder = Embedder(side.bundle, encoder, device=torch.device("cpu"), tokens_per_batch=8_192, precision="float32")
    vectors_rd = embedder.embed_cells([side.cells[n] for n in numbers], layer="last", pooling="first_token")
    return head.answer(vectors_rd).argmax(axis=1)  # type: ignore[attr-defined]


def _accuracy(side: Side, predicted: np.ndarray, numbers: np.ndarray) -> float:
    return float((predicted == side.codes[numbers]).mean())


if __name__ == "__main__":
    raise SystemExit(main())
