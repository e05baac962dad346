"""An S3 endpoint on loopback for the demo and the tests, kept durable by mirroring its bucket into a folder.

The endpoint (moto's server) holds objects in memory. The demo therefore copies the bucket into its work folder
whenever a stage is finished, and fills the endpoint from there when it is started again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path

from genescale.platform.settings import Secret, StorageSettings
from genescale.platform.storage import Store, join


@contextlib.contextmanager
def embedded_endpoint() -> Iterator[StorageSettings]:
    """Serve S3 on a free loopback port for the length of the block; yields the settings that reach it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield StorageSettings(
            endpoint_url=f"http://{host}:{port}",
            access_key_id=Secret("demo"),
            secret_access_key=Secret(secrets.token_hex(16)),
        )
    finally:
        server.stop()


def save_bucket(store: Store, bucket: str, folder: Path) -> None:
    """Make `folder` an exact copy of the bucket: new and changed objects are fetched, vanished ones removed."""
    folder.mkdir(parents=True, exist_ok=True)
    index = _index(folder)
    known: dict[str, str] = json.loads(index.read_text()) if index.is_file() else {}
    kept: dict[str, str] = {}
    for entry in store.list(bucket):
        name = entry.uri.removeprefix(f"{bucket}/")
        copy = Path(join(str(folder), *name.split("/")))
        if known.get(name) != entry.etag or not copy.is_file():
            store.download(entry.uri, copy)
        kept[name] = entry.etag
    # The index first, because whatever it names must be there.
    store.write(str(index), json.dumps(kept, indent=1, sort_keys=True).encode())
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()


def load_bucket(store: Store, bucket: str, folder: Path) -> int:
    """Create the bucket and fill it from `folder`, a copy made by `save_bucket`; returns the number of objects.

    Only what the copy's index names is taken: a file of a copy that was interrupted is left out.
    """
    store.create_bucket(bucket)
    index = _index(folder)
    names = json.loads(index.read_text()) if index.is_file() else {}
    for name in names:
        store.upload(Path(join(str(folder), *name.split("/"))), join(bucket, *name.split("/")))
    return len(names)


def _index(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
