"""The ready tasks: each reads its own lists out of one file, and says what is asked and what was found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from genescale.platform.errors import SettingsError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary
from genescale.training.fitting.config import FinetuneConfig
from genescale.training.labels.gene_labels import read_gene_lists
from genescale.training.tasks.tasks import ReadyTask, list_tasks, load_task, task_names

GENE_TASKS = {
    "dosage-sensitivity": (368, 122),
    "bivalent-vs-lys4": (77, 95),
    "bivalent-vs-unmethylated": (38, 94),
    "bivalent-genome-wide": (7_213, 2_602),
    "tf-range": (130, 46),
    "notch1-centrality": (195, 100),
    "notch1-targets": (570, 570),
}
CELL_TASKS = ("cell-type", "disease-state")
PLANTED = "regulators-vs-effectors"


def test_the_published_questions_are_there() -> None:
    assert task_names() == sorted([*GENE_TASKS, *CELL_TASKS, PLANTED])
    for task in list_tasks():
        assert all(len(text) > 20 for text in (task.question, task.lists, task.published, task.cells))
        assert task.question.endswith("?")
        assert task.name in task.text()


@pytest.mark.parametrize("task", list_tasks(), ids=task_names())
def test_each_task_is_a_whole_config(task: ReadyTask) -> None:
    genes = "lists.json" if task.genes else ""
    config, published = task.config(genes=genes), task.config(genes=genes, as_published=True)
    assert isinstance(config, FinetuneConfig)
    assert config.unit == ("genes" if task.genes else "cells")
    assert config.encoder == "frozen"
    assert (published.encoder == "trained") == (task.name != PLANTED)
    if config.unit == "genes":
        assert (config.split, config.folds) == ("random", 5)
    else:
        assert (config.split, config.group) == ("grouped", "donor_id")


def test_changes_win_and_are_checked() -> None:
    task = load_task("dosage-sensitivity")
    config = task.config(genes="g.json", as_published=True, changes={"folds": "3", "frozen_layers": 1})
    assert (config.folds, config.frozen_layers, config.epochs) == (3, 1, 1)
    with pytest.raises(SettingsError, match=r"fold.*Did you mean 'folds'"):
        task.config(genes="g.json", changes={"fold": 3})


@pytest.mark.parametrize(
    ("name", "given", "address"),
    [
        ("tf-range", "/d/all.json", "/d/all.json#tf_regulatory_range:short_range,long_range"),
        ("tf-range", "s3://b/all.json#own:x,y", "s3://b/all.json#own:x,y"),
        ("tf-range", "/d/mine.csv", "/d/mine.csv"),
        ("bivalent-vs-lys4", "/d/folder", "/d/folder#;without=ENSG00000285708"),
        (PLANTED, "truth.json", "truth.json#regulators_vs_effectors:effector,regulator"),
    ],
)
def test_a_file_is_read_as_the_task_says(name: str, given: str, address: str) -> None:
    assert load_task(name).config(genes=given).genes == address


def test_what_is_missing_or_too_much_is_said() -> None:
    with pytest.raises(SettingsError, match=r"no task 'dosage-sensitvity'.*'dosage-sensitivity'"):
        load_task("dosage-sensitvity")
    with pytest.raises(SettingsError, match=r"needs gene lists.*--genes FILE"):
        load_task("dosage-sensitivity").config()
    with pytest.raises(SettingsError, match="stand in the corpus"):
        load_task("cell-type").config(genes="lists.json")


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "ageing.toml"
    text = 'title = "t"\nquestion = "q?"\nlists = "l"\npublished = "p"\ncells = "c"\n[finetune]\nlabel = "age"\n'
    path.write_text(text + 'kind = "number"\n')
    task = load_task(str(path))
    assert (task.name, task.config().kind) == ("ageing", "number")
    path.write_text(text + "kinds = 1\n")
    with pytest.raises(SettingsError, match="task ageing: unknown key 'kinds'"):
        load_task(str(path))
    path.write_text(text.replace("published", "publshed"))
    with pytest.raises(SettingsError, match=r"ageing.toml: unknown key 'publshed'"):
        load_task(str(path))


def test_the_planted_task_reads_what_simulate_writes(tmp_path: Path) -> None:
    import numpy as np

    from genescale.ingestion.simulate_network import SimulateConfig, plant_network, truth_of

    network = plant_network(SimulateConfig(regulators=4, pairs=1))
    (tmp_path / "truth.json").write_text(json.dumps(truth_of(network)))
    vocabulary = Vocabulary.build(network.gene_ids, np.ones(network.n_genes), window=512)
    address = load_task(PLANTED).config(genes=f"{tmp_path}/truth.json").genes
    labels = read_gene_lists(address, Store(StorageSettings()), vocabulary)
    assert labels.classes == ("effector", "regulator")
    assert labels.counts["regulator"] == 4


@pytest.mark.shared
def test_one_published_file_serves_every_gene_task(shared_data: Path) -> None:
    """With the larger published vocabulary: numbers of genes of each class, and nothing lost without a reason."""
    store = Store(StorageSettings())
    vocabulary = read_vocabulary(str(shared_data / "vocabularies/geneformer_gc30M_genes.tsv"), store)
    path = shared_data / "genesets/geneformer_gene_classes.json"
    for name, (negative, positive) in GENE_TASKS.items():
        labels = read_gene_lists(load_task(name).config(genes=str(path)).genes, store, vocabulary)
        lost = sum(len(names) for names in labels.left_out.values() if names)
        assert sum(labels.counts.values()) <= negative + positive
        assert sum(labels.counts.values()) + lost + len(labels.merged) >= negative + positive
        first, second = labels.counts.values()
        assert first > 0.85 * negative, name
        assert second > 0.85 * positive, name


def test_a_task_does_not_change_by_being_used() -> None:
    task = load_task("cell-type")
    before = dataclasses.asdict(task)
    task.config(changes={"label": "other"})
    assert dataclasses.asdict(task) == before
