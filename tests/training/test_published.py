"""Checkpoints of `transformers` come in and go out again, and answer the same on both sides."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.platform.cli import main
from genescale.platform.errors import AlreadyExistsError, InputError, IntegrityError, VocabularyError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder
from genescale.training.heads.cell_classes import load_classifier
from genescale.training.model import pack
from genescale.training.published import export_checkpoint, import_checkpoint
from genescale.training.weights import load_model

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
CLASSES = ("b_cell", "monocyte", "t_cell")


def checkpoint(folder: Path, vocabulary: Vocabulary, architecture: str, *, pickled: bool = False, **more: Any) -> Any:
    """A random model saved as `transformers` saves it."""
    config = transformers.BertConfig(
        vocab_size=vocabulary.size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_act="relu",
        max_position_embeddings=vocabulary.window,
        initializer_range=0.2,
        layer_norm_eps=1e-12,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("framed", [True, False])
def test_masked_language_models_come_in_and_go_out(
    tmp_path: Path,
    tiny_vocabulary: Vocabulary,
    bare_vocabulary: Vocabulary,
    tiny_cells: list[np.ndarray],
    framed: bool,
    pickled: bool,
) -> None:
    vocabulary = tiny_vocabulary if framed else bare_vocabulary
    theirs = checkpoint(tmp_path / "theirs", vocabulary, "BertForMaskedLM", pickled=pickled)
    bundle = import_checkpoint(tmp_path / "theirs", vocabulary, tmp_path / "bundle")
    assert bundle.kind == "masked_gene_model"
    assert bundle.vocabulary == vocabulary
    assert not list(bundle.folder.glob("*.bin"))
    cell = tiny_cells[2][1:-1]
    batch = pack([cell])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(cell.astype(np.int64))[None]).logits[0]
        found = load_model(bundle)(batch, torch.arange(len(cell)))
        assert torch.allclose(found, expected, atol=1e-5)
        assert export_checkpoint(bundle, tmp_path / "out") == "BertForMaskedLM"
        back = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(back(torch.from_numpy(cell.astype(np.int64))[None]).logits[0], expected, atol=1e-5)
    # Both forms of the weights are one model.
    assert import_checkpoint(tmp_path / "out", vocabulary, tmp_path / "again").digest == bundle.digest


@pytest.mark.parametrize("framed", [True, False])
def test_cell_classifiers_come_in_and_go_out(
    tmp_path: Path,
    tiny_vocabulary: Vocabulary,
    bare_vocabulary: Vocabulary,
    tiny_cells: list[np.ndarray],
    framed: bool,
) -> None:
    vocabulary = tiny_vocabulary if framed else bare_vocabulary
    cells = tiny_cells if framed else [(cell[1:-1] - 2).astype(np.uint16) for cell in tiny_cells]
    theirs = checkpoint(tmp_path / "theirs", vocabulary, "BertForSequenceClassification", **labels())
    bundle = import_checkpoint(tmp_path / "theirs", vocabulary, tmp_path / "bundle")
    classifier = load_classifier(bundle, device="cpu")
    assert classifier.classes == CLASSES
    predicted = classifier.predict(cells)
    assert export_checkpoint(bundle, tmp_path / "out") == "BertForSequenceClassification"
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert tuple(back.config.id2label[i] for i in range(3)) == CLASSES
    for number, cell in enumerate(cells):
        tokens = torch.from_numpy(cell.astype(np.int64))[None]
        with torch.no_grad():
            expected = torch.softmax(theirs(tokens).logits[0], 0).numpy()
            returned = torch.softmax(back(tokens).logits[0], 0).numpy()
        np.testing.assert_allclose(predicted.probabilities_nc[number], expected, atol=1e-5)
        np.testing.assert_allclose(returned, expected, atol=1e-5)
    assert export_checkpoint(bundle, tmp_path / "encoder", encoder_only=True) == "BertModel"
    encoder = transformers.BertModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False).eval()
    tokens = torch.from_numpy(cells[1].astype(np.int64))[None]
    with torch.no_grad():
        assert torch.allclose(encoder(tokens).last_hidden_state, theirs.bert(tokens).last_hidden_state, atol=1e-5)


def test_gene_classifiers_come_in_and_go_out(
    tmp_path: Path, tiny_vocabulary: Vocabulary, tiny_cells: list[np.ndarray]
) -> None:
    theirs = checkpoint(tmp_path / "theirs", tiny_vocabulary, "BertForTokenClassification", pickled=True, **labels())
    bundle = import_checkpoint(tmp_path / "theirs", tiny_vocabulary, tmp_path / "bundle")
    assert bundle.kind == "gene_classifier"
    assert json.loads(bundle.read("head.json"))["classes"] == list(CLASSES)
    # The encoder serves as any other.
    assert Embedder.load(bundle, device="cpu").embed_cells(tiny_cells[:2]).shape == (2, 32)
    assert export_checkpoint(bundle, tmp_path / "out") == "BertForTokenClassification"
    back = transformers.BertForTokenClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.from_numpy(tiny_cells[1].astype(np.int64))[None]
    with torch.no_grad():
        assert torch.allclose(back(tokens).logits, theirs(tokens).logits, atol=1e-5)


def test_weights_in_parts_are_put_together(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    model = checkpoint(tmp_path / "whole", tiny_vocabulary, "BertForMaskedLM")
    model.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole = import_checkpoint(tmp_path / "whole", tiny_vocabulary, tmp_path / "a")
    assert import_checkpoint(tmp_path / "parts", tiny_vocabulary, tmp_path / "b").digest == whole.digest
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="is not there"):
        import_checkpoint(tmp_path / "parts", tiny_vocabulary, tmp_path / "c")


class Trap:
    """What a pickle could do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    checkpoint(tmp_path / "theirs", tiny_vocabulary, "BertForMaskedLM", pickled=True)
    torch.save({"weight": Trap(tmp_path / "sprung")}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="weights alone"):
        import_checkpoint(tmp_path / "theirs", tiny_vocabulary, tmp_path / "bundle")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "bundle").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, tiny_vocabulary: Vocabulary, bare_vocabulary: Vocabulary) -> None:
    folder = tmp_path / "theirs"
    checkpoint(folder, tiny_vocabulary, "BertForMaskedLM")
    with pytest.raises(VocabularyError, match="204 tokens"):
        import_checkpoint(folder, bare_vocabulary, tmp_path / "out")
    with pytest.raises(InputError, match=r"no config\.json"):
        import_checkpoint(tmp_path, tiny_vocabulary, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    for changed, error, message in (
        ({"architectures": ["GPT2LMHeadModel"]}, InputError, "cannot be imported"),
        ({"hidden_act": "gelu"}, InputError, "hidden_act"),
        ({"num_hidden_layers": 3}, IntegrityError, "missing"),
        ({"intermediate_size": 32}, IntegrityError, "shape"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(error, match=message):
            import_checkpoint(folder, tiny_vocabulary, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(config))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match="weights alone"):
        import_checkpoint(folder, tiny_vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_without_a_counterpart_says_so(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    from genescale.platform.bundle import write_bundle
    from genescale.training.heads.cell_classes import CellClassHead, HeadSpec

    checkpoint(tmp_path / "theirs", tiny_vocabulary, "BertForMaskedLM")
    base = import_checkpoint(tmp_path / "theirs", tiny_vocabulary, tmp_path / "base")
    spec = HeadSpec(classes=CLASSES, label="cell_type", width=32, layer="last", pooling="mean_genes")
    ours = write_bundle(
        tmp_path / "ours",
        kind="cell_classifier",
        config=base.config,
        weights=base.weights(),
        vocabulary=tiny_vocabulary,
        lineage={},
        extra=CellClassHead(spec).to_files(),
    )
    with pytest.raises(InputError, match=r"no counterpart.*--encoder"):
        export_checkpoint(ours, tmp_path / "out")
    assert export_checkpoint(ours, tmp_path / "out", encoder_only=True) == "BertForMaskedLM"
    with pytest.raises(AlreadyExistsError):
        export_checkpoint(base, tmp_path / "out")


@pytest.mark.shared
@pytest.mark.parametrize(("layout", "token_dictionary"), [("V1", "gc30M"), ("V2", "gc104M")])
def test_the_command_takes_published_models_in_shows_promotes_and_gives_them_back(
    shared_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    token_dictionary: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shared_data / "golden" / f"forward_{layout}" / "model"
    vocabulary = shared_data / "vocabularies" / f"token_dictionary_{token_dictionary}.pkl"
    assert main(["models", "list"]) == 0
    assert "no model is registered yet" in capsys.readouterr().out
    assert main(["models", "import", str(source), "--name", "published"]) == 2
    assert "--vocabulary" in capsys.readouterr().err
    command = ["models", "import", str(source), "--name", "published", "--vocabulary", str(vocabulary)]
    assert main([*command, "--alias", "newest"]) == 0
    assert main(command) == 0
    assert capsys.readouterr().out.count("models:/published/1") == 2
    assert main(["models", "promote", "published", "1", "champion"]) == 0
    assert main(["models", "promote", "published", "7", "champion"]) == 2
    capsys.readouterr()
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "published", "aliases": {"champion": "1", "newest": "1"}, "newest": "1"}
    ]
    assert main(["models", "show", "published"]) == 0
    assert "@champion, @newest" in capsys.readouterr().out
    assert main(["models", "show", "published@champion"]) == 0
    assert "masked_gene_model" in capsys.readouterr().out
    assert main(["models", "export", "published@champion", "exported"]) == 0
    back = transformers.BertForMaskedLM.from_pretrained("exported").eval()
    theirs = transformers.BertForMaskedLM.from_pretrained(source).eval()
    tokens = torch.tensor([[5, 9, 100, 2_000, 17]])
    with torch.no_grad():
        assert torch.allclose(back(tokens).logits, theirs(tokens).logits, atol=1e-5)
    # What was exported brings its vocabulary along.
    assert main(["models", "import", "exported", "--name", "published"]) == 0
    assert "models:/published/1" in capsys.readouterr().out
