"""A way for both clients into an application in this process, and objects to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anndata
import httpx
import numpy as np
import pandas as pd
import scipy.sparse as sp

from genescale.client import AsyncGenescaleClient, GenescaleClient

ARROW = "application/vnd.apache.arrow.stream"


class Wire(httpx.BaseTransport):
    """A transport for threads into an application on one event loop; `mend` may change an answer."""

    def __init__(self, app: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.inner, self.loop = httpx.ASGITransport(app=app, raise_app_exceptions=False), loop
        self.requests: list[httpx.Request] = []
        self.mend: Callable[[httpx.Request], httpx.Response | None] = lambda request: None
        self.inside, self.most_inside = 0, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self.answer(request), self.loop).result(timeout=30)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        request = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
        self.requests.append(request)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            mended = self.mend(request)
            if mended is not None:
                return mended
            response = await self.inner.handle_async_request(request)
            content = b"".join([part async for part in response.stream])  # type: ignore[union-attr]
            return httpx.Response(response.status_code, headers=response.headers, content=content)
        finally:
            self.inside -= 1

    @property
    def posted(self) -> list[httpx.Request]:
        return [request for request in self.requests if request.method == "POST"]


class AsyncWire(httpx.AsyncBaseTransport):
    """The same for the asynchronous client."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.wire.answer(request), self.wire.loop))


def call(kind: str, wire: Wire, method: str, *given: Any, bodies: str = "auto", **more: Any) -> Any:
    """One call of the client of this kind."""
    if kind == "sync":
        with GenescaleClient("http://service", transport=wire, sleep=lambda s: None, bodies=bodies) as client:
            return getattr(client, method)(*given, **more)

    async def sleep(seconds: float) -> None: ...

    async def ask() -> Any:
        transport = AsyncWire(wire)
        async with AsyncGenescaleClient("http://service", transport=transport, sleep=sleep, bodies=bodies) as client:
            return await getattr(client, method)(*given, **more)

    return asyncio.run(ask())


def object_of(counts_ng: np.ndarray, form: Callable[[np.ndarray], Any] = sp.csr_matrix) -> anndata.AnnData:
    obs = pd.DataFrame(index=[f"barcode-{i}" for i in range(len(counts_ng))])
    var = pd.DataFrame({"symbol": [f"GENE{i}" for i in range(counts_ng.shape[1])]})
    var.index = [f"ENSG{i:011d}" for i in range(counts_ng.shape[1])]
    return anndata.AnnData(X=form(counts_ng), obs=obs, var=var)
