"""Which head of a model is read when edits change class probabilities, and that the change is after minus before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genescale.perturbation.perturb import EditRequest, Readouts, perturb_cell
from genescale.perturbation.readouts.class_change import model_of_classes
from genescale.platform.errors import InputError
from genescale.training.embedder import Embedder
from genescale.training.heads.head import Head, new_head
from genescale.training.heads.predict import HeadModel
from genescale.training.heads.spec import HeadSpec


def head(label: str, embedder: Embedder, **options: object) -> Head:
    wanted = {"layer": "last", "pooling": "mean_genes", "classes": ("ill", "well"), "dropout": 0.0, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return new_head(HeadSpec(label=label, width=embedder.width, **wanted))  # type: ignore[arg-type]


def test_the_only_head_of_cell_classes_is_taken(framed: Embedder) -> None:
    age = head("age", framed, kind="number", classes=())
    model = HeadModel(embedder=framed, heads=(age, head("disease", framed)))
    assert [spec.label for spec in model_of_classes(model).specs] == ["disease"]


def test_several_heads_are_told_apart_by_name(framed: Embedder) -> None:
    model = HeadModel(embedder=framed, heads=(head("disease", framed), head("cell_type", framed)))
    assert model_of_classes(model, "cell_type").heads == model.heads[1:]
    with pytest.raises(InputError, match=r"2 heads of cell classes.*disease, cell_type"):
        Readouts(head=model)
    with pytest.raises(InputError, match="Did you mean 'disease'"):
        model_of_classes(model, "diseases")


def test_a_model_without_cell_classes_is_refused(framed: Embedder) -> None:
    with pytest.raises(InputError, match=r"no head of cell classes \(number\)"):
        model_of_classes(HeadModel(embedder=framed, heads=(head("age", framed, kind="number", classes=()),)))


def test_a_change_is_the_probability_after_minus_before(framed: Embedder) -> None:
    model = HeadModel(embedder=framed, heads=(head("disease", framed), head("age", framed, kind="number", classes=())))
    cell = np.array([2, *np.random.default_rng(0).permutation(np.arange(4, 40)), 3])
    gene = int(cell[5])
    (answer,) = perturb_cell(framed, cell, [EditRequest(kind="delete", genes=(gene,))], readouts=Readouts(head=model))
    before, after = (model.predict_cells([tokens])[0].probabilities_nc[0] for tokens in (cell, cell[cell != gene]))
    np.testing.assert_allclose(answer.class_changes, after - before, atol=1e-6)
    assert np.abs(after - before).max() > 1e-3
