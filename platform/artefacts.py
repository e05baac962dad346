"""The files of a run or of a registered model, wherever the tracker keeps them.

`StoredArtefacts` lie in a folder or in object storage and are reached by our own Store; `ServerArtefacts` lie behind an
MLflow server, which hands them out itself.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from genescale.platform.address import join
from genescale.platform.disk import check_size
from genescale.platform.errors import NotFoundError
from genescale.platform.settings import StorageSettings
from genescale.platform.storage import Store

# Only small files, such as a manifest, are read whole.
READ_MAX_BYTES = 4 * 1024 * 1024


class Artefacts(Protocol):
    """A folder of files. Names and folders are relative and may not lead out of it."""

    def put_file(self, path: Path, folder: str = "") -> None:
        """Copy a local file into `folder`."""

    def put_folder(self, path: Path, folder: str = "") -> None:
        """Copy everything in a local folder into `folder`."""

    def read(self, name: str) -> bytes:
        """Content of one small file; NotFoundError when it is not there."""

    def fetch(self, to: Path) -> None:
        """Copy everything to the local folder `to`; NotFoundError when there is nothing."""


class StoredArtefacts:
    """Artefacts below an address that the Store can reach."""

    def __init__(self, storage: StorageSettings, root: str) -> None:
        self._store, self._root = Store(storage), root

    def put_file(self, path: Path, folder: str = "") -> None:
        """Copy a local file into `folder`."""
        self._store.upload(path, below(self._root, folder, path.name))

    def put_folder(self, path: Path, folder: str = "") -> None:
        """Copy everything in a local folder into `folder`."""
        self._store.upload_folder(path, below(self._root, folder))

    def read(self, name: str) -> bytes:
        """Content of one small file."""
        return self._store.read(join(self._root, name), max_bytes=READ_MAX_BYTES)

    def fetch(self, to: Path) -> None:
        """Copy everything to the local folder `to`."""
        self._store.download_folder(self._root, to)


class ServerArtefacts:
    """Artefacts of the run `run_id` below `root`, through the artefact service of an MLflow server.

    `client` is an MlflowClient; `errors` translates its exceptions.
    """

    def __init__(self, client: Any, run_id: str, root: str, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._client, self._run_id, self._root, self._errors = client, run_id, root, errors

    def put_file(self, path: Path, folder: str = "") -> None:
        """Copy a local file into `folder`."""
        with self._errors():
            self._client.log_artifact(self._run_id, str(path), self._named(folder))

    def put_folder(self, path: Path, folder: str = "") -> None:
        """Copy everything in a local folder into `folder`."""
        with self._errors():
            self._client.log_artifacts(self._run_id, str(path), self._named(folder))

    def read(self, name: str) -> bytes:
        """Content of one small file."""
        wanted = self._named(name)
        with self._errors(), scratch_folder() as scratch:
            listed = self._client.list_artifacts(self._run_id, wanted.rpartition("/")[0] if wanted else None)
            sizes = {found.path: found.file_size for found in listed if not found.is_dir}
            if wanted not in sizes:
                raise self._nothing(wanted)
            check_size(self._where(wanted), sizes[wanted] or 0, READ_MAX_BYTES)
            return Path(self._client.download_artifacts(self._run_id, wanted, str(scratch))).read_bytes()

    def fetch(self, to: Path) -> None:
        """Copy everything to the local folder `to`."""
        with self._errors(), scratch_folder() as scratch:
            if not self._client.list_artifacts(self._run_id, self._root or None):
                raise self._nothing(self._root)
            fetched = self._client.download_artifacts(self._run_id, self._root, str(scratch))
            shutil.copytree(fetched, to, dirs_exist_ok=True)

    def _named(self, name: str) -> str:
        return below("artefacts", self._root, name).removeprefix("artefacts").removeprefix("/")

    def _where(self, name: str) -> str:
        return f"runs:/{self._run_id}/{name}"

    def _nothing(self, name: str) -> NotFoundError:
        return NotFoundError("the run has no such artefact.", where=self._where(name), fix="Check its name in MLflow.")


def below(root: str, *parts: str) -> str:
    """Join the parts that are not empty."""
    return join(root, *(part for part in parts if part))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty local folder that is removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="genescale-") as folder:
        yield Path(folder)
