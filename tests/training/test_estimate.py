"""What a run will take, told before it starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.errors import SettingsError
from genescale.training.batches import step_batches
from genescale.training.cells import CorpusCells
from genescale.training.commands import pretrain
from genescale.training.engine import OptimizerConfig
from genescale.training.estimate import estimate, memory_bytes
from genescale.training.loop import RunPlan
from genescale.training.model import new_model
from genescale.training.recipe import EncoderShape, PretrainConfig

CONFIG = PretrainConfig(
    encoder=EncoderShape(width=32, layers=2, heads=2, feed_forward=64),
    optimizer=OptimizerConfig(zero_stage=2),
    epochs=2,
    token_budget=256,
    lanes=4,
    held_out_cells=24,
)


@pytest.mark.parametrize("steps", [0, 5, 9])
def test_steps_and_tokens_are_those_of_the_run(tiny_corpus: Corpus, steps: int) -> None:
    config, source = dataclasses.replace(CONFIG, steps=steps), CorpusCells(tiny_corpus)
    found = estimate(config, source, workers=2)
    plan = RunPlan.of(config, source)
    batches = list(step_batches(source, plan.training, plan.masking, rank=0, workers=1, first=0, last=plan.total_steps))
    assert found.steps == len(batches) == (steps or plan.training.n_steps(2))
    assert found.tokens == sum(batch.tokens for batch in batches)
    assert found.cells == len(plan.training.cells)
    assert (found.held_out_cells, found.held_out_by) == (24, "donor")
    assert found.epochs == pytest.approx(2.0) if not steps else found.epochs < 2
    assert 0.5 < found.fill <= 1
    model = new_model(CONFIG.encoder.for_vocabulary(source.vocabulary), seed=0)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.checkpoint_bytes == 12 * found.parameters


def test_time_rests_on_the_measured_speed_and_the_workers(tiny_corpus: Corpus) -> None:
    found = estimate(CONFIG, CorpusCells(tiny_corpus), workers=4)
    speed = found.measured
    assert speed.tokens > 0
    assert 0 < speed.mfu < 5
    assert found.hours * 3600 == pytest.approx(found.tokens / (4 * speed.tokens / speed.seconds))


def test_memory_falls_with_the_stage_and_with_workers(tiny_corpus: Corpus) -> None:
    encoder = CONFIG.encoder.for_vocabulary(tiny_corpus.vocabulary)
    many = [memory_bytes(CONFIG, encoder, 10**9, 64, stage) for stage in (0, 1, 2, 3)]
    assert many == sorted(many, reverse=True)
    activations = memory_bytes(CONFIG, encoder, 0, 64, 0)
    # The ZeRO formula at 64 workers: 16, 8 + 12/64, 4 + 16/64 and 20/64 bytes for each parameter.
    np.testing.assert_allclose((np.array(many) - activations) / 1e9, [16, 8.1875, 4.25, 0.3125])
    half = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(precision="bf16"))
    assert memory_bytes(half, encoder, 0, 64, 0) < activations


def test_workers_that_do_not_divide_the_lanes_are_refused(tiny_corpus: Corpus) -> None:
    with pytest.raises(SettingsError, match="4 lanes"):
        estimate(CONFIG, CorpusCells(tiny_corpus), workers=3)


def test_the_dry_run_prints_it_and_leaves_nothing(
    tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["tiny", "--corpus", f"{tiny_corpus.uri}@{tiny_corpus.version}", "--workers", "2", "--dry-run"]
    assert pretrain([*command, "--name", "planned"]) == 0
    text = capsys.readouterr().out
    for told in ("planned", "30, which are", "ZeRO 3", "tokens/s", "2 such devices", "held out by donor"):
        assert told in text, text
    assert pretrain([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["steps"] == 30
    assert sorted(values["memory_bytes"]) == ["0", "1", "2", "3"]
    assert values["measured"]["tokens_per_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "a recipe and a corpus"),
        (["tiny", "--resume", "run"], "--resume takes recipe"),
        (["--resume", "run"], "no run 'run'"),
    ],
)
def test_what_to_run_must_be_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    from genescale.platform.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", *options]) == 2
    assert message in capsys.readouterr().err
