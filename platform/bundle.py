"""A model as files: the one border between training and whoever uses the model.

    config.json, model.safetensors   in the layout of Hugging Face's BertForMaskedLM
    vocabulary.parquet               genes, token ids, medians
    …                                what the kind needs besides, such as head.json and head.safetensors
    bundle.json                      kind, lineage, and size and sha256 of every other file; written last

Every file is checked against `bundle.json` before any of them is parsed, and no file is a pickle.

The **digest** of a bundle is the sha256 of its kind and its files' digests as canonical JSON. It says what the model
*is*: a training repeated bit by bit gives the same digest at any time, in any folder, under any run id. The lineage
says where the model came from and is not part of it. A **seal** over all of `bundle.json` finds a damaged lineage; who
must rely on more compares the digest with the one recorded elsewhere, as `tracking.fetch_bundle` does.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from genescale.platform.address import join
from genescale.platform.disk import whole_file
from genescale.platform.errors import (
    AlreadyExistsError,
    ForbiddenPathError,
    InputError,
    IntegrityError,
    NotFoundError,
    VocabularyError,
)
from genescale.platform.vocabulary import Vocabulary

SCHEMA_VERSION = 1
KINDS = ("masked_gene_model", "cell_classifier", "gene_classifier", "cell_regressor", "multi_task")
MANIFEST, CONFIG, WEIGHTS, VOCABULARY = "bundle.json", "config.json", "model.safetensors", "vocabulary.parquet"
REQUIRED = (CONFIG, WEIGHTS, VOCABULARY)
MANIFEST_MAX_BYTES = 4 * 1024 * 1024
EMBEDDING = "bert.embeddings.word_embeddings.weight"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and digest that `bundle.json` states for one file."""

    sha256: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """A verified model on local disk; made by `open_bundle` and `write_bundle`, equal by digest."""

    folder: Path
    kind: str
    config: dict[str, Any]
    vocabulary: Vocabulary
    lineage: dict[str, Any]
    digest: str
    files: dict[str, FileRecord]

    def read(self, name: str) -> bytes:
        """Content of one file, checked against its digest once more; NotFoundError when the bundle has no such file."""
        if name not in self.files:
            raise NotFoundError(
                f"the bundle has no file '{name}'.", where=str(self.folder), fix=f"It has: {', '.join(self.files)}."
            )
        return _verified(self.folder / name, self.files[name])

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one safetensors file by name."""
        return _parse_tensors(self.read(name), self.folder / name)

    def weights(self) -> dict[str, np.ndarray]:
        """The model's weights under their Hugging Face names."""
        return self.tensors(WEIGHTS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bundle) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def write_bundle(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    vocabulary: Vocabulary,
    lineage: Mapping[str, Any],
    extra: Mapping[str, bytes | Mapping[str, np.ndarray]] = MappingProxyType({}),
) -> Bundle:
    """Write a model as a new bundle that appears in `folder` whole or not at all.

    `extra` holds further files: bytes, or arrays to be stored as safetensors. Writing the same content again returns
    what is there. Raises InputError for parts that do not fit, AlreadyExistsError when the folder holds anything else.
    """
    folder = folder.absolute()
    if kind not in KINDS:
        raise InputError(f"'{kind}' is not a kind of bundle.", where=str(folder), fix=f"Use {' or '.join(KINDS)}.")
    _check_vocabulary(config, vocabulary, weights, where=str(folder))
    contents = {
        CONFIG: _json_bytes(config, where="config"),
        WEIGHTS: _tensor_bytes(weights, where="weights"),
        VOCABULARY: vocabulary.to_parquet_bytes(),
        **{_free_name(name): _extra_bytes(name, content) for name, content in extra.items()},
    }
    records = {name: FileRecord(hashlib.sha256(data).hexdigest(), len(data)) for name, data in sorted(contents.items())}
    manifest = _manifest(kind, records, vocabulary.digest, lineage)
    contents[MANIFEST] = _json_bytes(manifest, where="lineage")
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if free and _write_whole(folder, contents):
        return open_bundle(folder)
    if (folder / MANIFEST).exists() and (there := open_bundle(folder)).digest == manifest["digest"]:
        return there
    raise AlreadyExistsError("something else is here.", where=str(folder), fix="Choose a new folder.")


def _write_whole(folder: Path, contents: Mapping[str, bytes]) -> bool:
    """Write the files, the manifest last; False when another writer took the folder meanwhile."""
    part = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}.part")
    try:
        # In this order, so that the manifest comes last and a folder with one is complete.
        for name, data in contents.items():
            with whole_file(part / name) as file:
                file.write(data)
        try:
            part.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return False
        return True
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _manifest(
    kind: str, records: Mapping[str, FileRecord], vocabulary_digest: str, lineage: Mapping[str, Any]
) -> dict[str, Any]:
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "digest": _content_digest(kind, records),
        "vocabulary_digest": vocabulary_digest,
        "files": {name: dataclasses.asdict(record) for name, record in records.items()},
        "lineage": dict(lineage),
    }
    return {**manifest, "seal": _seal(manifest)}


def _content_digest(kind: str, records: Mapping[str, FileRecord]) -> str:
    return _digest_of({"kind": kind, "files": {name: record.sha256 for name, record in records.items()}})


def _seal(manifest: Mapping[str, Any]) -> str:
    return _digest_of({key: value for key, value in manifest.items() if key != "seal"})


def _digest_of(value: object) -> str:
    """sha256 of canonical JSON: sorted keys, no spaces, ASCII."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"cannot be written as JSON: {error}.", where="lineage", fix="Give texts and numbers."
        ) from error
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _json_bytes(value: Mapping[str, Any], *, where: str) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot be written as JSON: {error}.", where=where, fix="Give texts and numbers.") from error


def _free_name(name: str) -> str:
    if name in (*REQUIRED, MANIFEST):
        raise InputError(f"'{name}' has its own place in a bundle.", where="extra", fix="Choose another name.")
    join("bundle", name)
    return name


def _extra_bytes(name: str, content: bytes | Mapping[str, np.ndarray]) -> bytes:
    return content if isinstance(content, bytes) else _tensor_bytes(content, where=name)


def _tensor_bytes(tensors: Mapping[str, np.ndarray], *, where: str) -> bytes:
    plain = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    if odd := [name for name, values in plain.items() if values.dtype.kind not in "fiub"]:
        raise InputError(f"'{odd[0]}' holds {plain[odd[0]].dtype}, not numbers.", where=where)
    # `transformers` reads a file only when it says for which framework it was written.
    return bytes(safetensors.numpy.save(plain, metadata={"format": "pt"}))


def open_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, after every file was found to have its recorded size and digest.

    Raises NotFoundError when there is no bundle, and IntegrityError that names the file which is missing, changed,
    not listed, or outside the folder.
    """
    folder = folder.absolute()
    manifest = _read_manifest(folder)
    records = _records(manifest, folder)
    _check_names(folder, records)
    for name, record in records.items():
        _check_file(folder / name, record)
    if manifest["digest"] != _content_digest(manifest["kind"], records):
        raise _damaged(folder, "its digest does not fit the files it lists")
    path = folder / VOCABULARY
    vocabulary = Vocabulary.from_parquet_bytes(_verified(path, records[VOCABULARY]), where=str(path))
    config = _parse_json(_verified(folder / CONFIG, records[CONFIG]), folder / CONFIG)
    if vocabulary.digest != manifest["vocabulary_digest"]:
        raise _damaged(folder, "its vocabulary digest does not fit the vocabulary")
    _check_vocabulary(config, vocabulary, {}, where=str(folder))
    return Bundle(
        folder=folder,
        kind=manifest["kind"],
        config=config,
        vocabulary=vocabulary,
        lineage=manifest["lineage"],
        digest=manifest["digest"],
        files=records,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(
            f"is not a bundle: there is no {MANIFEST}.",
            where=str(folder),
            fix="Check the folder; a published checkpoint becomes a model with `genescale models import`.",
        )
    if path.stat().st_size > MANIFEST_MAX_BYTES:
        raise _damaged(folder, f"it is larger than {MANIFEST_MAX_BYTES:,} bytes")
    manifest = _parse_json(path.read_bytes(), path)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"has bundle schema version {version}, this Genescale reads {SCHEMA_VERSION}.",
            where=str(folder),
            fix="Use the Genescale that wrote it, or newer.",
        )
    types = {"kind": str, "digest": str, "vocabulary_digest": str, "files": dict, "lineage": dict, "seal": str}
    if wrong := [key for key, kind in types.items() if not isinstance(manifest.get(key), kind)]:
        raise _damaged(folder, f"'{wrong[0]}' is missing or of the wrong type")
    if manifest["kind"] not in KINDS:
        raise _damaged(folder, f"its kind '{manifest['kind']}' is not known")
    if manifest["seal"] != _seal(manifest):
        raise _damaged(folder, "its seal is broken: it was changed after it was written")
    return manifest


def _records(manifest: Mapping[str, Any], folder: Path) -> dict[str, FileRecord]:
    records = {}
    for name, stated in manifest["files"].items():
        match stated:
            case {"sha256": str(sha256), "size_bytes": int(size_bytes)} if _SHA256.fullmatch(sha256):
                records[name] = FileRecord(sha256, size_bytes)
            case _:
                raise _damaged(folder, f"it states no valid digest and size for '{name}'")
    return records


def _check_names(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """The listed files are exactly those in the folder, and none of them is reached through a way out of it."""
    for name in records:
        try:
            path = Path(join(str(folder), name))
        except ForbiddenPathError as error:
            raise _damaged(folder, f"it lists {name!r}, which leaves the folder") from error
        if not path.resolve().is_relative_to(folder.resolve()):
            raise IntegrityError("is a link that leaves the bundle.", where=str(path), fix="Fetch the bundle again.")
    there = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    if missing := sorted({*records, *REQUIRED} - (there & set(records))):
        raise IntegrityError("is missing from the bundle.", where=str(folder / missing[0]), fix="Fetch it again.")
    if extra := sorted(there - {*records, MANIFEST}):
        raise IntegrityError(
            f"does not belong to the bundle ({MANIFEST} does not list it).",
            where=str(folder / extra[0]),
            fix="Remove it, or fetch the bundle again.",
        )


def _check_file(path: Path, record: FileRecord) -> None:
    if path.stat().st_size != record.size_bytes:
        raise _changed(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
            raise _changed(path)


def _verified(path: Path, record: FileRecord) -> bytes:
    # Time passes between the check of the folder and the use of a file, so what is parsed is what is hashed.
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _changed(path)
    return data


def _changed(path: Path) -> IntegrityError:
    return IntegrityError("differs from its recorded digest.", where=str(path), fix="Fetch the bundle again.")


def _damaged(folder: Path, why: str) -> IntegrityError:
    return IntegrityError(f"cannot be trusted: {why}.", where=str(folder / MANIFEST), fix="Fetch the bundle again.")


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"is not valid JSON: {error}.", where=str(path), fix="Fetch the bundle again.") from error
    if not isinstance(value, dict):
        raise IntegrityError("is not a JSON object.", where=str(path), fix="Fetch the bundle again.")
    return value


def _parse_tensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(safetensors.numpy.load(data))
    except (SafetensorError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"cannot be read as safetensors: {error}.", where=str(path), fix="Store its weights as float32."
        ) from error


def _check_vocabulary(
    config: Mapping[str, Any], vocabulary: Vocabulary, weights: Mapping[str, np.ndarray], *, where: str
) -> None:
    stated = config.get("vocab_size")
    rows = weights[EMBEDDING].shape[0] if EMBEDDING in weights else None
    if stated != vocabulary.size or rows not in (None, stated):
        found = f"the config states {stated} tokens and the embedding table has {rows} rows"
        raise VocabularyError(
            f"the vocabulary has {vocabulary.size} tokens, but {found}.",
            where=where,
            fix="Use the vocabulary this model was trained with.",
        )


def adopt_checkpoint(folder: Path, vocabulary: Vocabulary, out: Path) -> Bundle:
    """Make a bundle in `out` from a published Hugging Face folder (config.json and model.safetensors).

    Raises InputError when it is not a BertForMaskedLM in safetensors, VocabularyError when the sizes differ.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(
            f"holds no {CONFIG} with a {WEIGHTS}.",
            where=str(folder),
            fix="Save the model with save_pretrained of transformers, which writes both; pickled weights are not read.",
        )
    config = _parse_json((folder / CONFIG).read_bytes(), folder / CONFIG)
    if config.get("model_type") != "bert" or "BertForMaskedLM" not in (config.get("architectures") or ()):
        found = f"{config.get('model_type')} {config.get('architectures')}"
        raise InputError(f"is not a BertForMaskedLM but {found}.", where=str(folder), fix="Choose a pretrained model.")
    if config.get("max_position_embeddings", 0) < vocabulary.window:
        raise VocabularyError(
            f"has {config.get('max_position_embeddings')} positions, the vocabulary's window {vocabulary.window}.",
            where=str(folder),
            fix="Use the vocabulary this model was trained with.",
        )
    data = (folder / WEIGHTS).read_bytes()
    lineage = {"adopted_from": folder.resolve().name, "checkpoint_sha256": hashlib.sha256(data).hexdigest()}
    return write_bundle(
        out,
        kind="masked_gene_model",
        config=config,
        weights=_parse_tensors(data, folder / WEIGHTS),
        vocabulary=vocabulary,
        lineage={**lineage, "vocabulary_digest": vocabulary.digest},
    )
