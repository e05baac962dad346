"""The end of the heads' report: every gene, the course of training, the split, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from genescale.ingestion.reports.report_figures import escaped, number
from genescale.training.evaluation.figures import learning_figure
from genescale.training.evaluation.measures import plain
from genescale.training.evaluation.predictions import Predictions

if TYPE_CHECKING:
    from genescale.training.labels.splitting import Folds

GENES_OPEN = 30
MOST_GENES = 5_000
MOST_GROUPS_NAMED = 12
LOSSES, SCORES = ("train_loss", "validation_loss"), ("validation_score", "validation_macro_f1", "validation_r2")


def gene_table(predictions: Predictions) -> str:
    """Every gene with its classes, the mean probability over its cells and their spread; nothing for cells."""
    if predictions.unit != "genes" or predictions.kind != "classes":
        return ""
    order = np.lexsort((-predictions.probabilities.max(axis=1), predictions.codes_u))
    rows = [_gene_row(predictions, int(unit)) for unit in order[:MOST_GENES]]
    names = [("gene", ""), ("Ensembl id", "minor"), ("true", ""), ("predicted", ""), ("probability", "number")]
    if predictions.spread_u is not None:
        names.append(("± over cells", "number"))
    if predictions.rows_u is not None:
        names.append(("cells", "number"))
    names.append(("fold", "number"))
    head = "".join(f'<th class="{kind}">{name}</th>' for name, kind in names)

    def table(part: Sequence[str]) -> str:
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(part)}</tbody></table></div>'

    text = (
        "A gene's probability is the mean over the cells it was read from, while it was held out; ± is the standard "
        "deviation over those cells. Sorted by predicted class and probability; wrong ones are marked."
    )
    if len(order) > MOST_GENES:
        text += f" The first {MOST_GENES:,} of {len(order):,}; the predictions file has all."
    opened = " open" if len(rows) <= GENES_OPEN else ""
    return (
        f'<h2>Genes</h2><p class="soft">{escaped(text)}</p><details{opened}><summary>{len(rows):,} genes</summary>'
        f"{table(rows)}</details>"
    )


def _gene_row(predictions: Predictions, unit: int) -> str:
    gene = str(predictions.ids_u[unit])
    symbol = gene if predictions.names_u is None else str(predictions.names_u[unit]) or gene
    true, said = int(predictions.true_u[unit]), int(predictions.codes_u[unit])
    known = "–" if true < 0 else predictions.classes[true]
    wrong = ' class="wrong"' if true >= 0 and true != said else ""
    cells = [
        f'<td class="name">{escaped(symbol)}</td><td class="minor">{escaped(gene)}</td><td>{escaped(known)}</td>',
        f"<td{wrong}>{escaped(predictions.classes[said])}</td>",
        f'<td class="number">{predictions.probabilities[unit, said]:.3f}</td>',
    ]
    if predictions.spread_u is not None:
        cells.append(f'<td class="number">{predictions.spread_u[unit]:.3f}</td>')
    if predictions.rows_u is not None:
        cells.append(f'<td class="number">{int(predictions.rows_u[unit]):,}</td>')
    return f'<tr>{"".join(cells)}<td class="number">{int(predictions.fold_u[unit]) + 1}</td></tr>'


def learning(history: Mapping[int, Sequence[Mapping[str, float]]], best: Mapping[int, int]) -> str:
    """Losses and validation scores by epoch, for all folds; nothing for heads that are not trained."""
    rows = [row for each in history.values() for row in each]
    losses = [name for name in LOSSES if any(name in row for row in rows)]
    score = next((name for name in SCORES if any(name in row for row in rows)), "")
    if not losses and not score:
        return ""
    figures = learning_figure(history, losses, best=best, y_title="loss") if losses else ""
    figures = f"<div><h3>Loss</h3>{figures}</div>" if figures else ""
    if score:
        drawn = learning_figure(history, [score], best=best, y_title=score.replace("_", " "))
        figures += f"<div><h3>Validation</h3>{drawn}</div>"
    kept = ", ".join(str(epoch) for epoch in best.values() if epoch)
    text = f"Epoch kept{' (by fold)' if len(best) > 1 else ''}: {kept}." if kept else ""
    return f'<h2>Training</h2><p class="soft">{escaped(text)}</p><div class="pair">{figures}</div>'


def split_json(split: Folds | None) -> dict[str, Any] | None:
    """How the units were split: method, seed, sizes by fold, and the statistics of balance."""
    if split is None:
        return None
    return {
        "method": split.method,
        "seed": split.seed,
        "folds": [{name: len(units) for name, units in each.parts().items()} for each in split.splits],
        "tried": split.tried,
        "statistics": [plain(row.to_dict()) for row in split.statistics],
        "notes": list(split.notes),
    }


def split_section(split: Folds | None, unit: str) -> str:
    """Sizes of the parts by fold, and the tests of balance between them."""
    if split is None:
        return ""
    names = list(split.splits[0].parts())
    head = "".join(f'<th class="number">{escaped(name)}</th>' for name in names)
    rows = "".join(
        f"<tr><td>fold {place + 1}</td>"
        + "".join(f'<td class="number">{number(len(part))}</td>' for part in each.parts().values())
        + "</tr>"
        for place, each in enumerate(split.splits)
    )
    sizes = f"<table><thead><tr><th>{escaped(unit)}</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    notes = "".join(f"<p>{escaped(note)}</p>" for note in split.notes)
    text = f"Method: {split.method}, seed {split.seed}. Which unit stood in which part is in the split's own file."
    return f"<h2>Split</h2><p>{escaped(text)}</p>{notes}{sizes}{_statistics(split)}"


def _statistics(split: Folds) -> str:
    if not split.statistics:
        return ""
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("attribute", ""), ("test", ""), ("statistic", ' class="number"'), ("p", ' class="number"'),
            ("over", ""), ("in the parts", ""),
        )
    )  # fmt: skip
    body = "".join(
        f"<tr><td>{escaped(row.attribute)}</td><td>{escaped(row.test)}</td>"
        f'<td class="number">{_value(row.statistic)}</td><td class="number">{_value(row.p_value)}</td>'
        f'<td>{escaped(row.unit)}</td><td class="long">{_parts(row.parts)}</td></tr>'
        for row in split.statistics
    )
    tried = f" The best of {split.tried:,} assignments." if split.tried else ""
    return (
        f"<h3>Balance between the parts</h3><p class='soft'>A small p says that the parts differ.{tried}</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _parts(parts: Mapping[str, Mapping[str, float]]) -> str:
    return "<br>".join(
        f"{escaped(name)}: {', '.join(f'{escaped(key)} {number(value)}' for key, value in held.items())}"
        for name, held in parts.items()
    )


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else escaped(value)


def record(about: Mapping[str, Any]) -> str:
    """What was used and left out, the settings, and where model and cells come from."""
    shown = {name: value for name, value in about.items() if value}
    counts = shown.pop("counts", {})
    listed = f"<h2>Used and left out</h2>{_counts(counts)}" if counts else ""
    pages = "".join(
        f"<details><summary>{escaped(name.capitalize())}</summary><pre>"
        f"{escaped(json.dumps(value, indent=2, default=str, ensure_ascii=False))}</pre></details>"
        for name, value in shown.items()
    )
    return listed + (f"<h2>How this was made</h2>{pages}" if pages else "")


def _counts(counts: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escaped(name.replace('_', ' '))}</dt><dd>{_told(value)}</dd>" for name, value in counts.items()
    )
    return f"<dl>{items}</dl>"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        held = [f"{escaped(name)}: {_told(each)}" for name, each in value.items() if each not in (0, None, "", [], {})]
        return "; ".join(held) or "none"
    if isinstance(value, list | tuple):
        named = ", ".join(escaped(each) for each in value[:MOST_GROUPS_NAMED])
        return named + (f" and {len(value) - MOST_GROUPS_NAMED:,} more" if len(value) > MOST_GROUPS_NAMED else "")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escaped(value)
