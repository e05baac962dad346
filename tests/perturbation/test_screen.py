"""A screen: every pair accounted for, the same bits as single answers, and continued after a break."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from genescale.ingestion.corpus import Corpus
from genescale.perturbation.perturb import EditRequest, Readouts, perturb_cell
from genescale.perturbation.readouts.states import States
from genescale.perturbation.readouts.states_file import read_states
from genescale.perturbation.screening.estimate import estimate
from genescale.perturbation.screening.job import run_here
from genescale.perturbation.screening.plan import make_plan
from genescale.perturbation.screening.screen import read_screen, screen
from genescale.perturbation.screening.screen_readouts import readouts_of
from genescale.perturbation.screening.spec import (
    CellsConfig,
    ComputeConfig,
    EditsConfig,
    ReadoutsConfig,
    ScreenConfig,
    StatesConfig,
)
from genescale.perturbation.screening.two_pass import TwoPassConfig
from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.errors import InputError, IntegrityError, LimitError, NotFoundError, SettingsError
from genescale.platform.memory_tracker import MemoryTracker
from genescale.platform.storage import Store
from genescale.training.embedder import Embedder
from genescale.training.heads.head import new_head
from genescale.training.heads.head_files import head_files
from genescale.training.heads.predict import load_heads
from genescale.training.heads.spec import HeadSpec

HERE = ComputeConfig(device="cpu", run_in="process")
# Units of a few cells, so that there are several.
LISTED = ScreenConfig(
    edits=EditsConfig(genes=("GENE0", "GENE1", "GENE0+GENE1"), controls=0),
    readouts=ReadoutsConfig(gene_shifts=("all",)),
    compute=ComputeConfig(device="cpu", run_in="process", tokens_per_unit=1_000),
)


def small(gene: str, **compute: Any) -> ScreenConfig:
    """One edit of two cells."""
    return ScreenConfig(
        edits=EditsConfig(genes=(gene,), controls=0),
        cells=CellsConfig(max_cells=2),
        compute=ComputeConfig(device="cpu", run_in="process", **compute),
    )


def on_ray(config: ScreenConfig) -> ScreenConfig:
    """The same screen on workers of their own."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, run_in="cluster"))


@pytest.mark.usefixtures("ray_local")
def test_a_screen_answers_every_pair_as_single_calls_do(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    vectors_sd = np.random.default_rng(1).normal(size=(2, framed.width))
    states = States(names=("ill", "well"), vectors_sd=vectors_sd, goal="well")
    out = str(tmp_path / "out")
    report = screen(framed_bundle, corpus, on_ray(LISTED), out_uri=out, store=local_store, states=states)
    found = read_screen(out, local_store)
    assert found.report == report
    assert report.n_units > 2
    assert report.n_pairs == 24 * 3 == report.n_edited + report.n_absent + report.n_undefined
    # Gene 0 stands in the first twelve cells; deleting it from the others changes nothing.
    assert (report.n_absent, report.n_undefined) == (12, 0)

    token = framed.vocabulary.token
    edits = [(token("GENE0"),), (token("GENE1"),), (token("GENE0"), token("GENE1"))]
    requests = [EditRequest(kind="delete", genes=genes) for genes in edits]
    readouts = Readouts(states=states, gene_shifts_of="all")
    answers = [perturb_cell(framed, cell, requests, readouts=readouts) for cell in corpus.tokens(range(24))]
    rows = found.cell_shifts
    flat = [answer for of_cell in answers for answer in of_cell]
    assert rows["cell_id"].to_list() == [f"cell-{cell}" for cell in range(24) for _ in edits]
    assert rows["tokens"].to_list() == [list(genes) for _ in range(24) for genes in edits]
    assert rows["cosine"].to_list() == [answer.cosine for answer in flat]
    assert rows["toward:ill"].to_list() == [answer.state_shifts[0] for answer in flat]
    assert rows["toward:well"].to_list() == [answer.goal_shift for answer in flat]
    assert rows["rank"].to_list() == [min(answer.found.values(), default=None) for answer in flat]
    assert rows["found"].to_list() == [not answer.absent for answer in flat]
    assert rows["symbol"].unique().sort().to_list() == ["GENE0", "GENE0+GENE1", "GENE1"]
    assert rows["n_genes"].to_list() == [len(cell) - 2 for cell in corpus.tokens(range(24)) for _ in edits]
    assert rows["donor_id"].n_unique() == 6

    of_pair: dict[tuple[str, str], list[float]] = {}
    for answer in (a for a in flat if a.found):
        name = "+".join(framed.vocabulary.gene_of_token(gene) for gene in answer.request.genes)
        for gene, cosine in answer.gene_cosines.items():
            of_pair.setdefault((name, framed.vocabulary.gene_of_token(gene)), []).append(1.0 - cosine)
    assert found.gene_shifts is not None
    assert len(found.gene_shifts) == len(of_pair) == report.n_gene_pairs
    for row in found.gene_shifts.iter_rows(named=True):
        shifts = of_pair[row["edit_id"], row["affected_gene_id"]]
        assert row["n_cells"] == len(shifts)
        assert row["mean_shift"] == pytest.approx(np.mean(shifts), abs=1e-12)
        assert row["sd_shift"] == (None if len(shifts) == 1 else pytest.approx(np.std(shifts, ddof=1), abs=1e-12))


def test_a_broken_screen_continues_and_ends_with_the_same_bytes(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    out, tracker = tmp_path / "out", MemoryTracker()

    def run(config: ScreenConfig = LISTED, to: Path = out) -> Any:
        return screen(framed_bundle, corpus, config, out_uri=str(to), store=local_store, tracker=tracker)

    whole = run()
    assert not (out / "gene_moments").exists(), "the sums behind the gene shifts are not left behind"
    again = run()
    assert (again.n_units_reused, again.parts) == (whole.n_units, whole.parts)

    # What a run that was killed in its second unit leaves: no record, marks of finished units only.
    broken = tmp_path / "broken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genescale.perturbation.screening.screen.remove_moments", lambda *_: None)
        run(to=broken)
    (broken / "_screen.json").unlink()
    for unit in range(1, whole.n_units):
        (broken / "_units" / f"unit-{unit:06d}.json").unlink()
        if unit > 1:
            (broken / "cell_shifts" / f"unit-{unit:06d}.parquet").unlink()
            (broken / "gene_moments" / f"unit-{unit:06d}.parquet").unlink()
    (broken / "gene_moments" / "unit-000001.parquet").write_bytes(b"half")
    with pytest.raises(NotFoundError, match="no finished screen"):
        read_screen(str(broken), local_store)
    continued = run(to=broken)
    assert continued.n_units_reused == 1
    assert continued.parts == whole.parts
    assert read_screen(str(broken), local_store).report.n_pairs == whole.n_pairs
    # One run per output, which the continuation went on with.
    assert len(tracker.runs) == 2
    recorded = tracker.runs[continued.run_id]
    assert (recorded.status, recorded.params["edits.kind"]) == ("FINISHED", "delete")


def test_a_screen_that_another_run_of_it_completed_meanwhile_has_its_record(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Any:
        return screen(framed_bundle, corpus, LISTED, out_uri=str(tmp_path / "out"), store=local_store)

    def overtaken(*arguments: Any) -> Iterator[int]:
        yield from run_here(*arguments)
        monkeypatch.undo()
        first.append(run())

    first: list[Any] = []
    monkeypatch.setattr("genescale.perturbation.screening.screen.run_here", overtaken)
    assert run().parts == first[0].parts
    assert read_screen(str(tmp_path / "out"), local_store).report == first[0]
    assert not (tmp_path / "out" / "gene_moments").exists()


def test_another_screen_at_the_same_place_is_refused(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    def run(config: ScreenConfig) -> Any:
        return screen(framed_bundle, corpus, config, out_uri=str(tmp_path / "out"), store=local_store)

    run(small("GENE0"))
    with pytest.raises(InputError, match="another screen stands there; it differs in config, edits_digest"):
        run(small("GENE1"))
    with pytest.raises(InputError, match="differs in tokens_per_unit"):
        run(small("GENE0", tokens_per_unit=77))
    assert run(small("GENE0", tokens_per_batch=17, workers=1)).n_pairs == 2


def test_every_gene_of_chosen_cells_on_object_storage(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, s3_store: tuple[Store, str]
) -> None:
    store, bucket = s3_store
    config = ScreenConfig(
        edits=EditsConfig(kind="overexpress", all=True),
        cells=CellsConfig(where="cell_type = 'monocyte'", max_cells=3, seed=4),
        readouts=ReadoutsConfig(measure="cls", states=StatesConfig(column="donor_id", goal="donor-1")),
        compute=HERE,
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
    assert report.states["cells"] == {"donor-1": 4}
    # The states that were worked out stay beside the results, and are means of <cls> here.
    states = read_states(f"{bucket}/screens/one/states.parquet", store)
    of_donor = framed.embed_cells(corpus.tokens(range(4, 8)), layer="second_to_last", pooling="cls")
    assert states.vectors_sd[0] == pytest.approx(of_donor.mean(axis=0), abs=1e-6)


def test_controls_stand_beside_their_edits_and_are_kept_apart(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    config = ScreenConfig(
        edits=EditsConfig(genes=("GENE0", "GENE1"), controls=3, not_controls=("GENE2",)),
        cells=CellsConfig(max_cells=6),
        readouts=ReadoutsConfig(gene_shifts=("all",), top_k=5),
        compute=HERE,
    )
    report = screen(framed_bundle, corpus, config, out_uri=str(tmp_path / "out"), store=local_store)
    found = read_screen(str(tmp_path / "out"), local_store)
    controls = found.cell_shifts.filter(pl.col("role") == "control")
    assert report.n_pairs == 6 * 2
    assert report.n_controls == len(controls) == 3 * report.n_edited
    assert "GENE2" not in controls["symbol"].to_list()
    assert controls.filter(pl.col("edit_id") == pl.col("control_of")).is_empty()
    assert (controls["shift"] > 0).all()
    # Of each edit the five genes that moved most, and the same five under its controls.
    assert found.gene_shifts is not None
    by_edit = {name[0]: rows for name, rows in found.gene_shifts.group_by("edit_id")}
    gene1 = framed_bundle.vocabulary.gene_of_token(framed_bundle.vocabulary.token("GENE1"))
    edited, beside = by_edit[gene1], by_edit[f"controls of {gene1}"]
    assert len(edited) == 5
    assert beside["control_of"].unique().to_list() == [gene1]
    assert set(beside["affected_gene_id"]) <= set(edited["affected_gene_id"])
    assert report.n_gene_pairs == len(found.gene_shifts)

    everything = dataclasses.replace(config, readouts=ReadoutsConfig(gene_shifts=("all",)))
    screen(framed_bundle, corpus, everything, out_uri=str(tmp_path / "all"), store=local_store)
    whole = read_screen(str(tmp_path / "all"), local_store).gene_shifts
    assert whole is not None
    assert report.n_gene_pairs_left_out == len(whole) - len(found.gene_shifts)
    largest = whole.filter(pl.col("edit_id") == gene1).top_k(5, by="mean_shift")
    assert set(largest["affected_gene_id"]) == set(edited["affected_gene_id"])


def test_two_passes_delete_what_scores_high_and_some_of_the_rest(
    framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    whole = ScreenConfig(edits=EditsConfig(all=True), cells=CellsConfig(max_cells=5), compute=HERE)
    few = dataclasses.replace(whole, two_pass=TwoPassConfig(top_fraction=0.2, control_fraction=0.1))
    screen(framed_bundle, corpus, whole, out_uri=str(tmp_path / "whole"), store=local_store)
    report = screen(framed_bundle, corpus, few, out_uri=str(tmp_path / "few"), store=local_store)
    every = read_screen(str(tmp_path / "whole"), local_store).cell_shifts
    rows = read_screen(str(tmp_path / "few"), local_store).cell_shifts
    assert report.n_pairs + report.n_not_chosen == len(every)
    assert 0.25 < report.n_pairs / len(every) < 0.35
    assert rows.filter(chosen="top")["chance"].unique().to_list() == [1.0]
    assert rows.filter(chosen="random")["chance"].is_between(0.05, 0.2).all()
    # What is tried has the same answers as in the full screen.
    both = rows.join(every, on=["cell_id", "edit_id"], how="left", maintain_order="left")
    assert both["shift"].to_list() == pytest.approx(both["shift_right"].to_list(), abs=1e-6)
    # Every gene's score is kept, and the highest of each cell were chosen.
    scores = pl.read_parquet(tmp_path / "few" / "first_pass" / "*.parquet")
    assert len(scores) == len(every)
    for _, of_cell in scores.group_by("cell_id"):
        top = of_cell.filter(chosen="top")
        others = of_cell.filter(pl.col("chosen").ne_missing("top"))
        assert top["score"].min() >= others["score"].max()  # type: ignore[operator]


def test_class_probabilities_change_as_the_head_says(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    spec = HeadSpec(
        label="disease", width=framed.width, layer="last", pooling="mean_genes", classes=("ill", "well"), dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        fitted = new_head(spec)
    bundle = write_bundle(
        tmp_path / "fitted",
        kind="cell_classifier",
        config=dict(framed_bundle.config),
        weights=framed_bundle.weights(),
        vocabulary=framed_bundle.vocabulary,
        lineage={},
        extra=head_files([fitted]),
    )
    config = dataclasses.replace(small("GENE1"), readouts=ReadoutsConfig(head=str(bundle.folder), head_label="disease"))
    with pytest.raises(SettingsError, match="belong together"):
        screen(framed_bundle, corpus, config, out_uri=str(tmp_path / "out"), store=local_store)
    report = screen(framed_bundle, corpus, config, out_uri=str(tmp_path / "out"), store=local_store, head=bundle)
    rows = read_screen(str(tmp_path / "out"), local_store).cell_shifts
    assert report.classes == ["ill", "well"]
    model, token = load_heads(bundle, device="cpu"), framed.vocabulary.token("GENE1")
    for row in rows.iter_rows(named=True):
        (cell,) = corpus.tokens([row["source_row"]])
        before, after = model.predict_cells([cell, cell[cell != token]])[0].probabilities_nc
        assert [row["class:ill"], row["class:well"]] == pytest.approx((after - before).tolist(), abs=1e-6)


def test_an_estimate_counts_the_passes_that_a_screen_takes(
    framed_bundle: Bundle, framed: Embedder, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    for edits in (EditsConfig(all=True), EditsConfig(genes=("GENE0", "GENE1"), controls=0)):
        config = ScreenConfig(edits=edits, compute=HERE)
        plan = make_plan(framed_bundle, corpus, config, store=local_store)
        found = estimate(plan, corpus, framed, readouts_of(config, plan, None, None), workers=3, probe_s=0.01)
        done = screen(framed_bundle, corpus, config, out_uri=str(tmp_path / str(edits.all)), store=local_store)
        assert found.sequences == done.n_sequences
        assert found.edits == done.n_pairs
        assert found.seconds == pytest.approx(found.forward_flops / found.flops_per_s / 3)
        # One of the two layers is read: projections and feed-forward of every token, and attention beside.
        cells, edited = corpus.tokens(range(24)), plan.cells["n_changed"]
        tokens = sum(len(cell) * (1 + n) for cell, n in zip(cells, edited, strict=True))
        assert found.forward_flops > tokens * (8 * 32**2 + 4 * 32 * 64)


def test_a_changed_part_is_noticed(framed_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store) -> None:
    screen(framed_bundle, corpus, small("GENE1"), out_uri=str(tmp_path / "out"), store=local_store)
    part = tmp_path / "out" / "cell_shifts" / "unit-000000.parquet"
    part.write_bytes(part.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match=r"unit-000000\.parquet"):
        read_screen(str(tmp_path / "out"), local_store)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_an_error_in_a_worker_arrives_as_itself(
    short_bundle: Bundle, corpus: Corpus, tmp_path: Path, local_store: Store
) -> None:
    with pytest.raises(LimitError, match="window is 8") as raised:
        screen(short_bundle, corpus, on_ray(LISTED), out_uri=str(tmp_path / "out"), store=local_store)
    assert type(raised.value) is LimitError
    with pytest.raises(NotFoundError, match="no finished screen"):
        read_screen(str(tmp_path / "out"), local_store)
