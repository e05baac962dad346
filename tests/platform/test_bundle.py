"""A bundle is opened only when every byte is what was recorded, and it never runs code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from genescale.platform.bundle import Bundle, adopt_checkpoint, open_bundle, write_bundle
from genescale.platform.errors import (
    AlreadyExistsError,
    ForbiddenPathError,
    GenescaleError,
    InputError,
    IntegrityError,
    NotFoundError,
    VocabularyError,
)
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store
from genescale.platform.vocabulary import Vocabulary, read_vocabulary

EMBEDDING = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.build([f"ENSG{i:011d}" for i in range(20)], np.linspace(1, 2, 20), name="tiny")


@pytest.fixture
def parts(vocabulary: Vocabulary) -> dict[str, Any]:
    """Arguments of write_bundle for a small model."""
    return {
        "kind": "masked_gene_model",
        "config": {"model_type": "bert", "vocab_size": vocabulary.size, "hidden_size": 4},
        "weights": {
            EMBEDDING: np.arange(vocabulary.size * 4, dtype=np.float32).reshape(vocabulary.size, 4),
            "cls.predictions.bias": np.zeros(vocabulary.size, dtype=np.float16),
        },
        "vocabulary": vocabulary,
        "lineage": {"corpus_version": 3, "git_commit": "abc", "nested": {"seeds": [1, 2]}},
    }


@pytest.fixture
def bundle(tmp_path: Path, parts: dict[str, Any]) -> Bundle:
    extra = {"head.json": b'{"classes": ["B", "T"]}', "head.safetensors": {"w": np.eye(2, 4, dtype=np.float32)}}
    return write_bundle(tmp_path / "bundle", **parts, extra=extra)


def test_what_is_written_is_read_back(bundle: Bundle, parts: dict[str, Any]) -> None:
    again = open_bundle(bundle.folder)
    assert again == bundle
    assert (again.kind, again.config, again.lineage) == (parts["kind"], parts["config"], parts["lineage"])
    assert again.vocabulary == parts["vocabulary"]
    weights = again.weights()
    assert weights.keys() == parts["weights"].keys()
    for name, values in parts["weights"].items():
        assert weights[name].dtype == values.dtype
        assert np.array_equal(weights[name], values)
    assert json.loads(again.read("head.json")) == {"classes": ["B", "T"]}
    assert np.array_equal(again.tensors("head.safetensors")["w"], np.eye(2, 4))
    with pytest.raises(NotFoundError, match=r"no file 'other'.*head\.json"):
        again.read("other")


def test_views_of_arrays_are_stored_as_they_look(tmp_path: Path, parts: dict[str, Any]) -> None:
    view = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    stored = write_bundle(tmp_path / "b", **{**parts, "weights": {**parts["weights"], "view": view}})
    assert np.array_equal(stored.weights()["view"], view)


def test_the_digest_says_what_the_model_is(tmp_path: Path, parts: dict[str, Any], vocabulary: Vocabulary) -> None:
    def digest(name: str, **changes: Any) -> str:
        return write_bundle(tmp_path / name, **{**parts, **changes}).digest

    first = digest("a")
    assert digest("again") == first
    assert digest("lineage", lineage={"run_id": "another"}) == first
    assert digest("order", weights=dict(reversed(parts["weights"].items()))) == first
    weights = {**parts["weights"], EMBEDDING: parts["weights"][EMBEDDING] + 1}
    other = Vocabulary.build(vocabulary.gene_ids, vocabulary.medians * 2, name="tiny")
    changed = {
        digest("kind", kind="cell_classifier"),
        digest("config", config={**parts["config"], "hidden_size": 5}),
        digest("weights", weights=weights),
        digest("vocabulary", vocabulary=other),
        digest("extra", extra={"head.json": b"{}"}),
    }
    assert len(changed) == 5
    assert first not in changed


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "vocabulary.parquet", "head.json", "head.safetensors"]
)
def test_a_changed_file_is_named(bundle: Bundle, name: str) -> None:
    for change in (_flip_last_byte, lambda path: path.write_bytes(b"garbage"), Path.unlink):
        shutil.copytree(bundle.folder, copy := bundle.folder.with_name(f"copy-{change.__name__}"))
        change(copy / name)
        with pytest.raises(IntegrityError) as raised:
            open_bundle(copy)
        assert name in raised.value.where
        # Not even a parser's complaint: the digest is looked at first.
        assert "JSON" not in str(raised.value)


def test_a_file_that_changes_after_opening_is_not_read(bundle: Bundle) -> None:
    _flip_last_byte(bundle.folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        bundle.weights()


def test_files_that_are_not_listed_are_refused(bundle: Bundle) -> None:
    (bundle.folder / "deep").mkdir()
    (bundle.folder / "deep/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"deep/pytorch_model\.bin.*does not belong"):
        open_bundle(bundle.folder)


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "bundle.json").read_text())
        change(manifest)
        (folder / "bundle.json").write_text(json.dumps(manifest))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        _edit(lambda m: m["lineage"].update(corpus_version=4)),
        _edit(lambda m: m.update(kind="cell_classifier")),
        _edit(lambda m: m.update(kind="pickle")),
        _edit(lambda m: m.update(digest="0" * 64)),
        _edit(lambda m: m.pop("seal")),
        _edit(lambda m: m.update(files=[])),
        _edit(lambda m: m["files"]["config.json"].update(sha256="0" * 64)),
        _edit(lambda m: m["files"].update({"../outside": m["files"]["config.json"]})),
        lambda folder: (folder / "bundle.json").write_text("{"),
        lambda folder: (folder / "bundle.json").write_text("[" * 100_000),
        lambda folder: (folder / "bundle.json").write_text("[]"),
        lambda folder: (folder / "bundle.json").write_bytes(b" " * (5 << 20)),
    ],
)
def test_a_damaged_manifest_is_refused(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    damage(bundle.folder)
    with pytest.raises(GenescaleError, match=r"bundle\.json|schema version"):
        open_bundle(bundle.folder)


def _resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who can compute digests."""
    import hashlib

    def canonical(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def edit(manifest: dict[str, Any]) -> None:
        change(manifest)
        digests = {name: record["sha256"] for name, record in manifest["files"].items()}
        manifest["digest"] = canonical({"kind": manifest["kind"], "files": digests})
        manifest["seal"] = canonical({key: value for key, value in manifest.items() if key != "seal"})

    _edit(edit)(folder)


def test_a_manifest_cannot_lead_out_of_the_folder(bundle: Bundle) -> None:
    (bundle.folder.parent / "secret").write_bytes((bundle.folder / "config.json").read_bytes())
    record = json.loads((bundle.folder / "bundle.json").read_text())["files"]["config.json"]
    for name in ("../secret", str(bundle.folder.parent / "secret"), "a/../../secret", "%2e%2e/secret"):
        shutil.copytree(bundle.folder, copy := bundle.folder.with_name("copy"))
        _resealed(copy, lambda manifest, name=name: manifest["files"].update({name: record}))  # type: ignore[misc]
        with pytest.raises(IntegrityError, match="leaves the folder"):
            open_bundle(copy)
        shutil.rmtree(copy)
    (bundle.folder / "config.json").unlink()
    (bundle.folder / "config.json").symlink_to(bundle.folder.parent / "secret")
    with pytest.raises(IntegrityError, match=r"config\.json: is a link"):
        open_bundle(bundle.folder)


def test_other_schema_versions_say_so(bundle: Bundle) -> None:
    _resealed(bundle.folder, lambda manifest: manifest.update(schema_version=2))
    with pytest.raises(InputError, match="schema version 2, this Genescale reads 1"):
        open_bundle(bundle.folder)


def test_a_pickle_in_place_of_weights_is_not_run(bundle: Bundle) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(bundle.folder.parent / "ran"),))

    data = pickle.dumps(Bomb())
    (bundle.folder / "model.safetensors").write_bytes(data)
    import hashlib

    record = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    _resealed(bundle.folder, lambda manifest: manifest["files"].update({"model.safetensors": record}))
    with pytest.raises(IntegrityError, match="safetensors"):
        open_bundle(bundle.folder).weights()
    assert not (bundle.folder.parent / "ran").exists()


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no bundle\.json"):
        open_bundle(tmp_path)
    with pytest.raises(NotFoundError):
        open_bundle(tmp_path / "none")


def test_writing_again_is_safe(bundle: Bundle, parts: dict[str, Any], tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "b", **parts)
    assert write_bundle(tmp_path / "b", **{**parts, "lineage": {}}).lineage == first.lineage
    with pytest.raises(AlreadyExistsError, match="something else"):
        write_bundle(tmp_path / "b", **{**parts, "kind": "cell_classifier"})
    assert open_bundle(tmp_path / "b") == first
    (tmp_path / "c").mkdir()
    write_bundle(tmp_path / "c", **parts)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/notes.txt").write_text("mine")
    with pytest.raises(AlreadyExistsError):
        write_bundle(tmp_path / "d", **parts)


def test_of_two_writers_at_once_the_second_finds_the_bundle(
    tmp_path: Path, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, first = Path.replace, list[Bundle]()

    def replace(part: Path, target: Path) -> None:
        if target == folder and not first:
            first.append(NotImplemented)
            first[0] = write_bundle(folder, **rivals)
        replaced(part, target)

    monkeypatch.setattr(Path, "replace", replace)
    folder, rivals = tmp_path / "same", {**parts, "lineage": {"whose": "the first writer's"}}
    assert write_bundle(folder, **parts).lineage == first[0].lineage
    first.clear()
    folder, rivals = tmp_path / "other", {**parts, "kind": "cell_classifier"}
    with pytest.raises(AlreadyExistsError, match="something else"):
        write_bundle(folder, **parts)
    assert open_bundle(folder) == first[0]
    assert sorted(os.listdir(tmp_path)) == ["other", "same"]


def test_a_bundle_appears_whole(tmp_path: Path, parts: dict[str, Any]) -> None:
    folder, done, seen = tmp_path / "b", threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            if folder.exists():
                seen.append(sorted(os.listdir(folder)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    extra = {f"extra-{i}": b"x" for i in range(30)}
    write_bundle(folder, **parts, extra=extra)
    done.set()
    watcher.join()
    assert all(names == sorted(os.listdir(folder)) for names in seen)
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "something"}, InputError),
        ({"lineage": {"when": object()}}, InputError),
        ({"lineage": {"loss": float("nan")}}, InputError),
        ({"config": {"vocab_size": 5}}, VocabularyError),
        ({"config": {}}, VocabularyError),
        ({"weights": {EMBEDDING: np.zeros((5, 4), np.float32)}}, VocabularyError),
        ({"weights": {"names": np.array(["a"])}}, InputError),
        ({"extra": {"config.json": b""}}, InputError),
        ({"extra": {"../a": b""}}, ForbiddenPathError),
    ],
)
def test_parts_that_do_not_fit_leave_nothing(
    tmp_path: Path, parts: dict[str, Any], changes: dict[str, Any], error: type[GenescaleError]
) -> None:
    with pytest.raises(error):
        write_bundle(tmp_path / "b", **{**parts, **changes})
    assert not list(tmp_path.iterdir())


def test_bundles_travel_between_processes(bundle: Bundle) -> None:
    again = pickle.loads(pickle.dumps(bundle))
    assert again == bundle
    assert again.weights().keys() == bundle.weights().keys()


# --- published checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.parametrize(("layout", "release"), [("V1", "gc30M"), ("V2", "gc104M")])
def test_a_published_folder_becomes_a_bundle(shared_data: Path, tmp_path: Path, layout: str, release: str) -> None:
    tokens = shared_data / f"vocabularies/token_dictionary_{release}.pkl"
    published = read_vocabulary(str(tokens), Store(StorageSettings()))
    folder = shared_data / f"golden/forward_{layout}/model"
    adopted = adopt_checkpoint(folder, published, tmp_path / "bundle")
    expected = safetensors.numpy.load_file(folder / "model.safetensors")
    weights = open_bundle(tmp_path / "bundle").weights()
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert adopted.config == json.loads((folder / "config.json").read_text())
    assert adopted.kind == "masked_gene_model"
    assert adopted.lineage["vocabulary_digest"] == published.digest


def _checkpoint(folder: Path, vocabulary: Vocabulary, **changes: Any) -> Path:
    config = {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": vocabulary.size,
        "max_position_embeddings": vocabulary.window,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    weights = {EMBEDDING: np.zeros((vocabulary.size, 4), np.float32)}
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def test_other_checkpoints_are_explained(tmp_path: Path, vocabulary: Vocabulary) -> None:
    classifier = _checkpoint(tmp_path / "a", vocabulary, architectures=["BertForSequenceClassification"])
    with pytest.raises(InputError, match="BertForSequenceClassification"):
        adopt_checkpoint(classifier, vocabulary, tmp_path / "out")
    short = _checkpoint(tmp_path / "b", vocabulary, max_position_embeddings=vocabulary.window - 1)
    with pytest.raises(VocabularyError, match="positions"):
        adopt_checkpoint(short, vocabulary, tmp_path / "out")
    other = _checkpoint(tmp_path / "c", vocabulary, vocab_size=vocabulary.size + 1)
    with pytest.raises(VocabularyError, match="rows"):
        adopt_checkpoint(other, vocabulary, tmp_path / "out")
    pickled = _checkpoint(tmp_path / "d", vocabulary)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="save_pretrained"):
        adopt_checkpoint(pickled, vocabulary, tmp_path / "out")
    assert not (tmp_path / "out").exists()
