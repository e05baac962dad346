"""Gene lists in every form become distinct, labelled tokens, and labelled tokens are found in cells."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import CorpusError, InputError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary
from genescale.training.labels.gene_labels import GeneLabels, gene_labels, gene_rows, read_gene_lists
from genescale.training.labels.gene_lists import ListAddress
from genescale.training.labels.splitting import SplitRequest, Units, make_folds

STORE = Store(StorageSettings())
LISTS = {"low": ["A", "B"], "high": ["C", "D"]}
FORMS = {
    "lists.json": json.dumps(LISTS),
    "lists.gmt": "low\tabout\tA\tB\nhigh\t\tC\tD\n",
    "columns.csv": "low,high\nA,C\nB,D\n",
    "uneven.tsv": "low\thigh\nA\tC\nB\n\tD\n",
    "pairs.csv": "symbol,class\nA,low\nB,low\nC,high\nD,high\n",
    "pairs.tsv": "label\tgene_id\tnote\n"
    + "".join(f"{name}\tENSG{number:011d}\t\n" for number, name in ((1, "low"), (2, "low"), (3, "high"), (4, "high"))),
}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Genes A to F; OLD1 and ENSG00000000099 are retired names of A and B; TWIN is the symbol of two genes."""
    return Vocabulary.build(
        [f"ENSG{number:011d}" for number in range(1, 9)],
        np.ones(8),
        symbols=["A", "B", "C", "D", "E", "F", "TWIN", "TWIN"],
        window=16,
        name="eight",
        aliases={"OLD1": "ENSG00000000001", "ENSG00000000099": "ENSG00000000002"},
    )


def shown(labels: GeneLabels) -> dict[str, list[str]]:
    return {
        name: [s for s, c in zip(labels.symbols_g, labels.codes_g, strict=True) if c == code]
        for code, name in enumerate(labels.classes)
    }


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_table_reads_the_same(tmp_path: Path, vocabulary: Vocabulary, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name])
    labels = read_gene_lists(str(tmp_path / name), STORE, vocabulary)
    assert shown(labels) == LISTS
    assert labels.tokens_g.tolist() == [vocabulary.token(symbol) for symbol in "ABCD"]
    assert labels.ids_g == ("ENSG00000000001", "ENSG00000000002", "ENSG00000000003", "ENSG00000000004")
    assert (labels.left_out, labels.merged, labels.counts) == ({}, (), {"low": 2, "high": 2})


def test_text_files_are_a_class_each_in_a_folder_or_as_a_list(tmp_path: Path, vocabulary: Vocabulary) -> None:
    (tmp_path / "high.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfC\nD  # and why\n\n"))
    (tmp_path / "low.txt").write_text("A, B\n")
    assert shown(read_gene_lists(str(tmp_path), STORE, vocabulary)) == {"high": ["C", "D"], "low": ["A", "B"]}
    both = f"{tmp_path}/low.txt,{tmp_path}/high.txt.gz"
    assert shown(read_gene_lists(both, STORE, vocabulary)) == LISTS


def test_lists_are_read_from_object_storage(s3_store: tuple[Store, str], vocabulary: Vocabulary) -> None:
    store, bucket = s3_store
    store.write(f"{bucket}/lists/low.txt", b"A\nB\n")
    store.write(f"{bucket}/lists/high.txt", b"C\nD\n")
    assert shown(read_gene_lists(f"{bucket}/lists", store, vocabulary)) == {"high": ["C", "D"], "low": ["A", "B"]}


def test_sections_and_classes_are_chosen_by_the_address(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "many.json"
    path.write_text(
        json.dumps({"deep": {"er": LISTS}, "first": LISTS, "second": {"x": ["E"], "y": ["F", "A"], "z": ["A"]}})
    )
    assert shown(read_gene_lists(f"{path}#first", STORE, vocabulary)) == LISTS
    assert shown(read_gene_lists(f"{path}#deep/er", STORE, vocabulary)) == LISTS
    labels = read_gene_lists(f"{path}#second:y,x;without=ENSG00000000001", STORE, vocabulary)
    assert shown(labels) == {"y": ["F"], "x": ["E"]}
    assert labels.left_out == {"left out by the address": ("A",)}
    assert shown(read_gene_lists(f"{path}#second", STORE, vocabulary, classes=["z", "x"])) == {"z": ["A"], "x": ["E"]}
    for address, message in (
        (str(path), "stand in sections.*deep, first, second"),
        (f"{path}#frist", "no section 'frist'.*'first'"),
        (f"{path}#first:lo,high", "no class 'lo'"),
        (f"{path}#first;with=A", "no address"),
        ("#first", "no address"),
        (f"{tmp_path}/a.csv#first", "only JSON files have sections"),
    ):
        with pytest.raises(InputError, match=message):
            read_gene_lists(address, STORE, vocabulary)


@pytest.mark.parametrize("text", ["a.json#s:x,y;without=P,Q", "s3://b/a.csv#:x", "/d/a.txt,/d/b.txt", "folder"])
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(ListAddress.parse(text)) == text


def test_names_of_one_gene_are_one_gene(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """By id, versioned id, symbol, retired symbol and retired id; the rest is counted with the reason."""
    path = tmp_path / "lists.json"
    path.write_text(
        json.dumps({"low": ["ENSG00000000001.4", "a", "OLD1", "ensg00000000099", "B", "NONE"], "high": ["C", "twin"]})
    )
    labels = read_gene_lists(str(path), STORE, vocabulary)
    assert shown(labels) == {"low": ["A", "B"], "high": ["C"]}
    assert labels.merged == ("a", "OLD1", "B")
    assert labels.left_out == {"outside the vocabulary": ("NONE",), "a symbol of several genes": ("twin",)}


def test_a_gene_in_two_classes_under_two_names_is_named(tmp_path: Path, vocabulary: Vocabulary) -> None:
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"low": ["OLD1", "B"], "high": ["ENSG00000000001", "D"]}))
    with pytest.raises(
        InputError, match=r"ENSG00000000001 \(A\): 'OLD1' in low, 'ENSG00000000001' in high.*;without=ENSG00000000001"
    ) as caught:
        read_gene_lists(str(path), STORE, vocabulary)
    advised = caught.value.fix.split("'")[1]
    assert shown(read_gene_lists(f"{path}#{advised}", STORE, vocabulary)) == {"low": ["B"], "high": ["D"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"low": ["A"], "high": ["Q", "Z"]}', "none of the 2 genes of class 'high'.*Q, Z"),
        ("a.json", '{"low": ["A"], "high": []}', "class 'high' has no genes"),
        ("a.json", '{"low": ["A"]}', r"1 class\(es\)"),
        ("a.json", '{"low": "A", "high": ["B"]}', "no classes of gene names"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"kind": "genescale-simulated-atlas", "genes": []}', "truth of a simulated atlas is not complete"),
        ("a.gmt", "low\tabout\n", "line 1: a set has a name, a description, genes"),
        ("a.gmt", "low\t\tA\nlow\t\tB\n", "line 2: the set 'low' stands here again"),
        ("a.csv", "gene,note\nA,x\n", "a column of classes is missing"),
        ("a.csv", "gene,class\nA,\n", "row 1: a gene or its class is empty"),
        ("a.csv", "gene,class\nA,low,more\n", "line 2: a row is longer"),
        ("a.csv", "gene,class\n", "no rows"),
        ("a.txt.gz", "not gzip", "this is no text"),
        ("a.xlsx", "PK", "no gene lists here"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(
    tmp_path: Path, vocabulary: Vocabulary, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_gene_lists(str(tmp_path / name), STORE, vocabulary)


def test_the_truth_of_a_simulated_atlas_gives_regulators_and_effectors(tmp_path: Path) -> None:
    from genescale.ingestion.simulate_network import SimulateConfig, plant_network, truth_of

    network = plant_network(SimulateConfig(seed=3, regulators=6, pairs=2))
    (tmp_path / "truth.json").write_text(json.dumps(truth_of(network)))
    vocabulary = Vocabulary.build(network.gene_ids, np.ones(network.n_genes), symbols=network.symbols, window=512)
    labels = read_gene_lists(f"{tmp_path}/truth.json", STORE, vocabulary)
    assert labels.counts == {"effector": 6 * 5 + 6 * 6 + 2 * 6, "regulator": 6}
    assert {symbol[:3] for symbol in shown(labels)["effector"]} == {"DIR", "IND", "COP"}
    assert {symbol[:3] for symbol in shown(labels)["regulator"]} == {"REG"}
    roles = read_gene_lists(f"{tmp_path}/truth.json#roles:mediator,marker", STORE, vocabulary)
    assert roles.counts == {"mediator": 6, "marker": 4 * 4}


def naive_rows(corpus: Corpus, cells: np.ndarray, tokens_g: np.ndarray) -> set[tuple[int, int, int]]:
    wanted = {int(token): gene for gene, token in enumerate(tokens_g)}
    tokens = corpus.tokens(cells.tolist())
    return {
        (n, at, wanted[int(token)]) for n, cell in enumerate(tokens) for at, token in enumerate(cell) if token in wanted
    }


def test_every_place_of_a_gene_is_found(tiny_corpus: Corpus, tiny_vocabulary: Vocabulary) -> None:
    cells = np.random.default_rng(0).permutation(tiny_corpus.n_cells)[:100]
    tokens_g = np.array([tiny_vocabulary.token(f"GENE{gene}") for gene in (3, 150, 9, 60)])
    rows = gene_rows(tiny_corpus, cells, tokens_g)
    row_cell, row_token, gene = rows
    found = list(zip(row_cell.tolist(), row_token.tolist(), gene.tolist(), strict=True))
    assert set(found) == naive_rows(tiny_corpus, cells, tokens_g)
    assert found == sorted(found)
    assert len(found) == len(set(found)) == len(rows)


def test_capped_genes_share_cells_whatever_the_order(
    tiny_corpus: Corpus, tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marker genes of one type stand in the same cells: five rows of each are read from the same five cells."""
    tokens_g = np.array([tiny_vocabulary.token(f"GENE{gene}") for gene in range(8)])
    cells = np.arange(tiny_corpus.n_cells)

    def places(order: np.ndarray, seed: int = 0) -> set[tuple[int, int, int]]:
        row_cell, row_token, gene = gene_rows(tiny_corpus, order, tokens_g, max_rows_per_gene=5, seed=seed)
        return set(zip(order[row_cell].tolist(), row_token.tolist(), gene.tolist(), strict=True))

    rows = places(cells)
    assert np.bincount([gene for _, _, gene in rows]).tolist() == [5] * 8
    assert len({cell for cell, _, _ in rows}) == 5
    assert rows == places(cells[::-1])
    assert rows != places(cells, seed=1)
    monkeypatch.setattr("genescale.training.labels.gene_labels.CELLS_AT_ONCE", 16)
    monkeypatch.setattr("genescale.training.labels.gene_labels.ROWS_BETWEEN_CUTS", 20)
    assert rows == places(cells)


def test_genes_that_stand_in_no_cell_are_refused(tiny_corpus: Corpus, tiny_vocabulary: Vocabulary) -> None:
    marker_of_t_cells = tiny_vocabulary.token("GENE16")
    types = tiny_corpus.cells(["cell_type"])["cell_type"].to_pylist()
    b_cells = np.array([i for i, kind in enumerate(types) if kind == "b_cell"])
    with pytest.raises(CorpusError, match=r"none of the 1 labelled genes occurs in the"):
        gene_rows(tiny_corpus, b_cells, [marker_of_t_cells])


@pytest.mark.shared
@pytest.mark.parametrize(("version", "genes"), [("gc30M", 25_424), ("gc104M", 20_271)])
def test_published_lists_are_one_file_for_all_tasks(shared_data: Path, version: str, genes: int) -> None:
    """Every published list is usable with both published vocabularies, and no gene is on two sides of a fold."""
    vocabulary = read_vocabulary(str(shared_data / f"vocabularies/geneformer_{version}_genes.tsv"), STORE)
    assert len(vocabulary.gene_ids) == genes
    path = shared_data / "genesets/geneformer_gene_classes.json"
    lists = json.loads(path.read_text())
    for section in lists:
        without = ";without=ENSG00000285708,ENSG00000128573" if section.startswith("bivalent") else ""
        labels = read_gene_lists(f"{path}#{section}{without}", STORE, vocabulary)
        listed = {gene for genes_of in lists[section].values() for gene in genes_of}
        lost = {name for names in labels.left_out.values() for name in names}
        assert {gene for gene in listed if gene not in lost} >= set(labels.ids_g) & listed
        assert len(set(labels.ids_g)) == len(labels.ids_g) == len(labels.tokens_g)
        assert len(labels.ids_g) > 0.9 * (len(listed) - len(lost))
        folds = make_folds(
            SplitRequest(method="random", folds=5, unit="genes"),
            Units(ids_u=np.array(labels.ids_g), labels_u=labels.codes_g),
        )
        tested = np.concatenate([split.test for split in folds.splits])
        assert sorted(tested.tolist()) == list(range(len(labels.ids_g)))
    with pytest.raises(InputError, match=r"ENSG00000285708 \(.*\): .* in bivalent, .* in lys4_only"):
        read_gene_lists(f"{path}#bivalent_vs_lys4_only", STORE, vocabulary)


@pytest.mark.shared
def test_published_files_of_other_forms_are_read(shared_data: Path) -> None:
    """Lists of transcription factors by symbol, one a line, as two classes: real names, many of them retired."""
    vocabulary = read_vocabulary(str(shared_data / "vocabularies/geneformer_gc30M_genes.tsv"), STORE)
    factors = shared_data / "genesets/transcription_factors/lambert2018.txt"
    lists = {"factor": factors.read_text().split()[:200], "other": ["CD3E", "ALB", "TTN", "INS"]}
    labels = gene_labels(lists, vocabulary)
    assert labels.counts["factor"] > 190
    assert labels.counts["other"] == 4
