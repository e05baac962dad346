"""A screen on Ray: every pair accounted for, the same bits as single answers, and continued after a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.perturb import EditRequest, perturb_cell
from genescale.perturbation.screening.screen import ScreenConfig, read_screen, screen, summarise
from genescale.platform.bundle import Bundle
from genescale.platform.errors import InputError, IntegrityError, LimitError, NotFoundError
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder

pytestmark = pytest.mark.usefixtures("ray_local")
# Units of a few cells, so that there are several.
LISTED = ScreenConfig(genes=("GENE0", "GENE1", "GENE0+GENE1"), gene_shifts="all", tokens_per_unit=1_000, device="cpu")


def test_a_screen_answers_every_pair_as_single_calls_do(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    goal = np.random.default_rng(1).normal(size=framed.width)
    report = screen(framed_bundle, corpus, LISTED, out_uri=str(tmp_path / "out"), store=local_store, goal=goal)
    found = read_screen(str(tmp_path / "out"), local_store)
    assert found.report == report
    assert report.n_units > 2
    assert report.n_pairs == 24 * 3 == report.n_edited + report.n_absent + report.n_undefined
    # Gene 0 stands in the first twelve cells; deleting it from the others changes nothing.
    assert (report.n_absent, report.n_undefined) == (12, 0)

    token = framed.vocabulary.token
    edits = [(token("GENE0"),), (token("GENE1"),), (token("GENE0"), token("GENE1"))]
    requests = [EditRequest(kind="delete", genes=genes) for genes in edits]
    answers = [
        perturb_cell(framed, cell, requests, goal=goal, gene_shifts_of="all") for cell in corpus.tokens(range(24))
    ]
    rows = found.cell_shifts
    flat = [answer for of_cell in answers for answer in of_cell]
    assert rows["cell_id"].to_list() == [f"cell-{cell}" for cell in range(24) for _ in edits]
    assert rows["tokens"].to_list() == [list(genes) for _ in range(24) for genes in edits]
    assert rows["cosine"].to_list() == [answer.cosine for answer in flat]
    assert rows["goal_shift"].to_list() == [answer.goal_shift for answer in flat]
    assert rows["rank"].to_list() == [min(answer.found.values(), default=None) for answer in flat]
    assert rows["found"].to_list() == [not answer.absent for answer in flat]
    assert rows["symbol"].unique().sort().to_list() == ["GENE0", "GENE0+GENE1", "GENE1"]
    assert rows["donor_id"].n_unique() == 6

    of_pair: dict[tuple[str, str], list[float]] = {}
    for answer in (a for a in flat if a.found):
        name = "+".join(framed.vocabulary.gene_of_token(gene) for gene in answer.request.genes)
        for gene, cosine in answer.gene_cosines.items():
            of_pair.setdefault((name, framed.vocabulary.gene_of_token(gene)), []).append(cosine)
    assert found.gene_shifts is not None
    assert len(found.gene_shifts) == len(of_pair) == report.n_gene_pairs
    for row in found.gene_shifts.iter_rows(named=True):
        cosines = of_pair[row["gene_id"], row["affected_gene_id"]]
        assert row["n_cells"] == len(cosines)
        assert row["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-12)
        assert row["sd_shift"] == (None if len(cosines) == 1 else pytest.approx(np.std(cosines, ddof=1), abs=1e-12))


def test_a_broken_screen_continues_and_ends_with_the_same_bytes(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    out = tmp_path / "out"
    whole = screen(framed_bundle, corpus, LISTED, out_uri=str(out), store=local_store)
    again = screen(framed_bundle, corpus, LISTED, out_uri=str(out), store=local_store)
    assert (again.n_units_reused, again.parts) == (whole.n_units, whole.parts)

    # What a run killed within its second unit leaves: no record, later units missing, one unit half written.
    (out / "_screen.json").unlink()
    for unit in range(2, whole.n_units):
        (out / "cell_shifts" / f"unit-{unit:05d}.parquet").unlink()
        (out / "gene_moments" / f"unit-{unit:05d}.parquet").unlink()
    (out / "cell_shifts" / "unit-00001.parquet").unlink()
    with pytest.raises(NotFoundError, match="no finished screen"):
        read_screen(str(out), local_store)
    continued = screen(framed_bundle, corpus, LISTED, out_uri=str(out), store=local_store)
    assert continued.n_units_reused == 1
    assert continued.parts == whole.parts
    assert read_screen(str(out), local_store).report.n_pairs == whole.n_pairs


def test_another_screen_at_the_same_place_is_refused(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    one = ScreenConfig(genes=("GENE0",), max_cells=2, device="cpu")
    other = ScreenConfig(genes=("GENE1",), max_cells=2, device="cpu")
    screen(framed_bundle, corpus, one, out_uri=str(tmp_path / "out"), store=local_store)
    with pytest.raises(InputError, match="another screen stands there; it differs in config"):
        screen(framed_bundle, corpus, other, out_uri=str(tmp_path / "out"), store=local_store)
    faster = ScreenConfig(genes=("GENE0",), max_cells=2, device="cpu", tokens_per_batch=17)
    assert screen(framed_bundle, corpus, faster, out_uri=str(tmp_path / "out"), store=local_store).n_pairs == 2


def test_every_gene_of_chosen_cells_on_object_storage(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    config = ScreenConfig(
        kind="overexpress",
        select="detected",
        where=("cell_type=monocyte",),
        max_cells=3,
        seed=4,
        measure="cls",
        device="cpu",
    )
    report = screen(framed_bundle, corpus, config, out_uri=f"{bucket}/screens/one", store=store)
    rows = read_screen(f"{bucket}/screens/one", store).cell_shifts
    assert rows["cell_type"].unique().to_list() == ["monocyte"]
    assert rows["cell_id"].n_unique() == 3
    chosen = rows["source_row"].unique(maintain_order=True).to_list()
    genes = [tokens[1:-1].tolist() for tokens in corpus.tokens(chosen)]
    assert [tokens[0] for tokens in rows["tokens"].to_list()] == [gene for of_cell in genes for gene in of_cell]
    assert rows.filter(pl.col("rank") == 0)["shift"].to_list() == [0.0] * 3
    assert report.n_edited == report.n_pairs == sum(map(len, genes))
    assert summarise(rows)["n_cells"].sum() == report.n_pairs


def test_a_changed_part_is_noticed(framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store) -> None:
    config = ScreenConfig(genes=("GENE1",), max_cells=2, device="cpu")
    screen(framed_bundle, corpus, config, out_uri=str(tmp_path / "out"), store=local_store)
    part = tmp_path / "out" / "cell_shifts" / "unit-00000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match=r"unit-00000\.parquet"):
        read_screen(str(tmp_path / "out"), local_store)


def test_an_error_in_a_worker_arrives_as_itself(
    short_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    with pytest.raises(LimitError, match="window is 8"):
        screen(short_bundle, corpus, LISTED, out_uri=str(tmp_path / "out"), store=local_store)
    with pytest.raises(NotFoundError, match="no finished screen"):
        read_screen(str(tmp_path / "out"), local_store)
