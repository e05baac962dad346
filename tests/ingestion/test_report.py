"""The ingest report: its numbers add up, its JSON is stable, its page is self-contained and safe, advice is there."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genescale.ingestion.annotation.cells import REASONS
from genescale.ingestion.annotation.gene_names import FATES
from genescale.ingestion.plan import Failure
from genescale.ingestion.reports.distribution import Distribution, doubling_edges, spreads
from genescale.ingestion.reports.findings import NEXT_BY_REASON, findings
from genescale.ingestion.reports.report import IngestReport, SourceReport, summary, write_report
from genescale.ingestion.reports.report_figures import CELL_COLOURS, FATE_COLOURS
from genescale.ingestion.reports.report_page import html
from genescale.ingestion.tally import Tally, binned
from genescale.platform.errors import GenescaleError
from genescale.platform.storage import Store, join

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\x1b[2J"


def tally_of(kept: int = 900, *, depth: float = 3000, **dropped: int) -> Tally:
    """A tally of cells around a depth; read = kept + dropped."""
    depths = np.random.default_rng(1).lognormal(np.log(depth), 0.4, kept)
    lengths = np.minimum(depths**0.9, 4096)
    return Tally(
        read=kept + sum(dropped.values()),
        kept=kept,
        dropped=dropped,
        tokens=int(lengths.sum()),
        n_values=1000,
        n_ones=500,
        largest_count=321.0,
        counts_by_fate={"mapped": 9_000.0, "unknown": 800.0, "spike_in": 5_000.0},
        length_bins=binned(lengths),
        depth_bins=binned(depths),
        genes_bins=binned(lengths),
        seconds={"read": 1.0, "rank": 3.0},
    )


def fates(**examples: list[str]) -> dict[str, Any]:
    one = {"genes": 10, "share_of_genes": 0.25, "counts": 0.0, "share_of_counts": 0.0}
    names = {"mapped": ["ENSG00000000001"], "unknown": ["NOVEL1"], "spike_in": ["ERCC-1"], **examples}
    return {"measured": 10, "fates": {fate: {**one, "examples": names[fate]} for fate in names}}


def source_of(name: str, *, tally: Tally | None = None, **fields: Any) -> SourceReport:
    return SourceReport(
        uri=f"s3://lab/{name}.h5ad",
        dataset_id=name,
        status=fields.pop("status", "ingested"),
        tally=tally or tally_of(),
        **{
            "kind": "h5ad",
            "counts_slot": "raw.X",
            "genes_mapped": 20,
            "genes_dropped": 20,
            "gene_report": fates(),
            "seconds": 4.0,
            **fields,
        },
    )


def refused_of(name: str, message: str = "no raw counts found. Give raw counts.") -> SourceReport:
    failure = Failure(code="not_counts", message=f"s3://lab/{name}.h5ad: {message}")
    return SourceReport(uri=f"s3://lab/{name}.h5ad", dataset_id=name, status="refused", failure=failure)


def report_of(*sources: SourceReport, **fields: Any) -> IngestReport:
    return IngestReport(
        **{"corpus_uri": "s3://lake/corpus", "version": 3, "seconds": 10.0, "sources": sources, **fields}
    )


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "path", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_quantiles_are_within_a_bin_of_the_true_ones() -> None:
    values = np.random.default_rng(0).lognormal(7, 1, 20_000)
    spread = Distribution.of(binned(values), doubling_edges(200))
    assert spread.total == 20_000
    for share in (0.05, 0.25, 0.5, 0.95):
        assert spread.quantile(share) == pytest.approx(float(np.quantile(values, share)), rel=0.03)
    assert Distribution.of([], doubling_edges(4)).median is None
    assert Distribution.of([0, 7, 0], doubling_edges(3)).quantile(1.0) == pytest.approx(2 ** (2 / 8))


def test_wider_bins_hold_the_same_cells() -> None:
    spread = Distribution.of(binned(np.random.default_rng(0).lognormal(7, 1, 5_000)), doubling_edges(200))
    shares = spread.rebinned(np.geomspace(1, 1e6, 20))
    assert shares.sum() == pytest.approx(1.0)
    assert (shares >= 0).all()


def test_totals_are_those_of_the_sources_ingested_now() -> None:
    old = source_of("old", status="already_committed", tally=tally_of(77))
    report = report_of(source_of("a", tally=tally_of(100, below_min_genes=5)), old, source_of("b"), refused_of("c"))
    assert (report.read, report.kept, report.dropped) == (1005, 1000, {"below_min_genes": 5})
    assert report.read == report.kept + report.total.n_dropped
    assert not report.ok
    assert sum(report.total.depth_bins) == 1000
    assert report.cells_per_second == pytest.approx(100.5)
    # Spike-ins are no genes of the species: they do not count against the vocabulary.
    assert report.share_of_counts == pytest.approx(9_000 / 9_800)


def test_counts_of_the_tally_complete_the_gene_report() -> None:
    found = source_of("a").to_dict()["gene_report"]["fates"]
    assert found["mapped"]["counts"] == 9_000.0
    assert found["spike_in"]["share_of_counts"] == pytest.approx(5_000 / 14_800)


def test_history_gives_the_report_back() -> None:
    told = json.loads(json.dumps(source_of("a", version=7, notes=("one",), seconds=3.0).to_dict()))
    again = SourceReport(uri="s3://lab/a.h5ad", dataset_id="a", status="already_committed")
    again.recall(told)
    assert again.tally == source_of("a").tally
    assert (again.kind, again.version, again.notes, again.status) == ("h5ad", 7, ("one",), "already_committed")
    assert again.seconds == 0.0
    assert again.fates == source_of("a").fates


def test_json_has_the_agreed_fields_and_no_foreign_numbers(tmp_path: Path, local_store: Store) -> None:
    report = report_of(source_of("a"), refused_of("b"), ignored=("s3://lab/readme.txt",))
    addresses = write_report(report, str(tmp_path / "out"), local_store)
    assert [address.rpartition("/")[2] for address in addresses] == ["report.html", "report.json"]
    text = Path(addresses[1]).read_text()
    told = json.loads(text)
    assert told == json.loads(json.dumps(report.to_dict()))
    assert set(told) == {
        "schema_version", "corpus", "version", "started", "seconds", "ok", "cells_per_second", "source_bytes",
        "share_of_counts", "vocabulary", "recipe", "total", "sources", "findings", "ignored_files",
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(SourceReport)} - {"tally"}
    counted = {field.name for field in dataclasses.fields(Tally)}
    assert fields | counted | {"seconds_by_step", "distributions"} == set(told["sources"][0])
    assert told["sources"][0]["distributions"]["depth"]["p50"] == pytest.approx(3000, rel=0.1)
    assert told["sources"][0]["seconds"] == 4.0
    assert told["sources"][1]["failure"]["code"] == "not_counts"
    # A histogram stands on one line, so that the file can be read by people.
    assert max(len(line) for line in text.splitlines() if "length_bins" in line) > 300


def test_report_goes_to_object_storage(s3_store: tuple[Store, str]) -> None:
    store, bucket = s3_store
    addresses = write_report(report_of(source_of("a")), join(bucket, "reports"), store)
    assert json.loads(store.read(addresses[1]))["sources"][0]["dataset_id"] == "a"
    assert store.read(addresses[0]).startswith(b"<!doctype html>")


# --- findings --------------------------------------------------------------------------------------------------------


def whats(report: IngestReport, level: str) -> list[str]:
    return [finding.what for finding in findings(report) if finding.level == level]


def test_a_good_source_needs_nothing() -> None:
    assert findings(report_of(source_of("a"), source_of("b"), source_of("c"))) == []


def test_every_refusal_says_what_to_do_next() -> None:
    for kind in _kinds(GenescaleError):
        source = dataclasses.replace(
            refused_of("a"), failure=Failure(code=kind.code, message="s3://lab/a.h5ad: broken.")
        )
        (finding,) = findings(report_of(source))
        assert finding.what == f"[{kind.code}] broken."
        assert len(finding.next) > 20


def _kinds(kind: type[GenescaleError]) -> list[type[GenescaleError]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in _kinds(sub))]


@pytest.mark.parametrize("reason", REASONS)
def test_many_dropped_cells_are_told_with_advice_for_each_reason(reason: str) -> None:
    report = report_of(source_of("a", tally=tally_of(600, **{reason: 400})))
    found = [finding for finding in findings(report) if reason in finding.what]
    assert found
    assert found[0].level == "warning"
    assert "40%" in found[0].what
    assert found[0].next == NEXT_BY_REASON[reason]


def test_reasons_and_fates_all_have_their_own_colour() -> None:
    assert set(CELL_COLOURS) == {"kept", *REASONS}
    assert set(FATE_COLOURS) == set(FATES)
    for colours in (CELL_COLOURS, FATE_COLOURS):
        assert len(set(colours.values())) == len(colours)


def test_the_odd_one_out_is_found() -> None:
    report = report_of(*(source_of(f"s{i}") for i in range(4)), source_of("deep", tally=tally_of(depth=90_000)))
    found = [finding for finding in findings(report) if "counts per cell" in finding.what]
    assert [finding.dataset_id for finding in found] == ["deep"]
    assert "30 times" in found[0].what
    # Two sources have no majority that one of them could differ from.
    assert findings(report_of(source_of("a"), source_of("deep", tally=tally_of(depth=90_000)))) == []


def test_what_is_unusual_is_told() -> None:
    lost = tally_of()
    lost.counts_by_fate = {"mapped": 500.0, "unknown": 500.0}
    assert any("only 50%" in what for what in whats(report_of(source_of("a", tally=lost)), "warning"))
    held = {"policy": "report", "within": 3, "matches": {"b": 40, "c": 0}, "dropped": 0}
    told = whats(report_of(source_of("a", duplicates=held)), "warning")
    assert any("40 of its cells" in what and "'b'" in what for what in told)
    assert any("3 of its cells" in what for what in told)
    assert not any("'c'" in what for what in told)
    assert whats(report_of(source_of("a", duplicates={**held, "dropped": 43})), "warning") == []
    older = {"policy": "report", "not_compared": 11, "superseded": 12, "repeated_names": 13}
    assert "11 cells of the corpus" in whats(report_of(source_of("a", duplicates=older)), "warning")[0]
    assert len(whats(report_of(source_of("a", duplicates=older)), "note")) == 2
    ones = tally_of()
    ones.n_ones = 10
    assert any("1% of its values are 1" in what for what in whats(report_of(source_of("a", tally=ones)), "warning"))
    huge = dataclasses.replace(tally_of(), largest_count=2.0**25)
    assert any("33,554,432" in what for what in whats(report_of(source_of("a", tally=huge)), "warning"))
    assert whats(report_of(source_of("a", warnings=("looks at this",))), "warning") == ["looks at this"]
    lost_cells = dataclasses.replace(tally_of(100), read=103)
    assert any(
        "3 cells are unaccounted for" in what for what in whats(report_of(source_of("a", tally=lost_cells)), "warning")
    )


# --- terminal --------------------------------------------------------------------------------------------------------


def test_summary_says_all_a_person_needs() -> None:
    report = report_of(
        source_of("a", tally=tally_of(600, where=400), notes=("obs['age'] expected int",)),
        source_of("b", notes=("obs['age'] expected int",)),
        refused_of("c"),
    )
    text = summary(report)
    assert "2 of 3 sources ingested, 1 refused." in text
    assert "refused  [not_counts] s3://lab/c.h5ad: no raw counts found. Give raw counts." in text
    assert "dropped  400 cells: where" in text
    assert "cells    1,900 read = 1,500 kept + 400 dropped" in text
    assert "corpus   s3://lake/corpus@3" in text
    assert text.count("expected int") == 1
    assert "a, b: obs['age']" in text
    assert text.count("->") == 2


def test_summary_of_nothing_new_and_of_hostile_names() -> None:
    text = summary(report_of(source_of("a", status="already_committed")))
    assert "Nothing to do: every source is already in the corpus." in text
    text = summary(report_of(source_of(HOSTILE, notes=(HOSTILE,)), refused_of(HOSTILE, HOSTILE)))
    assert "\x1b" not in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "none yet" in summary(report_of(refused_of("a"), version=None))


# --- page ------------------------------------------------------------------------------------------------------------


def test_page_needs_no_network_and_no_script() -> None:
    text = html(report_of(source_of("a"), refused_of("b")))
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "img", "form"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?://|javascript:", text)
    for _, attributes in page.tags:
        assert all(not name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    linked = {str(attributes["href"])[1:] for _, attributes in page.tags if "href" in attributes}
    assert linked
    assert linked <= anchors


def test_page_shows_foreign_texts_as_texts() -> None:
    source = source_of(
        HOSTILE,
        gene_report=fates(unknown=[HOSTILE], **{HOSTILE: [HOSTILE]}),
        tally=tally_of(100, **{HOSTILE: 3}),
        notes=(HOSTILE,),
        warnings=(HOSTILE,),
        slots_seen={HOSTILE: HOSTILE},
        slot_reason=HOSTILE,
        gene_column=HOSTILE,
        species=HOSTILE,
        obs_columns={"cell_type": HOSTILE},
        duplicates={"policy": HOSTILE, "within": 1, "matches": {HOSTILE: 2}},
        kind=HOSTILE,
    )
    source.tally.seconds[HOSTILE] = 1.0
    failed = refused_of(HOSTILE, HOSTILE)
    report = report_of(
        source,
        source_of("b"),
        failed,
        corpus_uri=HOSTILE,
        ignored=(HOSTILE,),
        recipe={HOSTILE: HOSTILE},
        vocabulary={"name": HOSTILE},
        started=HOSTILE,
    )
    text = html(report)
    page = Page(text)
    assert "<script" not in text
    assert "img" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 15


def test_page_shows_every_number_of_the_report() -> None:
    report = report_of(
        source_of("alpha", tally=tally_of(1_234, empty_cell=56, bad_values=7), quarantined=63, replaced=True),
        source_of("beta", status="already_committed"),
        refused_of("gamma"),
    )
    page = Page(html(report))
    assert "1,297 read = 1,234 kept + 63 dropped" in page.text
    assert "1 of 3 sources ingested, 1 already in the corpus, 1 refused." in page.text
    assert "all 63 with their rows" in page.text
    assert "(replaced)" in page.text
    assert "NOVEL1" in page.text
    labels = " ".join(str(attributes.get("aria-label")) for _, attributes in page.tags)
    assert "values that are no counts: 7 cells (0.5%)" in labels
    assert re.search(r"alpha, counts per cell: median (2,9|3,0)\d\d, 5 to 95 percent 1,\d{3} to \d,\d{3}", labels)


def test_page_of_lost_cells_does_not_claim_that_they_add_up() -> None:
    page = Page(html(report_of(source_of("a", tally=dataclasses.replace(tally_of(100), read=103)))))
    assert "103 read, but 100 kept and 0 dropped: please report it" in page.text
    assert "103 read = " not in page.text.partition("Each source in full")[0]


def test_page_of_forty_sources_stays_small_and_marks_the_outlier() -> None:
    sources = [source_of(f"source{i}", tally=tally_of(depth=1_000 + 50 * i)) for i in range(39)]
    text = html(report_of(*sources, source_of("deep", tally=tally_of(depth=60_000))))
    assert len(text.encode()) < 1_000_000
    pictures = [attributes for tag, attributes in Page(text).tags if tag == "svg"]
    assert len(pictures) == 3 * 40
    odd = [str(picture["aria-label"]) for picture in pictures if picture["class"] == "hist outlier"]
    assert odd
    assert all(label.startswith("deep") for label in odd)
    # Deepest first, so that it is the first thing seen.
    assert str(pictures[0]["aria-label"]).startswith("deep, counts per cell")


@pytest.mark.parametrize("report", [report_of(), report_of(refused_of("a"), version=None)], ids=["empty", "refused"])
def test_page_without_a_single_cell(report: IngestReport) -> None:
    page = Page(html(report))
    assert page.open == []
    assert "Ingest report" in page.text
    assert summary(report)


def test_distributions_of_a_tally_cover_the_kept_cells() -> None:
    assert {name: spread.total for name, spread in spreads(tally_of(321)).items()} == dict.fromkeys(
        ("depth", "genes", "length"), 321
    )
