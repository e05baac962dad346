"""The head: what it computes, and its way through a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.training.embedder import Embedder
from genescale.training.heads.cell_classes import CellClassHead, HeadSpec, head_of, load_classifier

CLASSES = ("b_cell", "monocyte", "t_cell")


def spec_of(**changes: object) -> HeadSpec:
    values = {"classes": CLASSES, "label": "cell_type", "width": 32, "layer": "last", "pooling": "cls"}
    return HeadSpec(**{**values, **changes})  # type: ignore[arg-type]


def write_classifier(folder: Path, bundle: Bundle, head: CellClassHead, **extra: object) -> Bundle:
    files = {**head.to_files(), **extra}
    return write_bundle(
        folder,
        kind="cell_classifier",
        config=bundle.config,
        weights=bundle.weights(),
        vocabulary=bundle.vocabulary,
        lineage={},
        extra=files,  # type: ignore[arg-type]
    )


def test_input_is_standardised() -> None:
    """Coordinates of any size and offset count alike: the answer does not change with the units of the input."""
    generator = np.random.default_rng(0)
    cells_nd = generator.normal(size=(50, 32)).astype(np.float32)
    scale_d, shift_d = np.logspace(-2, 2, 32), np.linspace(-5, 5, 32)
    stretched_nd = (cells_nd * scale_d + shift_d).astype(np.float32)
    plain, stretched = (CellClassHead(spec_of()) for _ in range(2))
    stretched.load_state_dict(plain.state_dict())
    plain.standardise(cells_nd)
    stretched.standardise(stretched_nd)
    assert np.allclose(plain.probabilities(cells_nd), stretched.probabilities(stretched_nd), atol=1e-4)


def test_a_constant_coordinate_does_no_harm() -> None:
    head = CellClassHead(spec_of())
    cells_nd = np.ones((10, 32), dtype=np.float32)
    head.standardise(cells_nd)
    assert np.isfinite(head.probabilities(cells_nd)).all()


@pytest.mark.parametrize("hidden", [0, 8])
def test_classifier_survives_its_bundle(
    tmp_path: Path, tiny_bundle: Bundle, tiny_cells: list[np.ndarray], hidden: int
) -> None:
    torch.manual_seed(0)
    head = CellClassHead(spec_of(hidden=hidden, dropout=0.3))
    vectors_nd = Embedder.load(tiny_bundle, device="cpu").embed_cells(tiny_cells, layer="last", pooling="cls")
    head.standardise(vectors_nd)
    write_classifier(tmp_path / "bundle", tiny_bundle, head)
    classifier = load_classifier(open_bundle(tmp_path / "bundle"), device="cpu")
    answer = classifier.predict(tiny_cells)
    assert answer.classes == classifier.classes == CLASSES
    assert np.array_equal(answer.probabilities_nc, head.probabilities(vectors_nd))
    assert np.allclose(answer.probabilities_nc.sum(axis=1), 1, atol=1e-6)
    assert answer.labels == tuple(CLASSES[code] for code in answer.probabilities_nc.argmax(axis=1))
    assert classifier.head.spec == head.spec


def test_a_masked_gene_model_is_no_classifier(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"masked_gene_model.*genescale finetune"):
        load_classifier(tiny_bundle)


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    head = CellClassHead(spec_of())
    other = json.loads(head.to_files()["head.json"])  # type: ignore[arg-type]
    other["classes"] = [*CLASSES, "platelet"]
    written = write_classifier(tmp_path / "b", tiny_bundle, head, **{"head.json": json.dumps(other).encode()})
    with pytest.raises(IntegrityError, match=r"head\.safetensors"):
        head_of(written)


@pytest.mark.parametrize(
    "changes", [{"classes": ("only",)}, {"classes": ("a", "a")}, {"width": 0}, {"dropout": 1.0}, {"hidden": -1}]
)
def test_heads_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        spec_of(**changes)
