"""The encoders and cells that `two_pass.py` screens: simulated ones, trained here, and real ones, given."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from truth_cells import kept, planted_cells
from truth_settings import CONFOUNDED, DOUBTING, MODERN, SMALL_ENCODER, Setting

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder, Layer
from genescale.training.model import MaskedGeneModel, new_model
from genescale.training.weights import to_hf

# Forty regulators among two thousand genes that are on at random: cells of about five hundred genes.
PLANTED = {
    **CONFOUNDED, "regulators": 40, "direct_targets": 8, "mediators": 1, "indirect_targets": 4, "pairs": 4,
    "markers": 40, "housekeeping": 30, "background": 2_000,
}  # fmt: skip
SIMULATED = Setting(
    name="two-pass", simulation=PLANTED, cells=6_000, drawn_cells=80, screened_cells=80, window=1_024, steps=1_500,
    recipe=(*SMALL_ENCODER, *DOUBTING, "encoder.layers=3", "token_budget=2048"),
)  # fmt: skip
QUICK = dataclasses.replace(
    SIMULATED, name="quick", simulation={**PLANTED, "background": 200}, cells=300, drawn_cells=8, screened_cells=8,
    steps=12, recipe=(*SMALL_ENCODER, *DOUBTING, *MODERN, "token_budget=1024"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """One encoder, the layer that is read, and the cells whose genes are all deleted."""

    name: str
    about: str
    embedder: Embedder
    layer: Layer
    cells: list[np.ndarray]


def simulated(setting: Setting, work: Path, *, n_cells: int) -> Iterator[Bench]:
    """A published architecture of three layers, trained on simulated cells; kept below `work`. Both layers are read."""
    planted = planted_cells(setting)
    trained = kept(planted, setting, work / f"{setting.name}.npz")
    bundle = bundle_of(trained.model, planted.trained.vocabulary, work / f"{setting.name}-bundle")
    about = f"held-out loss {trained.loss_before:.2f} before training, {trained.loss:.2f} after"
    return _benches(f"simulated {setting.name}", about, bundle, planted.screened[:n_cells])


def given(name: str, model: Path, corpus: str, *, n_cells: int) -> Iterator[Bench]:
    """A trained bundle and cells of a corpus, drawn at random. Both layers are read."""
    opened = Corpus.open(corpus, Store(StorageSettings()))
    # The first of one shuffle: more cells are the same ones and others.
    drawn = np.random.default_rng(0).permutation(opened.n_cells)[:n_cells]
    bundle = open_bundle(model)
    return _benches(name, f"{n_cells} of {opened.n_cells:,} cells", bundle, opened.tokens(drawn.tolist()))


def untrained(setting: Setting) -> Iterator[Bench]:
    """For `--quick`: random weights, large enough that genes matter to each other."""
    planted = planted_cells(setting)
    shape = dataclasses.replace(
        setting.pretrain().encoder.for_vocabulary(planted.trained.vocabulary), initializer_range=0.3
    )
    bundle = bundle_of(new_model(shape, seed=0), planted.trained.vocabulary, Path(tempfile.mkdtemp()) / "bundle")
    return _benches("random weights", "not trained", bundle, planted.screened[:3])


def bundle_of(model: MaskedGeneModel, vocabulary: Vocabulary, folder: Path) -> Bundle:
    """The model as a bundle."""
    return write_bundle(
        folder, kind="masked_gene_model", config=model.config.to_hf(), weights=to_hf(model), vocabulary=vocabulary,
        lineage={"made": "benchmarks/two_pass.py"},
    )  # fmt: skip


def _benches(name: str, about: str, bundle: Bundle, cells: list[np.ndarray]) -> Iterator[Bench]:
    embedder = Embedder.load(bundle, device="cpu")
    config = embedder.encoder.config
    genes = int(np.median([len(cell) for cell in cells]))
    print(f"… {name}: {about}; {len(cells)} cells of {genes} tokens", file=sys.stderr, flush=True)
    for layer, layers in (("second_to_last", config.layers - 1), ("last", config.layers)):
        text = (
            f"{about}; {layers} of {config.layers} layers, width {config.width}; {len(cells)} cells of {genes} tokens"
        )
        yield Bench(name=f"{name}, {layer}", about=text, embedder=embedder, layer=layer, cells=cells)
