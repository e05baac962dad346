"""The load generator of the benchmark of the service: a process of its own, told by JSON on its standard input.

    closed    `clients` connections, each with one request at a time
    open      requests at given times, whether or not others were answered (a refusal costs the sender no patience)
    retrying  `clients` callers with the product's client, which tries again `attempts` times

HTTP/1.1 is spoken on plain sockets, with requests that were rendered beforehand: httpx would need more processor time
than the service. The result goes to standard output as JSON: one row for each request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = tuple[float, float, float, int, int]
"""Due, sent and ended (monotonic seconds), status (0 for no answer), and which body was sent."""
NO_ANSWER = 0
READ_BYTES = 1 << 18
PAUSE_S = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent, where, and when."""

    port: int
    path: str
    bodies: Sequence[str]
    """Files, sent in turn."""
    content_type: str
    accept: str
    mode: str = "closed"
    clients: int = 1
    seconds: float = 10.0
    requests: int = 0
    """Stop after so many; 0 for no such end."""
    rate: float = 0.0
    """Requests a second of the open mode."""
    arrivals: str = "even"
    """Of the open mode: even, or poisson."""
    seed: int = 0
    timeout_s: float = 90.0
    attempts: int = 1
    """Of the retrying mode."""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expected: str = ""
    """Of the retrying mode: a .npy file `(version, body, cell, width)` with what is right; all else is wrong."""
    keep: str = ""
    """Of the closed mode: folder for the answer to each body."""


class Sent:
    """What became of a load."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        rows = np.array(result["rows"], dtype=np.float64).reshape(-1, 5)
        self.due_n, self.sent_n, self.ended_n = rows[:, 0], rows[:, 1], rows[:, 2]
        self.status_n, self.body_n = rows[:, 3].astype(int), rows[:, 4].astype(int)
        self.cpu_share: float = result["cpu_s"] / max(result["wall_s"], 1e-9)
        self.wrong: int = result["wrong"]
        self.problems: Mapping[str, int] = result["problems"]

    @property
    def ok_n(self) -> np.ndarray:
        return self.status_n == 200

    @property
    def took_s(self) -> np.ndarray:
        """From when a request was due, so that a sender who is late hides nothing."""
        return self.ended_n - self.due_n

    @property
    def span_s(self) -> float:
        return float(self.ended_n.max() - self.due_n.min())

    @property
    def late_ms(self) -> float:
        """How late the generator itself was, 99th percentile."""
        return float(1000 * np.percentile(self.sent_n - self.due_n, 99))


class Sending:
    """A load that is under way in another process."""

    def __init__(self, load: Load) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(load)))
        self._process.stdin.close()

    def result(self) -> Sent:
        """Wait for its end."""
        assert self._process.stdout is not None
        text = self._process.stdout.read()
        if self._process.wait():
            raise RuntimeError("the load generator failed; its error stands above.")
        return Sent(json.loads(text))


def send(load: Load) -> Sent:
    """A load from its begin to its end."""
    return Sending(load).result()


# --- in the other process --------------------------------------------------------------------------------------------


class Connection:
    """One connection that is kept open; opened again when it was cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body; OSError or IncompleteReadError when the connection is cut."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=READ_BYTES)
            reader, writer = self._streams
            writer.write(request)
            return await self._answer(reader)
        except BaseException:
            self.close()
            raise

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in head:
            body = b"".join([piece async for piece in _chunks(reader)])
        else:
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        if b"connection: close" in head:
            self.close()
        return status, body

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _chunks(reader: asyncio.StreamReader) -> Any:
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)


class Generator:
    """Carries out one load."""

    def __init__(self, load: Load) -> None:
        self.load, self.rows = load, list[Row]()
        self.wrong, self.problems = 0, dict[str, int]()
        self.requests = [_rendered(load, Path(body).read_bytes()) for body in load.bodies]
        self._idle: list[Connection] = []
        self._kept: set[int] = set()

    async def closed(self) -> None:
        """Each client asks when it was answered."""
        turns = self._turns()

        async def client() -> None:
            for at in turns:
                await self._ask(at, time.monotonic())

        await asyncio.gather(*(client() for _ in range(self.load.clients)))

    def _turns(self) -> Iterator[int]:
        until_s = time.monotonic() + self.load.seconds
        most = self.load.requests or sys.maxsize
        for n in range(most):
            if time.monotonic() >= until_s and not self.load.requests:
                return
            yield n % len(self.requests)

    async def open(self) -> None:
        """Each request leaves when it is due."""
        began, tasks = time.monotonic(), list[asyncio.Task[None]]()
        for n, after_s in enumerate(_arrivals(self.load)):
            due = began + after_s
            if (wait_s := due - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(asyncio.create_task(self._ask(n % len(self.requests), due)))
        await asyncio.gather(*tasks)

    async def retrying(self) -> None:
        """Each caller asks through the product's client, and compares what it is told with what is right."""
        from genescale.client import AsyncGenescaleClient
        from genescale.client.arrow_bodies import _embeddings_in
        from genescale.client.questions import Question
        from genescale.platform.errors import GenescaleError

        expected = np.load(self.load.expected)
        headers = {"Content-Type": self.load.content_type, "Accept": self.load.accept, **self.load.headers}
        questions = [
            Question(
                method="POST",
                path=self.load.path,
                content=Path(body).read_bytes(),
                headers=headers,
                read=lambda response: _embeddings_in(response.content).embeddings,
            )
            for body in self.load.bodies
        ]
        url, turns = f"http://127.0.0.1:{self.load.port}", self._turns()

        async def caller() -> None:
            async with AsyncGenescaleClient(url, attempts=self.load.attempts, timeout_s=self.load.timeout_s) as client:
                for at in turns:
                    began, status = time.monotonic(), 200
                    try:
                        found = await client.ask(questions[at])
                        self.wrong += not any(np.array_equal(found, right) for right in expected[:, at])
                    except GenescaleError as error:
                        status = NO_ANSWER
                        self._count(f"{error.code}: {error.what}")
                    self.rows.append((began, began, time.monotonic(), status, at))
                    if status == NO_ANSWER:
                        # Else the callers of a closed door would be all that is counted.
                        await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(caller() for _ in range(self.load.clients)))

    async def _ask(self, at: int, due: float) -> None:
        connection = self._idle.pop() if self._idle else Connection(self.load.port)
        sent = time.monotonic()
        try:
            async with asyncio.timeout(self.load.timeout_s):
                status, body = await connection.ask(self.requests[at])
        except (OSError, EOFError, TimeoutError) as error:
            status, body = NO_ANSWER, b""
            self._count(type(error).__name__)
        self.rows.append((due, sent, time.monotonic(), status, at))
        self._idle.append(connection)
        if status not in (200, 429, NO_ANSWER):
            self._count(f"{status} {body[:120].decode(errors='replace')}")
        if self.load.keep and status == 200 and at not in self._kept:
            self._kept.add(at)
            Path(self.load.keep, f"{at}.answer").write_bytes(body)

    def _count(self, problem: str) -> None:
        self.problems[problem] = self.problems.get(problem, 0) + 1


def _arrivals(load: Load) -> Iterator[float]:
    """Seconds from the begin, at the rate of the load."""
    draws, at = random.Random(load.seed), 0.0
    while at < load.seconds:
        yield at
        at += draws.expovariate(load.rate) if load.arrivals == "poisson" else 1 / load.rate


def _rendered(load: Load, body: bytes) -> bytes:
    headers = {
        "Host": "127.0.0.1",
        "Content-Type": load.content_type,
        "Accept": load.accept,
        "Content-Length": str(len(body)),
        **load.headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {load.path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def main() -> int:
    generator = Generator(Load(**json.load(sys.stdin)))
    modes = {"closed": generator.closed, "open": generator.open, "retrying": generator.retrying}
    before, began = _cpu_s(), time.monotonic()
    asyncio.run(modes[generator.load.mode]())
    result = {
        "rows": generator.rows,
        "cpu_s": _cpu_s() - before,
        "wall_s": time.monotonic() - began,
        "wrong": generator.wrong,
        "problems": generator.problems,
    }
    json.dump(result, sys.stdout)
    return 0


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
