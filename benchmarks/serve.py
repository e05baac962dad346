"""What the service costs beside its model, and what a flood and a kill do to it: Ray Serve, load from another process.

    make bench NAME=serve                            all parts, about twenty minutes on two quiet cores
    make bench NAME=serve ARGS=--quick               a few minutes: short loads, no kills
    make bench NAME=serve ARGS="--only latency"      one part (may be given several times)

saturation  /v1/embeddings with many cells a request, as Arrow, against the offline embedder: the same model, cells and
            processors, in turn. The answers of both have to be the same bits.
latency     one cell a request at half of what one model process can do: what a request takes longer than the bare
            forward pass and a Ray Serve endpoint that does nothing with the same body at the same rate.
batching    cells per second, one at a time against together: in one request, or in requests that share passes.
bodies      JSON against Arrow: processor time of the HTTP side per 1,000 cells.
gate        processor time of a request through the gate (key, rate, room, body, deadline) without anything behind it.
flood       four times as many requests as can be answered: refusals, memory, and that nothing is lost.
chaos       SIGKILL of the model's process, the HTTP side, the proxy and the controller under load, and a rollout:
            failed requests without and with the client's retries.

The load generator (`serve_load.py`) is checked too: its share of a processor and how late it sends stand in the notes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from harness import Row, at_most, finish, in_turn, measured, number, parser, times_faster
from serve_load import Load, Sent, send
from serve_processes import cpu_s
from serve_stand import CORES, FLOOR, JSON_TYPE, MODEL_SHARE, Bodies, Offline, Stand, random_bundle, stand
from serve_storms import chaos, flood, rollout

PACKAGES = ("numpy", "pyarrow", "ray", "torch", "fastapi", "httpx")
SHARE_OF_OFFLINE, BATCHING = 0.85, 3.0
ADDED_P50_MS, ADDED_P99_MS = 10.0, 50.0
CELLS_PER_REQUEST = 8
GATE_CALLS = 2_000
Message = MutableMapping[str, Any]


def main() -> int:
    made = parser(__doc__.partition("\n")[0])
    made.add_argument("--only", choices=PARTS, action="append", help="run only these parts")
    arguments = made.parse_args()
    rows: list[Row] = []
    chosen = arguments.only or [name for name in PARTS if not (arguments.quick and name in ("chaos", "rollout"))]
    with stand(arguments.quick) as here:
        rows.append(
            measured("Mean length of the cells", float(here.pool.lengths.mean()), "tokens", note=here.pool.origin)
        )
        for name in chosen:
            print(f"… {name}", file=sys.stderr, flush=True)
            for row in map(plain, PARTS[name](here)):
                # At once: a run that is cut off has measured something.
                text = f"  {row.claim.strip()}: {number(row.value)} {row.unit}; {row.note}"
                print(text, file=sys.stderr, flush=True)
                rows.append(row)
    name = "serve" if not arguments.only else f"serve-{'-'.join(arguments.only)}"
    return finish(name, rows, PACKAGES, quick=arguments.quick, output=arguments.output)


def plain(row: Row) -> Row:
    """The row with numbers that JSON knows."""
    values = dataclasses.asdict(row).items()
    return Row(**{name: value.item() if isinstance(value, np.generic) else value for name, value in values})


# --- at saturation ---------------------------------------------------------------------------------------------------


def saturation(here: Stand) -> Iterator[Row]:
    """All processors for the service with its HTTP side and the load, in turn with all processors for the embedder."""
    requests, rounds = (12, 1) if here.quick else (32, 3)
    bodies = here.bodies(here.cells(requests * CELLS_PER_REQUEST), CELLS_PER_REQUEST)
    offline = Offline(here.bundle, CORES)
    roles = ("replica", "http", "proxy", "controller", "raylet", "gcs")
    served, alone, shares, generator = [], [], [], []
    answers = here.scratch / "answers"
    answers.mkdir()
    with here.service(replicas=CORES, num_cpus=MODEL_SHARE) as port:
        load = bodies.load(port, clients=3 * CORES, requests=requests, keep=str(answers))
        send(dataclasses.replace(load, requests=2 * CORES))
        for _ in range(rounds):
            alone.append(bodies.tokens_n.sum() / offline.seconds(bodies.cells))
            before = cpu_s(roles)
            sent = send(load)
            spent = {role: used - before[role] for role, used in cpu_s(roles).items()}
            _check_all(sent)
            served.append(bodies.tokens_n[sent.body_n].sum() / sent.span_s)
            shares.append([spent[role] / sum(spent.values()) for role in roles])
            generator.append(sent.cpu_share)
    right = offline.vectors(bodies.cells)
    offline.close()
    wrong = sum(not np.array_equal(_vectors(answers / f"{at}.answer"), right[at]) for at in range(requests))
    share = statistics.median(mine / theirs for mine, theirs in zip(served, alone, strict=True))
    note = (
        f"{requests} requests of {CELLS_PER_REQUEST} cells ({bodies.tokens_n.mean():,.0f} tokens), {CORES} model "
        f"processes of one thread; the generator used {max(generator):.1%} of a processor"
    )
    yield dataclasses.replace(
        times_faster(
            "Embeddings at saturation, against offline", statistics.median(served), statistics.median(alone),
            "tokens/s", SHARE_OF_OFFLINE, note=note,
        ),
        ratio=share, holds=share >= SHARE_OF_OFFLINE,
    )  # fmt: skip
    share_of = dict(zip(roles, np.median(shares, axis=0), strict=True))
    text = ", ".join(f"{role} {part:.1%}" for role, part in share_of.items())
    yield measured("  processor time outside the model's processes", 1 - share_of["replica"], "of all", note=text)
    yield at_most("  requests answered with other bits than offline", wrong, "requests", 0)


def _vectors(file: Path) -> np.ndarray:
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        column = reader.read_all().column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def _check_all(sent: Sent) -> None:
    if not sent.ok_n.all():
        raise RuntimeError(f"{(~sent.ok_n).sum()} requests of a load that has to succeed failed: {sent.problems}")


# --- latency ---------------------------------------------------------------------------------------------------------


def latency(here: Stand) -> Iterator[Row]:
    """One cell of median length a request, at half load: even arrivals, then arrivals by chance."""
    rounds, seconds = (2, 6.0) if here.quick else (4, 15.0)
    bodies = here.bodies(here.cells(16, around=0.5), 1)
    offline = Offline(here.bundle, 1)
    seen: dict[str, list[Sent]] = {"service": [], "floor": [], "by chance": []}
    forwards: list[np.ndarray] = []
    hurried: list[np.ndarray] = []
    with here.service() as port:
        capacity = _capacity(bodies.load(port), seconds)
        steady = bodies.load(port, mode="open", rate=capacity / 2, seconds=seconds)
        loads = {
            "service": steady,
            "floor": dataclasses.replace(steady, path=FLOOR),
            "by chance": dataclasses.replace(steady, arrivals="poisson"),
        }
        for turn in range(rounds):
            alone, repeats = [cells[0] for cells in bodies.cells], 1 if here.quick else 3
            # At the pace of the requests: a pass that comes after a pause finds colder caches than one in a row.
            forwards.append(offline.cell_s(alone, repeats, every_s=2 / capacity))
            hurried.append(offline.cell_s(alone, repeats))
            for name, load in loads.items():
                seen[name].append(send(dataclasses.replace(load, seed=turn)))
                _check_all(seen[name][-1])
    offline.close()
    forward_n = np.median(forwards, axis=0)
    took = {name: _took(sents) for name, sents in seen.items()}
    yield from _latency_rows(capacity, bodies, forward_n, took, seen)
    text = "what the median would add if this were taken off instead"
    added = float(np.median(took["service"]) - np.median(took["floor"]) - np.median(hurried))
    yield measured("  bare forward passes in a row, median", 1e3 * float(np.median(hurried)), "ms")
    yield measured(f"  {text}", 1e3 * added, "ms")


def _latency_rows(
    capacity: float, bodies: Bodies, forward_n: np.ndarray, took: dict[str, np.ndarray], seen: dict[str, list[Sent]]
) -> Iterator[Row]:
    beyond = np.concatenate([sent.took_s - forward_n[sent.body_n] for sent in seen["service"]])
    note = f"{bodies.tokens_n.mean():.0f} tokens a request; the generator sent {seen['service'][0].late_ms:.1f} ms late"
    yield measured("Half load, one cell a request", capacity / 2, "requests/s", note=note)
    yield measured("  bare forward pass, median", 1e3 * float(np.median(forward_n)), "ms")
    for name, text in (("floor", "Ray Serve's floor"), ("service", "the service"), ("by chance", "arrivals by chance")):
        for percent in (50, 99):
            yield measured(f"  {text}, p{percent}", 1e3 * float(np.percentile(took[name], percent)), "ms")
    for percent, bar in ((50, ADDED_P50_MS), (99, ADDED_P99_MS)):
        added = 1e3 * float(np.percentile(beyond, percent) - np.percentile(took["floor"], percent))
        yield at_most(f"Added over floor and forward, p{percent}", added, "ms", bar)
    queue = np.concatenate([_ideal_s(sent, forward_n) for sent in seen["by chance"]])
    added = 1e3 * float(np.percentile(took["by chance"] - queue, 50) - np.percentile(took["floor"], 50))
    yield measured("  the same by chance, beyond one perfect queue, p50", added, "ms")


def _capacity(load: Load, seconds: float) -> float:
    """Requests per second with always more of them waiting."""
    sent = send(dataclasses.replace(load, clients=8, seconds=seconds))
    _check_all(sent)
    return len(sent.status_n) / sent.span_s


def _took(sents: list[Sent]) -> np.ndarray:
    return np.concatenate([sent.took_s for sent in sents])


def _ideal_s(sent: Sent, forward_n: np.ndarray) -> np.ndarray:
    """Waiting and forward pass of the same arrivals at one server that does nothing else."""
    order, free, ideal = np.argsort(sent.due_n), 0.0, np.empty(len(sent.due_n))
    for at in order:
        free = max(free, sent.due_n[at]) + forward_n[sent.body_n[at]]
        ideal[at] = free - sent.due_n[at]
    return ideal


# --- batching and bodies ---------------------------------------------------------------------------------------------


def batching(here: Stand) -> Iterator[Row]:
    """Short cells, of the 10M encoder and of a tiny one: on a CPU a pass costs as much as its cells one by one."""
    seconds = 4.0 if here.quick else 10.0
    shapes = {"10M": here.bundle, "tiny": random_bundle("tiny", here.pool, here.scratch / "tiny")}
    for name, bundle in shapes.items():
        cells = [cell[:64] for cell in here.cells(256)]
        together, single = here.bodies(cells, 64), here.bodies(cells[:64], 1)
        rates: dict[str, float] = {}
        for text, config in (("on", {}), ("off", {"tokens_per_batch": 1, "batch_wait_s": 0.0})):
            with dataclasses.replace(here, bundle=bundle).service(**config) as port:
                send(single.load(port, clients=4, seconds=1.0))
                rates[f"shared, {text}"] = _cells_per_s(single.load(port, clients=16, seconds=seconds), single)
                if text == "on":
                    rates["one"] = _cells_per_s(single.load(port, clients=1, seconds=seconds), single)
                    rates["many"] = _cells_per_s(together.load(port, clients=3, seconds=seconds), together)
        note = f"{name} encoder, 64 tokens a cell; one at a time: one client, one cell a request"
        yield times_faster(f"64 cells a request, {name}", rates["many"], rates["one"], "cells/s", BATCHING, note=note)
        for text in ("on", "off"):
            row = measured(f"  16 clients of one cell, shared passes {text}", rates[f"shared, {text}"], "cells/s")
            yield dataclasses.replace(row, baseline=rates["one"], ratio=rates[f"shared, {text}"] / rates["one"])


def _cells_per_s(load: Load, bodies: Bodies) -> float:
    sent = send(load)
    _check_all(sent)
    return sum(len(bodies.cells[at]) for at in sent.body_n) / sent.span_s


def bodies(here: Stand) -> Iterator[Row]:
    """The same cells in both forms to a tiny encoder, in turn; what is compared is the HTTP side's processor time."""
    requests, rounds = (12, 1) if here.quick else (40, 3)
    tiny = dataclasses.replace(here, bundle=random_bundle("tiny", here.pool, here.scratch / "tiny-bodies"))
    cells = here.cells(64)
    forms = {"Arrow": tiny.bodies(cells, 32), "JSON": tiny.bodies(cells, 32, JSON_TYPE)}
    used: dict[str, list[float]] = {name: [] for name in forms}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    with tiny.service() as port:
        for made in forms.values():
            send(made.load(port, clients=2, requests=4))
        for _ in range(rounds):
            for name, made in forms.items():
                before = cpu_s(("http", "proxy"))
                rates[name].append(_cells_per_s(made.load(port, clients=2, requests=requests), made))
                after = cpu_s(("http", "proxy"))
                spent = sum(after.values()) - sum(before.values())
                used[name].append(1e6 * spent / (requests * len(made.cells[0])))
    arrow, json = (statistics.median(used[name]) for name in ("Arrow", "JSON"))
    sizes = ", ".join(f"{name} {made.size_bytes / 32 / 1024:.1f} KiB a cell" for name, made in forms.items())
    row = measured("HTTP side and proxy, Arrow against JSON", arrow, "ms of a processor per 1,000 cells", note=sizes)
    yield dataclasses.replace(row, baseline=json, ratio=arrow / json)
    rate = {name: statistics.median(rates[name]) for name in forms}
    row = measured("  cells per second, tiny encoder", rate["Arrow"], "cells/s")
    yield dataclasses.replace(row, baseline=rate["JSON"], ratio=rate["Arrow"] / rate["JSON"])


# --- the gate --------------------------------------------------------------------------------------------------------


def gate(here: Stand) -> Iterator[Row]:
    """An application that answers at once, bare and behind the gate, in this process; in turn."""
    from genescale.platform.settings import Secret
    from genescale.serving.config import ServingConfig
    from genescale.serving.gate import Gate

    key = "benchmark-key-0123456789"
    guarded = Gate(_null_application, ServingConfig(api_keys=(Secret(key),)))
    calls = GATE_CALLS // 10 if here.quick else GATE_CALLS
    for size, text in ((2_000, "2 kB"), (1_000_000, "1 MB")):
        request = _request(b"x" * size, key)
        works = {
            name: lambda one=one, request=request: _call(one, request, calls)
            for name, one in (("bare", _null_application), ("gate", guarded))
        }
        spent = in_turn(works)
        cost = 1e6 * (spent["gate"].cpu_s - spent["bare"].cpu_s) / calls
        yield measured(f"The gate, a body of {text}", cost, "µs of a processor per request", note=f"{calls} requests")


async def _null_application(scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def _request(body: bytes, key: str) -> tuple[Message, list[bytes]]:
    headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers, "client": ("127.0.0.1", 9)}
    # uvicorn hands a body over in pieces of 64 KiB.
    return scope, [body[at : at + 65_536] for at in range(0, len(body), 65_536)]


def _call(application: Any, request: tuple[Message, list[bytes]], calls: int) -> None:
    scope, pieces = request

    async def one() -> None:
        left = list(reversed(pieces))

        async def receive() -> Message:
            if not left:
                await asyncio.sleep(3600)
            piece = left.pop()
            return {"type": "http.request", "body": piece, "more_body": bool(left)}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] != 200:
                raise RuntimeError(f"the gate answered {message['status']}")

        await application(dict(scope), receive, answer)

    async def all_calls() -> None:
        for _ in range(calls):
            await one()

    asyncio.run(all_calls())


PARTS: dict[str, Callable[[Stand], Iterator[Row]]] = {
    "saturation": saturation, "latency": latency, "batching": batching, "bodies": bodies, "gate": gate,
    "flood": flood, "chaos": chaos, "rollout": rollout,
}  # fmt: skip


if __name__ == "__main__":
    began = time.monotonic()
    status = main()
    print(f"{time.monotonic() - began:,.0f} s")
    sys.exit(status)
