"""The commands `embed`, `finetune` and `tune`, as a user types them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from genescale.ingestion.corpus import Corpus
from genescale.platform.bundle import Bundle
from genescale.platform.cli import main
from genescale.platform.settings import Settings
from genescale.platform.tracking import open_tracker
from genescale.training.embeddings import read_embeddings


@pytest.fixture
def settings_file(tmp_path: Path, settings_for: Callable[[Path], Settings]) -> tuple[Path, Settings]:
    settings = settings_for(tmp_path)
    path = tmp_path / "genescale.toml"
    path.write_text(
        f'[tracking]\nuri = "{settings.tracking.uri}"\nartifact_root = "{settings.tracking.artifact_root}"\n'
        "[cluster]\nnum_cpus = 2\nnum_gpus = 0\n",
        encoding="utf-8",
    )
    return path, settings


def test_embed_then_finetune_then_use_the_registered_classifier(
    ray_local: None,
    tiny_bundle: Bundle,
    tiny_corpus: Corpus,
    tmp_path: Path,
    settings_file: tuple[Path, Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, settings = settings_file
    corpus, embeddings = f"{tiny_corpus.uri}@{tiny_corpus.version}", str(tmp_path / "embeddings")
    shared = ["--corpus", corpus, "--settings", str(path)]
    assert main(["embed", str(tiny_bundle.folder), *shared, "--output", embeddings, "--actors", "1"]) == 0
    assert f"{tiny_corpus.n_cells:,} (0 were there already)" in capsys.readouterr().out
    assert read_embeddings(embeddings, tiny_corpus.store)[0].num_rows == tiny_corpus.n_cells
    options = ["--label", "cell_type", "--group", "donor_id", "--embeddings", embeddings, "--set", "epochs=3"]
    names = ["--name", "cell-types", "--alias", "champion", "--output", str(tmp_path / "classifier")]
    assert main(["finetune", str(tiny_bundle.folder), *shared, *options, *names]) == 0
    shown = capsys.readouterr().out
    assert "Macro F1" in shown
    assert "no cell_type" in shown
    version = open_tracker(settings).resolve("models:/cell-types@champion")
    assert version.tags["kind"] == "cell_classifier"
    # A classifier is a model too: its encoder embeds.
    assert main(["embed", "models:/cell-types@champion", *shared, "--output", str(tmp_path / "again")]) == 0


def test_a_sweep_prints_its_trials(
    ray_local: None,
    tiny_bundle: Bundle,
    tiny_corpus: Corpus,
    tmp_path: Path,
    settings_file: tuple[Path, Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = tmp_path / "sweep.toml"
    spec.write_text(
        "[search]\nlearning_rate = { low = 1e-3, high = 1e-1, log = true }\n"
        "[finetune]\nepochs = 2\n[sweep]\ntrials = 2\n",
        encoding="utf-8",
    )
    arguments = ["--model", str(tiny_bundle.folder), "--corpus", tiny_corpus.uri, "--settings", str(settings_file[0])]
    assert main(["tune", str(spec), *arguments, "--output", str(tmp_path / "sweep")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("learning_rate=") == 2
    assert (tmp_path / "sweep" / "bundle" / "bundle.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "epochs"], "not KEY=VALUE"),
        (["--set", "epoch=3"], "Did you mean 'epochs'"),
        (["--set", "epochs=0"], "too small"),
        (["--frozen-layers", "1"], "frozen already"),
        (["--label", "cell_typ"], "cell_type"),
    ],
)
def test_mistakes_end_with_a_message_and_status_2(
    tiny_bundle: Bundle,
    tiny_corpus: Corpus,
    tmp_path: Path,
    settings_file: tuple[Path, Settings],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    shared = ["--corpus", tiny_corpus.uri, "--settings", str(settings_file[0]), "--output", str(tmp_path / "out")]
    assert main(["finetune", str(tiny_bundle.folder), *shared, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
