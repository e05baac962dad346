"""`genescale predict`: a fitted head on other cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.training.model_options import add_model_and_corpus, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.platform.storage import Store
    from genescale.training.evaluation.predictions import Predictions
    from genescale.training.labels.concordance import Concordance, Interval

UNLIKE = 0.99
PREDICT_EPILOG = """\
examples:
  genescale predict models:/cell-types@newest --corpus s3://lake/corpus@12 --where "tissue = 'heart'" \\
      --output heart --h5ad heart.h5ad heart_typed.h5ad
  genescale predict models:/dosage@newest --corpus s3://lake/corpus@12 --where "development_stage = 'fetal'" \\
      --against "development_stage = 'adult'" --output fetal

The output folder gets one Parquet file for each head: probability of each class, or the number, of every cell or gene,
and out_of_distribution: the share of the model's examples that are nearer to their class (0.99 and more: unlike them).
A head of genes answers with the mean over the cells, with its spread and the number of cells. --against reads the same
genes in other cells and says how far the calls agree."""


def predict(argv: Sequence[str]) -> int:
    """Write what a fitted model says of the cells of a corpus, or of genes in them."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    _check_numbers(arguments.max_cells, arguments.confidence)

    from genescale.ingestion.corpus import Corpus
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.training.heads.corpus_answers import check_file, check_uses, compare, predict_corpus
    from genescale.training.heads.predict import load_heads
    from genescale.training.labels.selection import select_cells

    store = Store(settings.storage)
    genes = [name.strip() for name in arguments.genes.split(",") if name.strip()]
    asked: dict[str, Any] = {"genes": genes, "max_cells": arguments.max_cells, "seed": arguments.seed}
    with opened_model(arguments.model, settings) as bundle:
        model, corpus = load_heads(bundle, device=arguments.device), Corpus.open(arguments.corpus, store)
        check_uses(model, against=bool(arguments.against), annotate=bool(arguments.h5ad))
        select_cells(corpus, arguments.against)  # a condition that fits no cell ends here
        if arguments.h5ad:
            check_file(arguments.h5ad[0], corpus, arguments.where, dataset_id=arguments.dataset_id, store=store)
        with stage("predict") as progress:
            found = predict_corpus(model, corpus, where=arguments.where, progress=progress, **asked)
        agreed = None
        if arguments.against:
            with stage("predict against") as progress:
                other = predict_corpus(model, corpus, where=arguments.against, progress=progress, **asked)
            agreed = compare(found[0], other[0], confidence=arguments.confidence, seed=arguments.seed)
    _write(found, agreed, len(genes), Path(arguments.output))
    if arguments.h5ad:
        _annotate(found, arguments.h5ad, arguments.dataset_id, store)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.platform.cli import command_parser

    parser = command_parser("predict", "Answer cells, or genes in cells, with a fitted model.", epilog=PREDICT_EPILOG)
    add_model_and_corpus(parser)
    parser.add_argument("--where", default="", metavar="SQL", help="only cells that fulfil this condition")
    parser.add_argument("--max-cells", type=int, default=0, metavar="N", help="cells drawn at random (0: all)")
    parser.add_argument("--genes", default="", metavar="G,G,…", help="only these genes, by id or symbol")
    parser.add_argument("--against", default="", metavar="SQL", help="compare with the same genes in these cells")
    parser.add_argument("--confidence", type=float, default=0.8, metavar="P", help="a sure call (default 0.8)")
    parser.add_argument("--output", default="predictions", metavar="FOLDER", help="local folder (default predictions)")
    parser.add_argument(
        "--h5ad", nargs=2, metavar=("IN", "OUT"), help="also copy the atlas file IN to OUT with the answers in obs"
    )
    parser.add_argument("--dataset-id", default="", help="dataset of IN in the corpus, when there are several")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of drawn cells (default 0)")
    return parser


def _check_numbers(max_cells: int, confidence: float) -> None:
    from genescale.platform.errors import SettingsError

    if max_cells < 0:
        raise SettingsError(f"{max_cells} cells cannot be drawn.", where="--max-cells", fix="Give 0 for all cells.")
    if not 0 <= confidence <= 1:
        raise SettingsError(f"{confidence} is no probability.", where="--confidence", fix="Give a number from 0 to 1.")


def _write(found: Sequence[Predictions], agreed: Concordance | None, n_asked: int, out: Path) -> None:
    """Write and print the answers of every head, and how two sets of cells agree; `n_asked` genes were named."""
    import json

    import pyarrow.parquet as pq

    out.mkdir(parents=True, exist_ok=True)
    for one in found:
        path = out / f"{one.label.replace('/', '_')}.parquet"
        pq.write_table(one.table(), path)
        _print_predictions(one)
        if len(one) < n_asked:
            print(f"left out     {n_asked - len(one):,} of the genes asked for: in none of the cells, or named twice")
        print(f"written      {path}")
    if agreed is not None:
        (out / "concordance.json").write_text(json.dumps(agreed.to_dict(), indent=1), encoding="utf-8")
        _print_concordance(agreed)


def _print_predictions(found: Predictions) -> None:
    from collections import Counter

    if found.kind == "number":
        values = found.values_u
        print(f"{found.label:<12} {len(found):,} {found.unit}: {values.min():.4g} to {values.max():.4g}")
        return
    counts = Counter(found.codes_u.tolist())
    print(f"{found.label:<12} {len(found):,} {found.unit}")
    for code, count in counts.most_common():
        print(f"             {count:>9,}  {found.classes[code]}")
    if found.out_of_distribution_u is not None:
        unlike = int((found.out_of_distribution_u >= UNLIKE).sum())
        print(f"unlike       {unlike:>9,} are further from their class than {UNLIKE:.0%} of the model's examples")


def _print_concordance(found: Concordance) -> None:
    def told(value: Interval) -> str:
        return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"

    print(
        f"in both      {found.units:,} genes ({found.only_first:,} and {found.only_second:,} in one set of cells only)"
    )
    print(f"same call    {told(found.agreement)}")
    print(f"same, sure   {told(found.confident_agreement)}, of {found.confident:,} sure ones (from {found.confidence})")
    print(f"kappa        {told(found.kappa)}")


def _annotate(found: Sequence[Predictions], files: Sequence[str], dataset_id: str, store: Store) -> None:
    """Copy the atlas with the answers of every head, one head after the other."""
    import os

    from genescale.ingestion.pipeline import dataset_name
    from genescale.training.evaluation.predictions_h5ad import annotate_predictions

    source, out = files
    dataset_id = dataset_id or dataset_name(source)
    for one in found:
        half_done = f"{out}.part"
        done = annotate_predictions(source, one, half_done, store=store, dataset_id=dataset_id)
        os.replace(half_done, out)
        source = out
        print(f"h5ad         {out}: {one.label}, {done.embedded:,} of {done.cells:,} cells")
