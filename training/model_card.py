"""The model card of a pretrained model: what it is, what it saw, what it scored, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genescale.ingestion.corpus import Corpus
from genescale.training.recipe import PretrainConfig

DATASETS_NAMED = 20


def pretraining_card(
    config: PretrainConfig,
    corpus: Corpus,
    outcome: Mapping[str, Any],
    *,
    plan: Mapping[str, Any],
    organisms: Sequence[str],
    code: Mapping[str, str],
) -> str:
    """Markdown. outcome: what the workers measured; plan: `RunPlan.to_dict`; organisms: those of the cells."""
    encoder, optimizer, vocabulary = config.encoder, config.optimizer, corpus.vocabulary
    lines = [
        f"# {config.model_name}",
        "",
        f"A masked-gene encoder: {encoder.layers} layers, {encoder.width} wide, {encoder.heads} heads, "
        f"{vocabulary.window:,} positions, {vocabulary.size:,} tokens. It reads a cell as its genes in falling order "
        "of rank value and finds the genes that were hidden.",
        "",
        "## Data",
        f"- Corpus `{corpus.uri}` at version {corpus.version}: {corpus.n_cells:,} cells, "
        f"{plan['trained_cells']:,} trained on.",
        f"- Datasets: {_named([record.dataset_id for record in corpus.datasets()])}.",
        f"- Vocabulary {vocabulary.name or 'without a name'}, digest `{vocabulary.digest}`.",
        "",
        "## Training",
        f"- {outcome['steps']:,} steps of {config.lanes} lanes with at most {config.token_budget:,} tokens each; "
        f"{config.mask_fraction:.0%} of the genes hidden; seed {config.seed}.",
        f"- AdamW, {optimizer.learning_rate:g} {optimizer.schedule}, {optimizer.precision}, "
        f"ZeRO stage {optimizer.zero_stage}.",
        f"- Recipe digest `{config.digest}`; Genescale {code.get('genescale_version', '?')}"
        + (f", commit `{code['git_commit']}`." if code.get("git_commit") else "."),
        f"- {outcome['tokens_per_s']:,.0f} tokens/s{_mfu(outcome)}.",
        "",
        "## Metrics",
        *_metrics(outcome, plan),
        "",
        "## Limits",
        *_limits(corpus, plan, organisms),
        "",
    ]
    return "\n".join(lines)


def _metrics(outcome: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    before, after = outcome.get("held_out_before"), outcome.get("held_out_after")
    if not before or not after:
        return ["- Not measured: the corpus is too small to hold cells back."]
    return [
        "| | held-out loss | masked genes found |",
        "|---|---|---|",
        f"| untrained | {before['loss']:.4f} | {before['masked_accuracy']:.1%} |",
        f"| trained | {after['loss']:.4f} | {after['masked_accuracy']:.1%} |",
        "",
        f"On {plan['held_out_cells_found']:,} cells that were never trained on, split by {plan['held_out_by']}, "
        "with 15 % of their genes hidden.",
    ]


def _limits(corpus: Corpus, plan: Mapping[str, Any], organisms: Sequence[str]) -> list[str]:
    limits = [
        f"- It knows the {corpus.vocabulary.size:,} tokens of its vocabulary and no other gene; cells are cut to "
        f"{corpus.vocabulary.window:,} tokens.",
        f"- It has seen {_named(organisms) if organisms else 'cells whose organism the corpus does not state'}; of "
        "others, and of tissues and assays absent from the corpus, nothing is known.",
        "- It ranks genes within a cell: what changes every gene alike is invisible to it.",
        "- Its embeddings and perturbation shifts are hypotheses for an experiment, not clinical evidence.",
    ]
    if plan["held_out_cells_found"] and plan["held_out_by"] != "donor":
        limits.append("- Held-out cells share donors with trained ones, so the metrics flatter it on new donors.")
    return limits


def _mfu(outcome: Mapping[str, Any]) -> str:
    return f", {outcome['mfu']:.1%} of the devices' peak (model FLOPs)" if outcome.get("mfu") else ""


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - DATASETS_NAMED} more" if len(names) > DATASETS_NAMED else ""
    return ", ".join(names[:DATASETS_NAMED]) + more
