"""Checkpoints of `transformers` come in and go out again, and answer the same on both sides."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genescale.platform.bundle import Bundle, write_bundle
from genescale.platform.cli import main
from genescale.platform.errors import AlreadyExistsError, InputError, IntegrityError, VocabularyError
from genescale.platform.vocabulary import Vocabulary
from genescale.training.embedder import Embedder
from genescale.training.heads.head import Head, LinearHead, NearestHead
from genescale.training.heads.head_files import head_files
from genescale.training.heads.predict import load_heads
from genescale.training.heads.spec import HeadSpec, bundle_kind
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
    (predicted,) = load_heads(bundle, device="cpu").predict_cells(cells)
    assert predicted.classes == CLASSES
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
    answers = load_heads(bundle, device="cpu").predict_genes(tiny_cells[1:2])
    assert answers.spec.classes == CLASSES
    with torch.no_grad():
        logits_tc = theirs(torch.from_numpy(tiny_cells[1].astype(np.int64))[None]).logits[0]
    rows = [tiny_cells[1].tolist().index(token) for token in answers.tokens_g.tolist()]
    np.testing.assert_allclose(answers.probabilities_gc, torch.softmax(logits_tc, 1).numpy()[rows], atol=1e-5)
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


def with_heads(folder: Path, base: Bundle, *heads: Head) -> Bundle:
    """A bundle of the encoder of `base` and these heads."""
    return write_bundle(
        folder,
        kind=bundle_kind([head.spec for head in heads]),
        config=base.config,
        weights=base.weights(),
        vocabulary=base.vocabulary,
        lineage={},
        extra=head_files(heads),
    )


def random_head(vectors_nd: np.ndarray, **values: Any) -> LinearHead:
    """A head of width 32 that standardises as if it had been fitted on these vectors."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        head = LinearHead(HeadSpec(**{"classes": CLASSES, "label": "x", "width": 32, "pooling": "cls", **values}))
    head.standardise(vectors_nd)
    return head.eval()


@pytest.mark.parametrize("layer", ["last", "second_to_last"])
def test_our_heads_answer_the_same_in_transformers(
    tmp_path: Path, tiny_bundle: Bundle, tiny_cells: list[np.ndarray], layer: Any
) -> None:
    """Standardisation is folded in, and a head on the second-to-last layer goes out on a shorter encoder."""
    vectors_nd = Embedder.load(tiny_bundle, device="cpu").embed_cells(tiny_cells, layer=layer, pooling="cls")
    tokens = torch.from_numpy(tiny_cells[1].astype(np.int64))[None]
    form = {"layer": layer, "hidden": 32, "activation": "tanh"}
    classes = with_heads(tmp_path / "a", tiny_bundle, random_head(vectors_nd, **form))
    assert export_checkpoint(classes, tmp_path / "classes") == "BertForSequenceClassification"
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "classes").eval()
    ours = load_heads(classes, device="cpu").predict_cells(tiny_cells[1:2])[0].probabilities_nc
    assert np.ptp(ours) > 0.01
    np.testing.assert_allclose(torch.softmax(theirs(tokens).logits, 1).detach().numpy(), ours, atol=1e-5)

    head = random_head(vectors_nd, **form, classes=(), kind="number")
    head.standardise_target(np.array([20.0, 50.0, 90.0]))
    number = with_heads(tmp_path / "b", tiny_bundle, head)
    assert export_checkpoint(number, tmp_path / "number") == "BertForSequenceClassification"
    theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "number").eval()
    ours = load_heads(number, device="cpu").predict_cells(tiny_cells[1:2])[0].numbers_n
    np.testing.assert_allclose(theirs(tokens).logits.detach().numpy()[:, 0], ours, rtol=1e-4)
    back = import_checkpoint(tmp_path / "number", tiny_bundle.vocabulary, tmp_path / "back")
    np.testing.assert_allclose(load_heads(back).predict_cells(tiny_cells[1:2])[0].numbers_n, ours, rtol=1e-4)

    genes = with_heads(tmp_path / "c", tiny_bundle, random_head(vectors_nd, layer=layer, kind="gene_classes"))
    assert export_checkpoint(genes, tmp_path / "genes") == "BertForTokenClassification"
    theirs = transformers.BertForTokenClassification.from_pretrained(tmp_path / "genes").eval()
    answers = load_heads(genes, device="cpu").predict_genes(tiny_cells[1:2])
    rows = [tiny_cells[1].tolist().index(token) for token in answers.tokens_g.tolist()]
    expected = torch.softmax(theirs(tokens).logits[0], 1).detach().numpy()[rows]
    np.testing.assert_allclose(answers.probabilities_gc, expected, atol=1e-5)


def test_heads_without_a_counterpart_say_what_would_fit(tmp_path: Path, tiny_bundle: Bundle) -> None:
    vectors_nd = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    nearest = NearestHead(HeadSpec(classes=CLASSES, label="x", width=32, layer="last", pooling="cls", type="nearest"))
    nearest.remember(vectors_nd, np.arange(9) % 3)
    one = random_head(vectors_nd, layer="last", hidden=32, activation="tanh")
    refused: dict[str, tuple[list[Head], str]] = {
        "means": ([random_head(vectors_nd, layer="last", pooling="mean_genes")], "hidden = 32, activation = 'tanh'"),
        "deep": ([random_head(vectors_nd, layer="last", kind="gene_classes", hidden=8)], "hidden = 0"),
        "votes": ([nearest], "head = 'linear'"),
        "two": ([one, one], "one target"),
    }
    for name, (heads, fix) in refused.items():
        bundle = with_heads(tmp_path / name, tiny_bundle, *heads)
        with pytest.raises(InputError, match=r"no counterpart.*--encoder") as caught:
            export_checkpoint(bundle, tmp_path / "out")
        assert fix in str(caught.value)
        assert not (tmp_path / "out").exists()
    assert export_checkpoint(bundle, tmp_path / "out", encoder_only=True) == "BertForMaskedLM"
    with pytest.raises(AlreadyExistsError):
        export_checkpoint(tiny_bundle, tmp_path / "out")


@pytest.mark.shared
@pytest.mark.parametrize(
    ("layout", "token_dictionary"), [("V1", "gc30M"), pytest.param("V2", "gc104M", marks=pytest.mark.slow)]
)
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
