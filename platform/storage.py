"""One Store for local folders and object storage: the only file that talks to S3.

Addresses are `s3://bucket/key` or paths (see `address.py`). The promises are the same on both sides: a file appears
whole or not at all, a create can be conditional, a read can be a range; nothing outside the allowed roots is touched.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from genescale.platform.address import Entries, Place, parse, shown, within
from genescale.platform.address import Entry as Entry
from genescale.platform.address import is_remote as is_remote
from genescale.platform.address import join as join
from genescale.platform.disk import Disk
from genescale.platform.errors import ForbiddenPathError, NotFoundError, SettingsError, StorageError
from genescale.platform.objects import Objects
from genescale.platform.settings import StorageSettings

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

CONNECTIONS = 16


class Store:
    """Reads and writes files by address, locally and in object storage.

    Picklable (clients are made anew in each process) and usable from several threads. Methods raise the StorageError
    family: NotFoundError, AlreadyExistsError, ForbiddenPathError, or StorageError with what to do.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self.settings = settings
        self._roots = tuple(parse(root) for root in settings.allowed_roots)
        self._disk = Disk()
        self._connection = S3Connection(settings)
        self._objects = Objects(self._connection)

    def __reduce__(self) -> tuple[object, ...]:
        return (Store, (self.settings,))

    def read(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        """The whole content; LimitError when it is larger than `max_bytes`."""
        place = self._file(uri)
        return self._half(place).read(place, max_bytes)

    def read_range(self, uri: str, start: int, length: int) -> bytes:
        """`length` bytes from byte `start`; fewer, or none, at the end of the file."""
        if start < 0 or length < 0:
            raise ValueError(f"start and length must not be negative, got {start} and {length}")
        place = self._file(uri)
        return self._half(place).read_range(place, start, length)

    def open(self, uri: str) -> BinaryIO:
        """A seekable file for reading; in object storage over ranged reads with a small cache of 8 MiB blocks.

        An object that is replaced while it is open raises StorageError at the next read, never a mixture.
        """
        place = self._file(uri)
        return self._half(place).open(place)

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> Entry:
        """Store `data` whole; with `if_absent`, AlreadyExistsError when something is there, even in a race.

        When the answer to a conditional create is lost on the way, its repeat finds our own object: compare contents
        before treating AlreadyExistsError as another writer's work.
        """
        place = self._file(uri)
        return self._half(place).write(place, data, if_absent)

    def stat(self, uri: str) -> Entry:
        """Size and tag; NotFoundError when nothing, or only a folder, has that address."""
        place = self._file(uri)
        return self._half(place).stat(place)

    def exists(self, uri: str) -> bool:
        """True when a file (not a folder) has that address."""
        place = self._file(uri)
        return self._half(place).exists(place)

    def list(self, prefix: str) -> Entries:
        """All files below a folder, however deep, sorted by address; the address of a file gives that file."""
        place = self._place(prefix)
        return self._checked(self._half(place).list(place))

    def glob(self, pattern: str) -> Entries:
        """All files that fit, sorted by address: `*`, `?` and `[…]` within one part, `**` across parts."""
        place = self._place(pattern)
        return self._checked(self._half(place).glob(place))

    def delete(self, uri: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        place = self._file(uri)
        self._half(place).delete(place)

    def delete_folder(self, prefix: str) -> None:
        """Remove everything below a folder; ForbiddenPathError for a whole bucket, `/` or the home folder."""
        place = self._place(prefix)
        self._half(place).delete_folder(place)

    def download(self, uri: str, to: Path, *, max_bytes: int | None = None) -> Path:
        """Copy a file to the local path `to`, whole or not at all; returns `to`.

        `to`, like the `path` of an upload, is chosen by the program and is not held to the allowed roots.
        """
        place = self._file(uri)
        self._half(place).download(place, to, max_bytes)
        return to

    def upload(self, path: Path, uri: str, *, if_absent: bool = False) -> Entry:
        """Store a copy of the local file `path`, in parts when it is large."""
        place = self._file(uri)
        return self._half(place).upload(path, place, if_absent)

    def download_folder(self, uri: str, to: Path) -> Path:
        """Copy every file below `uri` to the same relative place in the local folder `to`; returns `to`."""
        place = self._place(uri)
        found = [entry for entry in self.list(uri) if entry.uri != place.uri]
        if not found:
            raise NotFoundError("no files below this folder.", where=shown(place.uri), fix="Check the address.")
        for entry in found:
            # A key of a foreign bucket may hold anything, so it is joined as carefully as a user's input.
            name = entry.uri.removeprefix(place.uri).lstrip("/")
            self.download(entry.uri, Path(join(str(to), name)))
        return to

    def upload_folder(self, path: Path, uri: str) -> Entries:
        """Store every file below the local folder `path` at the same relative place below `uri`."""
        if not path.is_dir():
            raise NotFoundError("no such folder.", where=str(path), fix="Check the path.")
        files = [Path(entry.uri) for entry in self._disk.list(parse(path))]
        return [self.upload(file, join(uri, file.relative_to(path.absolute()).as_posix())) for file in files]

    def presigned(self, uri: str, *, valid_s: int, name: str = "") -> str:
        """A link to an object that works for `valid_s` seconds without a key; empty for a file of this machine.

        Who follows it gets the content as a file called `name`. The link names the id of the access key, never its
        secret. Nothing says whether the object is there.
        """
        place = self._file(uri)
        return self._objects.presigned(place, valid_s, name) if place.bucket else ""

    def create_bucket(self, uri: str) -> None:
        """Make the bucket (or the local folder) of an address, unless it is there and ours."""
        place = self._place(uri)
        if place.bucket:
            self._objects.create_bucket(place)
        else:
            place.path.mkdir(parents=True, exist_ok=True)

    def arrow_filesystem(self, uri: str) -> tuple[FileSystem, str]:
        """A pyarrow file system with these settings, and the path of `uri` within it."""
        from pyarrow.fs import LocalFileSystem

        place = self._place(uri)
        if not place.bucket:
            return LocalFileSystem(), place.key
        return self._connection.arrow_filesystem(), f"{place.bucket}/{place.key}".rstrip("/")

    def table_options(self, uri: str) -> dict[str, str]:
        """`storage_options` for delta-rs and Polars; they hold the secret key, so they must not be logged."""
        return self._connection.table_options() if self._place(uri).bucket else {}

    def _place(self, uri: str) -> Place:
        place = parse(uri)
        if self._roots and not within(place, self._roots):
            raise ForbiddenPathError(
                "outside the allowed roots.", where=shown(str(uri)), fix="Add its folder to storage.allowed_roots."
            )
        return place

    def _file(self, uri: str) -> Place:
        place = self._place(uri)
        if not place.key:
            raise StorageError("names a bucket, not a file.", where=place.uri, fix="Write s3://bucket/key.")
        return place

    def _half(self, place: Place) -> Disk | Objects:
        return self._objects if place.bucket else self._disk

    def _checked(self, entries: Entries) -> Entries:
        # Links found by walking a local folder may lead out of the roots.
        if self._roots:
            for entry in entries:
                if not is_remote(entry.uri):
                    self._place(entry.uri)
        return sorted(entries, key=lambda entry: entry.uri)


class S3Connection:
    """Makes S3 clients, Arrow file systems and table options from settings.

    When the settings name keys, nothing is taken from the environment: neither another endpoint nor a profile.
    """

    def __init__(self, settings: StorageSettings) -> None:
        if bool(settings.access_key_id) != bool(settings.secret_access_key):
            raise SettingsError(
                "storage.access_key_id and storage.secret_access_key go together, but only one is set.",
                fix="Set both, or neither to use the usual AWS sources.",
            )
        # Only what boto3, Arrow and delta-rs all understand; keys in it would be shown with the settings.
        if settings.endpoint_url and not re.fullmatch(r"https?://[^/@?#]+/?", settings.endpoint_url):
            raise SettingsError(
                f"storage.endpoint_url is '{shown(settings.endpoint_url)}'.",
                fix="Write http://host:port or https://host; keys go into storage.access_key_id.",
            )
        self._settings = settings
        self._lock = threading.Lock()
        self._client: Any = None
        self._client_process = 0

    @property
    def region(self) -> str:
        """The region that new buckets are made in."""
        return self._settings.region

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not stand in a message."""
        keys = (self._settings.access_key_id, self._settings.secret_access_key)
        return tuple(key.reveal() for key in keys if key)

    @property
    def endpoint(self) -> str:
        """The endpoint as configured, empty for the provider's own."""
        return self._settings.endpoint_url

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """Every class of error that the client raises on purpose."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError  # type: ignore[import-untyped]

        return (ClientError, BotoCoreError, Boto3Error, RetriesExceededError, S3DownloadFailedError)

    @property
    def client(self) -> Any:
        """The boto3 client of this process; connections do not survive a fork."""
        with self._lock:
            if self._client is None or self._client_process != os.getpid():
                self._client, self._client_process = self._connect(), os.getpid()
            return self._client

    def _connect(self) -> Any:
        import boto3
        import botocore.session
        from botocore.config import Config

        named = bool(self._settings.access_key_id)
        # Stores that are not AWS often do not know the newer checksum trailers, and the S3 protocol does not need them.
        checksums = "when_required" if self._settings.endpoint_url else "when_supported"
        config = Config(
            retries={"mode": "standard", "total_max_attempts": self._settings.attempts},
            connect_timeout=self._settings.connect_timeout_s,
            read_timeout=self._settings.read_timeout_s,
            max_pool_connections=CONNECTIONS,
            s3={"addressing_style": "path" if self._settings.endpoint_url else "auto"},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
            ignore_configured_endpoint_urls=named,
        )
        # No profile and empty files in place of those of AWS_PROFILE, AWS_CONFIG_FILE and the home folder.
        nothing: dict[str, Any] = {"profile": (None, [], None, None), "config_file": (None, [], os.devnull, None)}
        session = botocore.session.Session(session_vars=nothing if named else None)
        return boto3.session.Session(botocore_session=session).client(
            "s3",
            region_name=self._settings.region,
            endpoint_url=self._settings.endpoint_url or None,
            aws_access_key_id=self._settings.access_key_id.reveal() or None,
            aws_secret_access_key=self._settings.secret_access_key.reveal() or None,
            config=config,
        )

    def _pinned_endpoint(self) -> str:
        # Arrow and delta-rs would look in the environment for an endpoint that they are not given.
        if self._settings.endpoint_url or not self._settings.access_key_id:
            return self._settings.endpoint_url
        return str(self.client.meta.endpoint_url)

    def arrow_filesystem(self) -> FileSystem:
        """The pyarrow file system of these settings."""
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        options: dict[str, Any] = {"region": self._settings.region}
        if self._settings.access_key_id:
            options["access_key"] = self._settings.access_key_id.reveal()
            options["secret_key"] = self._settings.secret_access_key.reveal()
        if endpoint := self._pinned_endpoint():
            options["scheme"], options["endpoint_override"] = urlsplit(endpoint)[:2]
        return S3FileSystem(
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=self._settings.attempts),
            connect_timeout=self._settings.connect_timeout_s,
            request_timeout=self._settings.read_timeout_s,
            **options,
        )

    def table_options(self) -> dict[str, str]:
        """The options of these settings under the names that delta-rs and Polars share."""
        options = {
            "aws_region": self._settings.region,
            "aws_conditional_put": "etag",
            "connect_timeout": f"{self._settings.connect_timeout_s}s",
            "timeout": f"{self._settings.read_timeout_s}s",
        }
        if self._settings.access_key_id:
            options["aws_access_key_id"] = self._settings.access_key_id.reveal()
            options["aws_secret_access_key"] = self._settings.secret_access_key.reveal()
        if endpoint := self._pinned_endpoint():
            options["aws_endpoint_url"] = endpoint
            options["aws_virtual_hosted_style_request"] = "false"
            if endpoint.startswith("http://"):
                options["aws_allow_http"] = "true"
        return options
