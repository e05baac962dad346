"""The state of a training as files that belong to no number of workers and to no ZeRO stage.

The state is, for every parameter, its fp32 weight and Adam's two moments, and its average over the steps where one is
kept. A worker holds a *fragment* of each: a range
of the flattened tensor (all of them at one worker, its partition under ZeRO). It writes what it holds into one
safetensors file, without asking the others; whoever reads puts the fragments of all files together again.

    keys       KIND/PARAMETER@START, flat fp32      KIND is weight, exp_avg, exp_avg_sq or average
    metadata   shapes (JSON: PARAMETER -> shape), adam_steps

No pickle is involved, so a checkpoint from a foreign bucket can do nothing worse than fail its digest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from genescale.platform.errors import IntegrityError

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
AVERAGE = "average"


@dataclass(kw_only=True)
class Snapshot:
    """What one worker holds of the state at one step, copied to the host."""

    adam_steps: int
    """Steps the optimiser has taken: its bias correction rests on them."""
    shapes: dict[str, tuple[int, ...]]
    """Of every parameter, whether this worker holds something of it or not."""
    fragments: dict[str, torch.Tensor] = field(default_factory=dict)
    """`KIND/PARAMETER@START` -> flat fp32 values."""

    def add(self, kind: str, name: str, start: int, values: torch.Tensor) -> None:
        """Copy a fragment, so that training may go on while it is written."""
        flat = values.detach().reshape(-1)
        self.fragments[f"{kind}/{name}@{start}"] = flat.to("cpu", torch.float32, copy=True)

    @property
    def size_bytes(self) -> int:
        """Host memory it takes."""
        return sum(values.nbytes for values in self.fragments.values())

    def is_finite(self) -> bool:
        """Whether every value is a number."""
        return all(bool(torch.isfinite(values).all()) for values in self.fragments.values())

    def write(self, path: Path) -> None:
        """Store it as one file."""
        metadata = {"shapes": json.dumps(self.shapes), "adam_steps": str(self.adam_steps)}
        save_file(self.fragments, path, metadata=metadata)


def even_range(size: int, rank: int, workers: int) -> tuple[int, int]:
    """(start, stop) of the share of `rank` when `size` values are dealt evenly to `workers`."""
    return size * rank // workers, size * (rank + 1) // workers


class SavedState:
    """The state in the shard files of all workers that wrote it; tensors are read one at a time.

    Raises IntegrityError when a file is no shard, when files belong to different states, or when fragments are missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._where = str(paths[0].parent) if paths else "checkpoint"
        self._places: dict[str, list[tuple[int, Path, str]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.adam_steps = 0
        for number, path in enumerate(paths):
            shapes, adam_steps = self._register(path)
            if number and (shapes, adam_steps) != (self.shapes, self.adam_steps):
                raise IntegrityError("is of another state than the files beside it.", where=str(path))
            self.shapes, self.adam_steps = shapes, adam_steps
        if not self.shapes:
            raise IntegrityError("holds no training state.", where=self._where)

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor, fp32, on the host."""
        shape = self.shapes.get(name)
        if shape is None:
            raise self._missing(kind, name)
        whole = torch.empty(math.prod(shape), dtype=torch.float32)
        filled = 0
        for start, values in self._fragments(kind, name):
            if start != filled or start + len(values) > len(whole):
                raise self._missing(kind, name)
            whole[start : start + len(values)] = values
            filled += len(values)
        if filled != len(whole):
            raise self._missing(kind, name)
        return whole.reshape(shape)

    def check_fits(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """IntegrityError unless it is the state of a model with exactly these parameters."""
        for name in sorted(shapes.keys() | self.shapes.keys()):
            if shapes.get(name) != self.shapes.get(name):
                found = self.shapes.get(name, "absent")
                raise IntegrityError(
                    f"{name} is {found}, the model needs {shapes.get(name, 'none')}.", where=self._where
                )

    def _register(self, path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    name, _, start = key.rpartition("@")
                    self._places.setdefault(name, []).append((int(start), path, key))
            shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
            return shapes, int(metadata["adam_steps"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise IntegrityError(f"is no shard of a checkpoint: {error}.", where=str(path)) from error

    def _fragments(self, kind: str, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        for start, path, key in sorted(self._places.get(f"{kind}/{name}", [])):
            with safe_open(path, framework="pt") as file:
                yield start, file.get_tensor(key)

    def _missing(self, kind: str, name: str) -> IntegrityError:
        return IntegrityError(f"does not hold the whole {kind} of {name}.", where=self._where)
