"""Reading and setting what ZeRO has spread over the workers, in DeepSpeed's own structures.

DeepSpeed's checkpoints are pickles that belong to a number of workers (stages 1 to 3), and its universal form is made
by a separate program. Here each worker copies the fragments that it holds anyway, and sets the fragments that it needs
from whole tensors. The structures are those of DeepSpeed 0.19: `tests/training/test_engine.py` moves states between
all stages and numbers of workers, so a release that changes them fails there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from genescale.platform.errors import IntegrityError
from genescale.training.shards import MOMENTS, WEIGHT, SavedState, Snapshot, even_range

Parameters = list[tuple[str, nn.Parameter]]


def trained(model: nn.Module) -> Parameters:
    """The parameters that are no frozen ones, by name: those that a state consists of."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def take(engine: Any, model: nn.Module, *, stage: int, rank: int, workers: int) -> Snapshot:
    """What this worker holds of weights and moments; no worker waits for another."""
    parameters = trained(model)
    shapes = {name: _shape(parameter) for name, parameter in parameters}
    snapshot = Snapshot(adam_steps=_adam_steps(_torch_optimizer(engine)), shapes=shapes)
    if stage == 0:
        _take_whole(_torch_optimizer(engine), parameters, snapshot, rank, workers)
    elif stage < 3:
        _take_mapped(engine, parameters, snapshot)
    else:
        _take_partitions(parameters, snapshot, rank)
    return snapshot


def put(
    engine: Any, model: nn.Module, saved: SavedState, *, stage: int, rank: int, gathered: Callable[..., Any]
) -> None:
    """Set weights and moments from the state of any number of workers; every worker must call it.

    gathered: DeepSpeed's `zero.GatheredParameters`, which opens stage 3's weights.
    """
    parameters = trained(model)
    saved.check_fits({name: _shape(parameter) for name, parameter in parameters})
    optimizer = _torch_optimizer(engine)
    if stage == 0:
        put_whole(optimizer, parameters, saved)
        return
    _make_moments(engine.optimizer, optimizer, stage, saved.adam_steps)
    if stage < 3:
        _put_mapped(engine, parameters, saved)
    else:
        _put_partitions(parameters, saved, rank, gathered)


@torch.no_grad()
def put_whole(optimizer: torch.optim.Optimizer, parameters: Parameters, saved: SavedState) -> None:
    """Set weights and moments where every parameter is whole: plain torch, and ZeRO stage 0."""
    for name, parameter in parameters:
        parameter.copy_(saved.tensor(WEIGHT, name))
        if saved.adam_steps:
            moments = {key: saved.tensor(key, name).to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": _step_tensor(optimizer, parameter, saved.adam_steps), **moments}


def take_whole(optimizer: torch.optim.Optimizer, parameters: Parameters) -> Snapshot:
    """Weights and moments where every parameter is whole and there is one worker."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
    snapshot = Snapshot(adam_steps=_adam_steps(optimizer), shapes=shapes)
    _take_whole(optimizer, parameters, snapshot, 0, 1)
    return snapshot


def _take_whole(
    optimizer: torch.optim.Optimizer, parameters: Parameters, snapshot: Snapshot, rank: int, workers: int
) -> None:
    for name, parameter in parameters:
        start, stop = even_range(parameter.numel(), rank, workers)
        values = {WEIGHT: parameter, **{key: optimizer.state[parameter][key] for key in MOMENTS if snapshot.adam_steps}}
        for kind, tensor in values.items():
            snapshot.add(kind, name, start, tensor.detach().reshape(-1)[start:stop])


def _take_mapped(engine: Any, parameters: Parameters, snapshot: Snapshot) -> None:
    """Stages 1 and 2: each worker owns a range of each flattened group, so a fragment of some parameters."""
    for name, parameter in parameters:
        for kind, held, start in _fragments(engine, parameter, with_moments=bool(snapshot.adam_steps)):
            snapshot.add(kind, name, start, held)


def _fragments(engine: Any, parameter: nn.Parameter, *, with_moments: bool) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(kind, what this worker holds, where in the flat parameter it starts); nothing when it holds nothing of it."""
    mapping: Any = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return
    start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
    yield WEIGHT, mapping.hp_fragment, start
    # Not the mapping's own fragments of moments: DeepSpeed links those of all groups after the first group's first
    # step, when the others have none yet.
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    for key in MOMENTS if with_moments else ():
        yield key, _torch_optimizer(engine).state[flat][key].narrow(0, place.start, place.numel), start


def _take_partitions(parameters: Parameters, snapshot: Snapshot, rank: int) -> None:
    """Stage 3: each worker owns the same share of every parameter, padded at the end."""
    for name, parameter in parameters:
        for kind, values, start, length in _partitions(parameter, rank, with_moments=bool(snapshot.adam_steps)):
            if length:
                snapshot.add(kind, name, start, values[:length])


def _put_mapped(engine: Any, parameters: Parameters, saved: SavedState) -> None:
    for name, parameter in parameters:
        whole = {kind: saved.tensor(kind, name) for kind in _kinds(saved)}
        parameter.data.copy_(whole[WEIGHT])
        for kind, held, start in _fragments(engine, parameter, with_moments=bool(saved.adam_steps)):
            held.data.copy_(whole[kind].reshape(-1)[start : start + held.numel()])


def _put_partitions(parameters: Parameters, saved: SavedState, rank: int, gathered: Callable[..., Any]) -> None:
    for name, parameter in parameters:
        whole = {kind: saved.tensor(kind, name) for kind in _kinds(saved)}
        with gathered([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(whole[WEIGHT])
        for kind, held, start, length in _partitions(parameter, rank, with_moments=bool(saved.adam_steps)):
            held.data[:length].copy_(whole[kind].reshape(-1)[start : start + length])


def _partitions(parameter: Any, rank: int, *, with_moments: bool) -> Iterator[tuple[str, torch.Tensor, int, int]]:
    """(kind, this worker's flat partition, where it starts, how much of it is no padding) of a stage 3 parameter."""
    for kind in (WEIGHT, *(MOMENTS if with_moments else ())):
        optimizer = parameter._z3_optimizer
        key = None if kind == WEIGHT else kind
        held, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True, optim_state_key=key)
        start = rank * held.numel()
        yield kind, held, start, max(0, min(held.numel(), parameter.ds_numel - start))


def _make_moments(zero: Any, optimizer: torch.optim.Optimizer, stage: int, adam_steps: int) -> None:
    """Give a fresh optimiser the moments that it would make at its first step."""
    if not adam_steps:
        return
    name = "single_partition_of_fp32_groups" if stage < 3 else "fp32_partitioned_groups_flat"
    for flat in getattr(zero, name):
        moments = {key: torch.zeros_like(flat) for key in MOMENTS}
        optimizer.state[flat] = {"step": _step_tensor(optimizer, flat, adam_steps), **moments}


def _step_tensor(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, adam_steps: int) -> torch.Tensor:
    # The fused form counts on the device.
    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
    return torch.tensor(float(adam_steps), device=device)


def _kinds(saved: SavedState) -> tuple[str, ...]:
    return (WEIGHT, *(MOMENTS if saved.adam_steps else ()))


def _shape(parameter: Any) -> tuple[int, ...]:
    # At stage 3 a parameter at rest is empty and remembers its shape.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The AdamW below DeepSpeed's own optimiser."""
    optimizer = engine.optimizer
    while not isinstance(optimizer, torch.optim.AdamW):
        below = getattr(optimizer, "optimizer", None)
        if below is None:
            raise IntegrityError(f"DeepSpeed wraps no AdamW but {type(optimizer).__name__}.")
        optimizer = below
    return optimizer


def _adam_steps(optimizer: torch.optim.Optimizer) -> int:
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise IntegrityError(f"the optimiser counts {sorted(steps)} steps at once.")
    return steps.pop() if steps else 0
