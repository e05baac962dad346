"""Models in the memory of one replica: several beside each other, up to a number of bytes.

What is asked for and not there is loaded on a thread, while others answer. When room is needed, the model that was used
longest ago leaves, but never one that is working: its requests would fail, or its memory would not come free.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from genescale.platform.errors import GenescaleError, LimitError, ServiceError
from genescale.platform.log import get_logger
from genescale.serving.release import Release

# Texts of other software stand in some of our errors. A model's own address (models:/…) may be said.
PLACE = re.compile(r"[A-Za-z0-9+.-]+://[^\s'\"]+|(?<![\w:])/[^\s'\":,]+")
Opened = TypeVar("Opened")
Model = TypeVar("Model")
log = get_logger(__name__)


@dataclass(eq=False)
class _Entry(Generic[Model]):
    model: Model
    size_bytes: int
    working: int = 0
    retired: bool = False


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """One model that is loaded, and how many requests it works on."""

    digest: str
    size_bytes: int
    working: int


class HeldModels(Generic[Opened, Model]):
    """The models of one event loop, by digest, the one used longest ago first.

    `open_release` fetches and verifies what a release names, `size_of` says how much memory it will take, `load` makes
    it a model; all but `size_of` run on a thread.
    """

    def __init__(
        self,
        open_release: Callable[[Release], Opened],
        size_of: Callable[[Opened], int],
        load: Callable[[Opened], Model],
        *,
        max_bytes: int,
    ) -> None:
        self._open, self._size_of, self._load, self.max_bytes = open_release, size_of, load, max_bytes
        self._held: dict[str, _Entry[Model]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        # One at a time: each needs more memory while it loads than afterwards.
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="genescale-load")

    @property
    def models(self) -> Iterator[Model]:
        """All that are loaded."""
        return (entry.model for entry in list(self._held.values()))

    @property
    def facts(self) -> list[HeldModel]:
        """What is loaded."""
        return [
            HeldModel(digest=digest, size_bytes=entry.size_bytes, working=entry.working)
            for digest, entry in self._held.items()
        ]

    def start_with(self, releases: Collection[Release]) -> None:
        """Load these, the most important first, before anything is asked; what has no room comes when it is asked for.

        Raises LimitError when the first is too large, and whatever loading it raises.
        """
        for at, release in enumerate(releases):
            if release.digest in self._held:
                continue
            opened = self._open(release)
            size_bytes = self._checked_size(opened, release)
            if at and self._used_bytes + size_bytes > self.max_bytes:
                log.warning("no room for '%s' version %s yet: it is loaded when asked", release.name, release.version)
                continue
            self._held[release.digest] = _Entry(self._load(opened), size_bytes)

    @contextlib.asynccontextmanager
    async def borrowed(self, release: Release) -> AsyncIterator[Model]:
        """The model of a release for the length of the block; loaded first where it is not there.

        Raises ServiceError when it cannot be loaded.
        """
        while (entry := self._held.get(release.digest)) is None:
            try:
                await self._arrive(release, beside=())
            except Exception as error:
                log.error("a model could not be loaded", exc_info=error)
                raise ServiceError(
                    f"'{release.name}' version {release.version} could not be loaded.",
                    fix="Ask again; the log of the service says why.",
                ) from None
        self._held[release.digest] = self._held.pop(release.digest)
        entry.working += 1
        try:
            yield entry.model
        finally:
            entry.working -= 1
            if not entry.working:
                self._idle(release.digest, entry)

    async def hold(self, release: Release, *, beside: Collection[str]) -> int:
        """Load a release now, while the models with these digests stay; returns its bytes.

        Raises LimitError when there can be no room beside them, and whatever loading it raises.
        """
        while (entry := self._held.get(release.digest)) is None:
            await self._arrive(release, beside=beside)
        entry.retired = False
        return entry.size_bytes

    def retire(self, digest: str) -> None:
        """Drop a model, now or as soon as it has finished what it works on."""
        entry = self._held.get(digest)
        if entry is not None:
            entry.retired = True
            if not entry.working:
                self._idle(digest, entry)

    @property
    def _used_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._held.values())

    def _idle(self, digest: str, entry: _Entry[Model]) -> None:
        if entry.retired:
            del self._held[digest]
        self._freed.set()

    async def _arrive(self, release: Release, *, beside: Collection[str]) -> None:
        """Return when the release is there. A load goes on when who asked for it leaves: others may wait for it."""
        if release.digest in self._held:
            return
        task = self._loading.get(release.digest)
        if task is None:
            task = asyncio.create_task(self._bring(release, beside))
            self._loading[release.digest] = task
            task.add_done_callback(lambda done: self._arrived(release.digest, done))
        await asyncio.shield(task)

    def _arrived(self, digest: str, task: asyncio.Task[None]) -> None:
        self._loading.pop(digest, None)
        # Read here as well: nobody may be waiting for it any more.
        if not task.cancelled():
            task.exception()

    async def _bring(self, release: Release, beside: Collection[str]) -> None:
        loop = asyncio.get_running_loop()
        async with self._turn:
            opened = await loop.run_in_executor(self._thread, self._open, release)
            size_bytes = self._checked_size(opened, release)
            await self._make_room(size_bytes, release, beside)
            model = await loop.run_in_executor(self._thread, self._load, opened)
            self._held[release.digest] = _Entry(model, size_bytes)

    def _checked_size(self, opened: Opened, release: Release) -> int:
        size_bytes = self._size_of(opened)
        if size_bytes > self.max_bytes:
            raise LimitError(
                f"'{release.name}' version {release.version} takes {size_bytes:,} bytes; a replica may hold "
                f"{self.max_bytes:,}.",
                where="max_model_bytes",
                fix="Raise it, if the machine has the memory.",
            )
        return size_bytes

    async def _make_room(self, size_bytes: int, release: Release, beside: Collection[str]) -> None:
        staying = sum(entry.size_bytes for digest, entry in self._held.items() if digest in beside)
        if staying + size_bytes > self.max_bytes:
            raise LimitError(
                f"'{release.name}' version {release.version} takes {size_bytes:,} bytes beside {staying:,} that stay "
                f"loaded; a replica may hold {self.max_bytes:,}.",
                where="max_model_bytes",
                fix="Raise it, or deploy the version anew instead of beside the running one.",
            )
        while self._used_bytes + size_bytes > self.max_bytes:
            leaving = next((d for d, e in self._held.items() if not e.working and d not in beside), None)
            if leaving is not None:
                del self._held[leaving]
                continue
            self._freed.clear()
            await self._freed.wait()


def why(error: BaseException) -> str:
    """What went wrong, for an operator who asks over HTTP: without a path or an address, which the log has."""
    if isinstance(error, GenescaleError):
        return PLACE.sub("…", f"{error.what} {error.fix}".strip())
    return f"{type(error).__name__}; the log of the service has the trace."
