"""Damage to a valid atlas, decided by a seed alone: bytes, blocks, and what a program can write into it on purpose."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Rng = np.random.Generator
BYTES_SHARE = 0.45
HUGE = (2**31, 2**40, 2**62)


def mutate(kind: str, original: Path, out: Path, seed: int) -> str:
    """Write a damaged copy of the original to `out`; returns what was done to it."""
    rng = np.random.default_rng([seed, sum(kind.encode())])
    if original.is_dir():
        shutil.copytree(original, out)
        target = sorted(out.iterdir())[int(rng.integers(3))]
        return f"{target.name}: {_mutate_text(target, rng)}"
    shutil.copyfile(original, out)
    if rng.random() < BYTES_SHARE:
        return _damage_bytes(out, rng)
    try:
        return _mutate_zip(out, rng) if original.suffix == ".zip" else _mutate_hdf5(out, rng)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        # What does not fit this file is damage of bytes instead, so that every seed gives a mutation.
        shutil.copyfile(original, out)
        return _damage_bytes(out, rng)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _damage_bytes(path: Path, rng: Rng) -> str:
    data, said = damaged(path.read_bytes(), rng)
    path.write_bytes(data)
    return said


def damaged(data: bytes, rng: Rng) -> tuple[bytes, str]:
    """Flip, cut, move, blank, insert or remove bytes."""
    found, size = bytearray(data), len(data)
    what = str(rng.choice(["flip", "flip", "flip", "head", "cut", "splice", "blank", "insert", "remove", "number"]))
    at = int(rng.integers(size))
    length = int(min(size - at, 2 ** rng.integers(1, 12)))
    if what in ("flip", "head"):
        for _ in range(int(rng.integers(1, 9))):
            at = int(rng.integers(min(size, 4_096) if what == "head" else size))
            found[at] ^= 1 << int(rng.integers(8))
    elif what == "cut":
        del found[at:]
    elif what == "splice":
        source = int(rng.integers(size - length + 1))
        found[at : at + length] = data[source : source + length]
    elif what == "blank":
        found[at : at + length] = bytes([int(rng.choice([0, 255]))]) * length
    elif what == "insert":
        found[at:at] = rng.bytes(length)
    elif what == "remove":
        del found[at : at + length]
    else:
        value = int(rng.choice([0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1]))
        found[at : at + 8] = value.to_bytes(8, "little", signed=True)
    return bytes(found), f"{what} at {at}, {length} bytes"


# --- text (mtx) -------------------------------------------------------------------------------------------------------


def _mutate_text(path: Path, rng: Rng) -> str:
    if rng.random() < 0.3:
        return _damage_bytes(path, rng)
    text = gzip.decompress(path.read_bytes())
    if rng.random() < 0.4:
        text, said = damaged(text, rng)
    else:
        text, said = _mutated_lines(text, rng)
    packed = gzip.compress(text, mtime=0)
    if rng.random() < 0.1:
        packed, said = gzip.compress(text[:200], mtime=0) + gzip.compress(text[200:], mtime=0), f"{said}, two members"
    path.write_bytes(packed)
    return said


def _mutated_lines(text: bytes, rng: Rng) -> tuple[bytes, str]:
    lines = text.split(b"\n")
    at = int(rng.integers(len(lines)))
    what = str(rng.choice(["drop", "double", "number", "number", "swap", "word", "header", "blank", "crlf"]))
    if what == "drop":
        del lines[at]
    elif what == "double":
        lines.insert(at, lines[at])
    elif what in ("number", "word"):
        words = lines[at].split()
        if words:
            values = [
                b"0",
                b"-1",
                b"61",
                b"121",
                b"99999999999",
                b"1.5",
                b"1e3",
                b"nan",
                b"inf",
                b"x",
                b"",
                b"\xff",
                b"+2",
            ]
            words[int(rng.integers(len(words)))] = values[int(rng.integers(len(values)))]
        lines[at] = b" ".join(words)
    elif what == "swap":
        other = int(rng.integers(len(lines)))
        lines[at], lines[other] = lines[other], lines[at]
    elif what == "header":
        heads = [
            b"%%MatrixMarket matrix coordinate real general",
            b"%%MatrixMarket matrix coordinate pattern general",
            b"%%MatrixMarket matrix coordinate integer symmetric",
            b"%%MatrixMarket matrix array integer general",
            b"%%MatrixMarket matrix coordinate complex general",
            b"%%MatrixMarket",
        ]
        lines[0] = heads[int(rng.integers(len(heads)))]
    elif what == "blank":
        lines.insert(at, b"   ")
    else:
        lines = [line + b"\r" for line in lines]
    return b"\n".join(lines), f"{what} at line {at}"


# --- zip (zarr) -------------------------------------------------------------------------------------------------------


def _mutate_zip(path: Path, rng: Rng) -> str:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # What the counts and genes rest on is hit more often than what nothing reads.
    names = sorted(members)
    likely = [name for name in names if name.startswith(("X/", "var/", "obs/")) or "/" not in name]
    name = str(rng.choice(likely if rng.random() < 0.9 else names))
    what = str(rng.choice(["drop", "bytes", "bytes", "field", "field", "field", "swap", "escape"]))
    if what == "drop":
        del members[name]
    elif what == "bytes":
        members[name] = damaged(members[name], rng)[0] if members[name] else b"x"
    elif what == "swap":
        other = str(rng.choice(likely))
        members[name], members[other] = members[other], members[name]
    elif what == "escape":
        members[f"../{name}"] = members[name]
    else:
        name = str(rng.choice([name for name in likely if name.endswith((".zarray", ".zattrs", ".zgroup", ".json"))]))
        members[name] = _changed_json(members[name], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    path.write_bytes(packed.getvalue())
    return f"{what} {name}"


def _changed_json(data: bytes, rng: Rng) -> bytes:
    """Put another value at a random place of nested JSON."""
    tree = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    node, key = places[int(rng.integers(len(places)))]
    values = [
        0,
        1,
        -1,
        3,
        121,
        2**40,
        2**62,
        0.5,
        "",
        "csr_matrix",
        "dense_array",
        None,
        [],
        {},
        True,
        "<f2",
        ">i4",
        "|O",
        "zstd",
    ]
    node[key] = values[int(rng.integers(len(values)))]
    return json.dumps(tree).encode()


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def _mutate_hdf5(path: Path, rng: Rng) -> str:
    changes = (
        _value, _value, _value, _dtype, _dtype, _attribute, _attribute, _resize, _hole, _replace, _drop, _link,
        _outside, _nest, _gene, _filter, _zeros,
    )  # fmt: skip
    change: Callable[[h5py.File, str, Rng], None] = changes[int(rng.integers(len(changes)))]  # type: ignore[assignment]
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        likely = [name for name in names if name.startswith(("X", "matrix", "var/", "row_attrs", "obs/_index"))]
        name = str(rng.choice(sorted(likely) if rng.random() < 0.9 else sorted(names)))
        change(file, name, rng)
    return f"{change.__name__.strip('_')} {name}"


def _value(file: h5py.File, name: str, rng: Rng) -> None:
    """One value of a numeric dataset becomes another: wrong indptr, indices out of range, NaN, negative counts."""
    name = _numeric(file, rng)
    data = file[name][()]
    flat, kind = data.reshape(-1), data.dtype.kind
    choices = [0, 1, 2, 59, 60, 61, 120, 121, 2**31 - 1]
    choices += [-1, -(2**31)] if kind in "if" else []
    choices += [0.5, np.nan, np.inf, 3e38] if kind == "f" else []
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.choice([0, len(flat) - 1, int(rng.integers(len(flat)))]))
        flat[place] = choices[int(rng.integers(len(choices)))]
    file[name][...] = flat.reshape(data.shape)


def _dtype(file: h5py.File, name: str, rng: Rng) -> None:
    name = _numeric(file, rng)
    kinds = ["f2", "f4", "f8", ">f4", ">i4", "i1", "u1", "i2", "u2", "i8", "u8", "?", "c8", "S4", "O"]
    _rewrite(file, name, kinds[int(rng.integers(len(kinds)))], {})


def _filter(file: h5py.File, name: str, rng: Rng) -> None:
    name = _numeric(file, rng)
    ways: list[dict[str, Any]] = [
        {"compression": "lzf"}, {"compression": "gzip", "shuffle": True}, {"fletcher32": True},
        {"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "gzip", "compression_opts": 0},
        {"scaleoffset": 2}, {},
    ]  # fmt: skip
    _rewrite(file, name, file[name].dtype, ways[int(rng.integers(len(ways)))])


def _rewrite(file: h5py.File, name: str, dtype: Any, how: dict[str, Any]) -> None:
    data, attributes = file[name][()], dict(file[name].attrs)
    with np.errstate(all="ignore"):
        data = data.astype(str).astype(object) if dtype == "O" else data.astype(dtype)
    del file[name]
    stored = file.create_dataset(name, data=data, dtype=h5py.string_dtype() if dtype == "O" else None, **how)
    stored.attrs.update(attributes)


def _attribute(file: h5py.File, name: str, rng: Rng) -> None:
    holders = [item for item in ("X", "obs", "var", "matrix", "/", name, "obs/donor_id") if item in file]
    item = file[holders[int(rng.integers(len(holders)))]]
    keys = [*item.attrs, "encoding-type", "shape", "_index", "encoding-version", "column-order"]
    values: list[Any] = [
        [120, 60], [60, 120], [121, 60], [120, 61], [2**40, 60], [120, 2**40], [-1, 60], [0, 0], "csr_matrix",
        "csc_matrix", "array", "", "9.9.9", 5, 0.5, ["a", "b"], "no_such_column", np.array([], dtype=np.int64),
    ]  # fmt: skip
    key = keys[int(rng.integers(len(keys)))]
    if rng.random() < 0.3 and key in item.attrs:
        del item.attrs[key]
    else:
        item.attrs[key] = values[int(rng.integers(len(values)))]


def _resize(file: h5py.File, name: str, rng: Rng) -> None:
    """A dataset declares far more, or other, values than are stored."""
    name = _numeric(file, rng) if rng.random() < 0.7 else name
    old = file[name]
    attributes, dtype = dict(old.attrs), old.dtype
    size = int(rng.choice([0, 1, 59, 119, 121, 122, *HUGE]))
    shape = (size, *old.shape[1:]) if rng.random() < 0.8 else (*old.shape, 2)
    data = old[()] if size < 10_000 else None
    del file[name]
    if data is None:
        stored = file.create_dataset(name, shape, dtype=dtype, chunks=(min(16, shape[0]), *shape[1:]))
    else:
        stored = file.create_dataset(name, shape, dtype=dtype)
        if size <= len(data) and len(shape) == data.ndim:
            stored[...] = data[:size]
    stored.attrs.update(attributes)


def _hole(file: h5py.File, name: str, rng: Rng) -> None:
    """Some chunks were never written: they read back as zeros."""
    name = _numeric(file, rng)
    data, attributes = file[name][()], dict(file[name].attrs)
    del file[name]
    chunks = (max(1, len(data) // 4), *data.shape[1:])
    stored = file.create_dataset(name, data.shape, dtype=data.dtype, chunks=chunks, compression="gzip")
    stored[: chunks[0] * int(rng.integers(0, 4))] = data[: chunks[0] * int(rng.integers(0, 4))][: len(data)]
    stored.attrs.update(attributes)


def _replace(file: h5py.File, name: str, rng: Rng) -> None:
    """Another kind of thing stands where a dataset stood."""
    del file[name]
    kind = int(rng.integers(5))
    if kind == 0:
        file.create_group(name)
    elif kind == 1:
        file[name] = 5
    elif kind == 2:
        file[name] = "text"
    elif kind == 3:
        file[name] = np.zeros((2, 3, 4))
    else:
        file.create_dataset(name, dtype="f4", shape=None, data=h5py.Empty("f4"))


def _drop(file: h5py.File, name: str, rng: Rng) -> None:
    parent = name.rpartition("/")[0]
    del file[parent if parent and rng.random() < 0.3 else name]


def _link(file: h5py.File, name: str, rng: Rng) -> None:
    del file[name]
    links = [
        h5py.SoftLink("/etc"),
        h5py.SoftLink(f"/{name}"),
        h5py.ExternalLink("/etc/passwd", "/"),
        h5py.SoftLink("/"),
    ]
    file[name] = links[int(rng.integers(len(links)))]


def _outside(file: h5py.File, name: str, rng: Rng) -> None:
    """External storage or a virtual dataset: the values come from another file of the machine."""
    name = _numeric(file, rng)
    shape, dtype, attributes = file[name].shape, file[name].dtype, dict(file[name].attrs)
    del file[name]
    if rng.random() < 0.5:
        stored = file.create_dataset(name, shape, dtype=dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
    else:
        layout = h5py.VirtualLayout(shape, dtype=dtype)
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=shape)
        stored = file.create_virtual_dataset(name, layout)
    stored.attrs.update(attributes)


def _nest(file: h5py.File, name: str, rng: Rng) -> None:
    depth = int(rng.choice([10, 40, 200]))
    file.create_group(f"uns/{'/'.join('d' * depth)}") if rng.random() < 0.5 else file.create_group("loop")
    if "loop" in file:
        file["loop/again"] = file["/"]


def _gene(file: h5py.File, name: str, rng: Rng) -> None:
    """Names of genes change: repeated, versioned, unknown, empty, not texts."""
    for place in ("var/_index", "row_attrs/Accession", "matrix/features/id"):
        if place in file:
            names = [value.decode() for value in file[place][()]]
            other = names[int(rng.integers(len(names)))]
            values = [
                other,
                f"{other}.3",
                f"{other}_PAR_Y",
                "ENSMUSG00000000001",
                "",
                "x" * 5_000,
                other.lower(),
                "ERCC-00002",
            ]
            for _ in range(int(rng.integers(1, 6))):
                names[int(rng.integers(len(names)))] = values[int(rng.integers(len(values)))]
            attributes = dict(file[place].attrs)
            del file[place]
            file.create_dataset(place, data=names, dtype=h5py.string_dtype()).attrs.update(attributes)


def _zeros(file: h5py.File, name: str, rng: Rng) -> None:
    """Explicit zeros, and whole cells of nothing."""
    name = _values(file)
    data = file[name][()]
    flat = data.reshape(-1)
    start = int(rng.integers(len(flat)))
    flat[start : start + int(rng.integers(1, 400))] = 0
    file[name][...] = flat.reshape(data.shape)


def _values(file: h5py.File) -> str:
    return next(name for name in ("X/data", "matrix/data", "X", "matrix") if isinstance(file.get(name), h5py.Dataset))


def _numeric(file: h5py.File, rng: Rng) -> str:
    names = [f"{group}/{part}" for group in ("X", "matrix") for part in ("data", "indices", "indptr", "shape")]
    found = [name for name in (*names, "X", "matrix") if isinstance(file.get(name), h5py.Dataset)]
    return found[int(rng.integers(len(found)))]
