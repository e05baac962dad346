"""`genescale perturb states`: compute the states that a screen measures movements toward, and save them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genescale.training.model_options import add_model_and_corpus, opened_model

if TYPE_CHECKING:
    import argparse

    from genescale.perturbation.readouts.states import States

EPILOG = """\
example:
  genescale perturb states models:/genescale@champion --corpus s3://lake/corpus@12 --column disease \\
      --start "dilated cardiomyopathy" --goal normal --alternative "hypertrophic cardiomyopathy" \\
      --where "cell_type = 'cardiomyocyte'" --output s3://lake/states.parquet

A state is the mean embedding of its cells. The file says which model, layer and pooling it was made with; a screen of
another model refuses it. Without --start, --goal and --alternative every value of the column is a state."""


def states(argv: Sequence[str]) -> int:
    """Compute the mean embeddings of labelled cells, save them, and say how far apart they are."""
    from genescale.platform.cli import begin

    arguments, settings = begin(_parser(), argv)
    from genescale.ingestion.corpus import Corpus
    from genescale.perturbation.readouts.states import States
    from genescale.platform.progress import stage
    from genescale.platform.storage import Store
    from genescale.training.embedder import Embedder, check_pooling, layers_to_run

    store = Store(settings.storage)
    with opened_model(arguments.model, settings) as bundle:
        layers_to_run(arguments.layer, int(bundle.config["num_hidden_layers"]))
        check_pooling(arguments.pooling, bundle.vocabulary)
        corpus = Corpus.open(arguments.corpus, store)
        embedder = Embedder.load(bundle, device=arguments.device)
        with stage("states") as progress:
            made = States.of_corpus(
                embedder,
                corpus,
                arguments.column,
                start=arguments.start,
                goal=arguments.goal,
                alternatives=arguments.alternative,
                where=arguments.where,
                layer=arguments.layer,
                pooling=arguments.pooling,
                max_cells=arguments.max_cells,
                seed=arguments.seed,
                progress=progress,
            )
    made.save(arguments.output, store)
    if arguments.json:
        _print_json(made, arguments.output)
    else:
        _print_table(made, arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    from genescale.perturbation.readouts.states import MAX_CELLS
    from genescale.platform.cli import command_parser

    parser = command_parser("perturb states", "Save mean embeddings of labelled cells.", epilog=EPILOG)
    add_model_and_corpus(parser)
    parser.add_argument("--column", required=True, metavar="COLUMN", help="cell column whose values name the states")
    parser.add_argument("--start", default="", metavar="VALUE", help="state of the cells that will be edited")
    parser.add_argument("--goal", default="", metavar="VALUE", help="state that edits should lead to")
    parser.add_argument(
        "--alternative", action="append", default=[], metavar="VALUE", help="further state (repeatable)"
    )
    parser.add_argument("--where", default="", metavar="SQL", help="only cells that fulfil this condition")
    parser.add_argument("--output", required=True, metavar="URI", help="Parquet file for the states")
    parser.add_argument("--layer", default="second_to_last", help="last or second_to_last (default)")
    parser.add_argument("--pooling", default="mean_genes", help="mean_genes (default) or cls")
    parser.add_argument(
        "--max-cells", type=int, default=MAX_CELLS, metavar="N", help=f"cells of a state (default {MAX_CELLS}, 0: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of drawn cells (default 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print the states, without vectors, as JSON")
    return parser


def _role(made: States, name: str) -> str:
    return "goal" if name == made.goal else "start" if name == made.start else ""


def _print_json(made: States, uri: str) -> None:
    import json

    rows = [
        {
            "state": name,
            "role": _role(made, name),
            "cells": cells,
            "not_drawn": made.left_out.get(name, 0),
            "cosines": dict(zip(made.names, row, strict=True)),
        }
        for name, cells, row in zip(made.names, made.cells, made.cosines_ss.tolist(), strict=True)
    ]
    facts = {"layer": made.layer, "pooling": made.pooling, "model_digest": made.model_digest}
    print(json.dumps({"uri": uri, **facts, "without_label": made.without_label, "states": rows}, indent=2))


def _print_table(made: States, uri: str) -> None:
    print(f"{'state':<32} {'role':<6} {'cells':>9}   {'not drawn':>9}   nearest other state (cosine)")
    for at, name in enumerate(made.names):
        others = [(made.cosines_ss[at, other], made.names[other]) for other in range(len(made.names)) if other != at]
        nearest = f"{max(others)[1]} ({max(others)[0]:.6f})" if others else ""
        role, left_out = _role(made, name), made.left_out.get(name, 0)
        print(f"{name[:32]:<32} {role:<6} {made.cells[at]:>9,}   {left_out:>9,}   {nearest}")
    if made.without_label:
        print(f"{made.without_label:,} selected cells are in none of these states.")
    print(f"written  {uri} ({made.layer}, {made.pooling})")
