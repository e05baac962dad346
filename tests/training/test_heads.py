"""Heads: what they compute, and their way through a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle, open_bundle, write_bundle
from genescale.platform.errors import InputError, IntegrityError, SettingsError
from genescale.training.embedder import Embedder
from genescale.training.heads.head import Head, LinearHead, NearestHead
from genescale.training.heads.head_files import head_files, heads_of
from genescale.training.heads.predict import load_heads
from genescale.training.heads.spec import HeadSpec, bundle_kind

CLASSES = ("b_cell", "monocyte", "t_cell")
KINDS_OF_HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "deep": {"hidden": 8, "depth": 3, "activation": "tanh"},
    "number": {"kind": "number", "classes": (), "hidden": 8},
    "nearest": {"type": "nearest", "neighbours": 4},
    "nearest number": {"type": "nearest", "kind": "number", "classes": ()},
}


def spec_of(**changes: object) -> HeadSpec:
    values = {"classes": CLASSES, "label": "cell_type", "width": 32, "layer": "last", "pooling": "cls"}
    return HeadSpec(**{**values, **changes})  # type: ignore[arg-type]


def fitted_head(spec: HeadSpec, rows_rd: np.ndarray) -> Head:
    """A head as a fit leaves it, with weights drawn from seed 0."""
    numbers_r = np.linspace(10, 80, len(rows_rd))
    if spec.type == "nearest":
        nearest = NearestHead(spec)
        nearest.remember(rows_rd, numbers_r if spec.kind == "number" else np.arange(len(rows_rd)) % 3)
        return nearest.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = LinearHead(spec)
    linear.standardise(rows_rd)
    if spec.kind == "number":
        linear.standardise_target(numbers_r)
    return linear.eval()


def write_heads(folder: Path, bundle: Bundle, *heads: Head, **extra: Any) -> Bundle:
    return write_bundle(
        folder,
        kind=bundle_kind([head.spec for head in heads]),
        config=bundle.config,
        weights=bundle.weights(),
        vocabulary=bundle.vocabulary,
        lineage={},
        extra={**head_files(heads), **extra},
    )


@pytest.fixture(scope="module")
def vectors_nd(tiny_bundle: Bundle, tiny_cells: list[np.ndarray]) -> np.ndarray:
    """What the heads here read of the twelve cells."""
    return Embedder.load(tiny_bundle, device="cpu").embed_cells(tiny_cells, layer="last", pooling="cls")


def test_input_is_standardised() -> None:
    """Coordinates of any size and offset count alike: the answer does not change with the units of the input."""
    generator = np.random.default_rng(0)
    cells_nd = generator.normal(size=(50, 32)).astype(np.float32)
    scale_d, shift_d = np.logspace(-2, 2, 32), np.linspace(-5, 5, 32)
    stretched_nd = (cells_nd * scale_d + shift_d).astype(np.float32)
    plain, stretched = (LinearHead(spec_of(dropout=0.3)) for _ in range(2))
    stretched.load_state_dict(plain.state_dict())
    plain.standardise(cells_nd)
    stretched.standardise(stretched_nd)
    assert np.allclose(plain.answer(cells_nd), stretched.answer(stretched_nd), atol=1e-4)


def test_a_constant_coordinate_does_no_harm() -> None:
    cells_nd = np.ones((10, 32), dtype=np.float32)
    linear = LinearHead(spec_of())
    linear.standardise(cells_nd)
    assert np.isfinite(linear.answer(cells_nd)).all()
    nearest = NearestHead(spec_of(type="nearest"))
    nearest.remember(cells_nd, np.arange(10) % 3)
    assert np.isfinite(nearest.answer(cells_nd)).all()


def test_nearest_votes_weigh_by_cosine_distance() -> None:
    """Cosine distances of 0.2, 0.4 and 0.4 give votes of 5, 2.5 and 2.5, whatever the lengths of the vectors."""
    head = NearestHead(spec_of(width=2, type="nearest", neighbours=3))
    square = np.array([[1, 0], [0, 1], [0, 3], [-1, 0], [0, -1], [0, -3]], dtype=np.float32)
    head.remember(square, np.array([0, 1, 1, 2, 2, 2]))
    head.scale_d.fill_(1)  # the mean is zero
    head.reference_kd = torch.nn.functional.normalize(torch.from_numpy(square), dim=1)
    assert head.answer(np.array([[0.8, 0.6]], dtype=np.float32))[0] == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)
    assert head.answer(np.array([[7.0, 0.0]], dtype=np.float32))[0, 0] > 0.99


def test_more_neighbours_than_examples_are_all_examples() -> None:
    head = NearestHead(spec_of(width=2, type="nearest", neighbours=50, kind="number", classes=()))
    head.remember(np.array([[1, 0], [0, 1], [-1, -1]], dtype=np.float32), np.array([1.0, 2.0, 9.0]))
    assert 1 < head.answer(np.array([[1, 1]], dtype=np.float32))[0, 0] < 9


@pytest.mark.parametrize("name", KINDS_OF_HEADS)
def test_a_head_survives_its_bundle(
    tmp_path: Path, tiny_bundle: Bundle, tiny_cells: list[np.ndarray], vectors_nd: np.ndarray, name: str
) -> None:
    head = fitted_head(spec_of(**KINDS_OF_HEADS[name]), vectors_nd)
    write_heads(tmp_path / "bundle", tiny_bundle, head)
    model = load_heads(open_bundle(tmp_path / "bundle"), device="cpu")
    (answer,) = model.predict_cells(tiny_cells)
    assert np.array_equal(answer.answers_nc, head.answer(vectors_nd))
    assert model.heads[0].spec == head.spec
    if head.spec.classes:
        assert answer.classes == CLASSES
        assert np.allclose(answer.probabilities_nc.sum(axis=1), 1, atol=1e-6)
        assert answer.labels == tuple(CLASSES[code] for code in answer.probabilities_nc.argmax(axis=1))
        with pytest.raises(InputError, match="has classes"):
            _ = answer.numbers_n
    else:
        assert np.ptp(answer.numbers_n) > 0
        with pytest.raises(InputError, match="is a number"):
            _ = answer.labels


def test_several_heads_answer_together(
    tmp_path: Path, tiny_bundle: Bundle, tiny_cells: list[np.ndarray], vectors_nd: np.ndarray
) -> None:
    heads = [fitted_head(spec_of(**KINDS_OF_HEADS[name]), vectors_nd) for name in ("linear", "number")]
    written = write_heads(tmp_path / "bundle", tiny_bundle, *heads)
    assert written.kind == "multi_task"
    answers = load_heads(written, device="cpu").predict_cells(tiny_cells)
    for answer, head in zip(answers, heads, strict=True):
        assert np.array_equal(answer.answers_nc, head.answer(vectors_nd))


def test_genes_are_answered_by_the_mean_over_their_cells(
    tmp_path: Path, tiny_bundle: Bundle, tiny_cells: list[np.ndarray]
) -> None:
    vectors = Embedder.load(tiny_bundle, device="cpu").embed_genes(tiny_cells, layer="last")
    head = fitted_head(spec_of(kind="gene_classes"), np.concatenate(vectors))
    model = load_heads(write_heads(tmp_path / "bundle", tiny_bundle, head), device="cpu")
    answers = model.predict_genes(iter(tiny_cells))
    assert answers.cells_g.max() > 1
    for place in (0, int(answers.cells_g.argmax()), -1):
        token = answers.tokens_g[place]
        rows = [v[cell.tolist().index(token)] for v, cell in zip(vectors, tiny_cells, strict=True) if token in cell]
        expected = head.answer(np.stack(rows)).astype(np.float64)
        assert answers.cells_g[place] == len(rows)
        assert answers.probabilities_gc[place] == pytest.approx(expected.mean(axis=0), abs=1e-6)
        assert answers.spread_gc[place] == pytest.approx(expected.std(axis=0), abs=1e-5)
        assert answers.ids_g[place] == tiny_bundle.vocabulary.gene_of_token(int(token))
    some = model.predict_genes(tiny_cells, answers.tokens_g[3:5])
    assert some.tokens_g.tolist() == answers.tokens_g[3:5].tolist()
    with pytest.raises(InputError, match="answers for genes"):
        model.predict_cells(tiny_cells)
    with pytest.raises(InputError, match="none of the genes"):
        model.predict_genes(tiny_cells, [])


def test_heads_of_the_first_schema_are_read(tmp_path: Path, tiny_bundle: Bundle, vectors_nd: np.ndarray) -> None:
    """A bundle as the release before wrote it: one head, tensors `widen` and `output` without a number."""
    head = fitted_head(spec_of(hidden=8), vectors_nd)
    spec = {"classes": list(CLASSES), "label": "cell_type", "width": 32, "layer": "last", "pooling": "cls"}
    spec |= {"hidden": 8, "dropout": 0.1, "activation": "relu"}
    tensors = {name.replace("hidden.0", "widen"): value.numpy() for name, value in head.state_dict().items()}
    written = write_bundle(
        tmp_path / "bundle",
        kind="cell_classifier",
        config=tiny_bundle.config,
        weights=tiny_bundle.weights(),
        vocabulary=tiny_bundle.vocabulary,
        lineage={},
        extra={"head.json": json.dumps({"schema_version": 1, **spec}).encode(), "head.safetensors": tensors},
    )
    assert np.array_equal(heads_of(written)[0].answer(vectors_nd), head.answer(vectors_nd))


def test_a_masked_gene_model_is_no_classifier(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"masked_gene_model.*genescale finetune"):
        load_heads(tiny_bundle)


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    head = LinearHead(spec_of())
    other = json.loads(head_files([head])["head.json"])  # type: ignore[arg-type]
    other["heads"][0]["classes"] = [*CLASSES, "platelet"]
    written = write_heads(tmp_path / "b", tiny_bundle, head, **{"head.json": json.dumps(other).encode()})
    with pytest.raises(IntegrityError, match=r"head\.safetensors"):
        heads_of(written)
    other["heads"][0] |= {"kind": "number", "classes": []}
    written = write_heads(tmp_path / "c", tiny_bundle, head, **{"head.json": json.dumps(other).encode()})
    with pytest.raises(IntegrityError, match="does not hold such heads"):
        heads_of(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("only",)},
        {"classes": ("a", "a")},
        {"width": 0},
        {"dropout": 1.0},
        {"hidden": -1},
        {"depth": 0},
        {"neighbours": 0},
        {"kind": "number"},
    ],
)
def test_heads_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        spec_of(**changes)
