"""The SQLite file in which a laptop keeps its runs and models."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from genescale.platform.address import shown
from genescale.platform.disk import disk_errors
from genescale.platform.errors import SettingsError, TrackingError


@contextmanager
def opened_by_one(uri: str) -> Iterator[None]:
    """Nobody else opens a database of the same folder inside the block; for other addresses, nothing.

    `uri` is `sqlite:///` and a path as it is written on disk, in a folder that is there.
    MLflow makes the tables of a new file when it opens it, and two processes that do so at once break it.
    """
    if not uri.startswith("sqlite:///"):
        yield
        return
    folder = os.open(Path(uri.removeprefix("sqlite:///")).absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def database_address(uri: str) -> str:
    """A SQLite address that does not depend on the working folder, and whose file can be opened.

    `uri` is `sqlite:///` and a path as it is written on disk. Raises SettingsError for other addresses, TrackingError
    when the file cannot be opened or is no database.
    """
    if not uri.startswith("sqlite:///"):
        raise SettingsError(
            f"tracking.uri is '{shown(uri)}'.", fix="Use sqlite:///path/mlflow.db or http(s)://host:port."
        )
    import sqlalchemy

    path = Path(uri.removeprefix("sqlite:///")).absolute()
    with disk_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Asked here, because MLflow tries again for minutes before it says that a file is no database.
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        raise TrackingError(f"{error}.", where=str(path), fix="Set tracking.uri to another file.") from error
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
