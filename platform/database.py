"""The SQLite file in which a laptop keeps its runs and models."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from genescale.platform.address import shown
from genescale.platform.disk import disk_errors
from genescale.platform.errors import SettingsError, TrackingError


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
