"""The remote half of the Store: operations on S3, and on everything that speaks its protocol.

The client comes from outside (`storage.py` makes it), so this file needs no S3 library.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from genescale.platform.address import REMOTE_PREFIX, WILDCARDS, Entries, Entry, Place, matches, split_pattern
from genescale.platform.block_reader import BlockReader
from genescale.platform.disk import already_exists, check_size, disk_errors, whole_file
from genescale.platform.errors import ForbiddenPathError, StorageError
from genescale.platform.object_errors import code_of, explain, no_such_bucket

# Larger files travel in parts of this size, several at a time; smaller ones in one request.
PART_BYTES = 16 * 1024 * 1024
MAX_PARTS = 10_000
TRANSFERS_AT_ONCE = 4
# A body that breaks off is asked for again this often; refused requests are repeated by the client itself.
BODY_ATTEMPTS = 3
Page = list[dict[str, Any]]
CONFLICT_PAUSES_S = (0.1, 0.2, 0.4, 0.8)


class Connection(Protocol):
    """What Objects needs: an S3 client, the classes of its errors, and where it connects."""

    @property
    def client(self) -> Any:
        """A boto3 S3 client, or one that behaves alike."""

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """Every class of error that the client raises on purpose."""

    @property
    def endpoint(self) -> str:
        """The endpoint as it may be shown, empty for the provider's own."""

    @property
    def region(self) -> str:
        """The region that new buckets are made in."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not stand in a message."""


class Objects:
    """Objects behind a connection. Every method takes a Place with a bucket."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def read(self, place: Place, max_bytes: int | None) -> bytes:
        """The whole content, at most `max_bytes` of it."""
        with self._errors(place):
            return self._body(place, max_bytes=max_bytes)

    def read_range(self, place: Place, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer at the end of the object."""
        if length == 0:
            return b""
        with self._errors(place):
            try:
                return self._body(place, Range=f"bytes={start}-{start + length - 1}")
            except Exception as error:
                if code_of(error) in ("InvalidRange", "416"):
                    return b""
                raise

    def open(self, place: Place) -> BinaryIO:
        """The object as a seekable file, pinned to the content it has now."""
        entry = self.stat(place)

        def fetch(start: int, length: int) -> bytes:
            with self._errors(place):
                return self._body(place, Range=f"bytes={start}-{start + length - 1}", IfMatch=f'"{entry.etag}"')

        return io.BufferedReader(BlockReader(entry.size_bytes, fetch))

    def write(self, place: Place, data: bytes, if_absent: bool) -> Entry:
        """Store `data`, in parts when it is large."""
        if len(data) > PART_BYTES:
            return self._write_parts(place, len(data), lambda start, end: data[start:end], if_absent)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._errors(place, creating=if_absent):
            answer = _repeated_on_conflict(
                lambda: self._connection.client.put_object(Bucket=place.bucket, Key=place.key, Body=data, **condition)
            )
        return Entry(place.uri, len(data), answer["ETag"].strip('"'))

    def upload(self, path: Path, place: Place, if_absent: bool) -> Entry:
        """Store a copy of the file `path`, in parts when it is large."""
        with disk_errors(str(path)), path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes <= PART_BYTES:
                return self.write(place, file.read(), if_absent)
            # Positioned reads, because several threads read the one file.
            return self._write_parts(
                place, size_bytes, lambda start, end: os.pread(file.fileno(), end - start, start), if_absent
            )

    def download(self, place: Place, to: Path, max_bytes: int | None) -> None:
        """Copy the object to `to`, in parts when it is large."""
        check_size(place.uri, self.stat(place).size_bytes, max_bytes)
        with disk_errors(str(to)), whole_file(to) as file:
            with self._errors(place):
                self._connection.client.download_fileobj(place.bucket, place.key, file)
            file.flush()
            check_size(place.uri, os.fstat(file.fileno()).st_size, max_bytes)

    def stat(self, place: Place) -> Entry:
        """Size and tag of an object."""
        with self._errors(place):
            try:
                return self._head(place)
            except Exception as error:
                if code_of(error) == "404":
                    self._require_bucket(place)
                raise

    def exists(self, place: Place) -> bool:
        """True for an object."""
        return bool(self._alone(place))

    def list(self, place: Place) -> Entries:
        """Every object below a folder, and the one of that very name."""
        below = self._listed(place, f"{place.key}/" if place.key else "")
        return [*self._alone(place), *below] if place.key else below

    def glob(self, place: Place) -> Entries:
        """Every object that fits a pattern."""
        folder, patterns = split_pattern(place.key)
        if not patterns:
            return self._alone(place)
        base = f"{folder}/" if folder else ""
        # Asking for as little as the pattern allows: its literal start, and one level when it has one.
        start = WILDCARDS.split(patterns[0])[0]
        one_level = {"Delimiter": "/"} if len(patterns) == 1 and patterns[0] != "**" else {}
        found = self._listed(place, base + start, **one_level)
        skip = len(f"{REMOTE_PREFIX}{place.bucket}/{base}")
        return [entry for entry in found if matches(entry.uri[skip:], patterns)]

    def presigned(self, place: Place, valid_s: int, name: str) -> str:
        """A link that works for `valid_s` seconds, to the object as a file called `name`."""
        what = {"Bucket": place.bucket, "Key": place.key}
        if name:
            what["ResponseContentDisposition"] = f'attachment; filename="{name}"'
        with self._errors(place):
            link: str = self._connection.client.generate_presigned_url("get_object", Params=what, ExpiresIn=valid_s)
        return link

    def delete(self, place: Place) -> None:
        """Remove an object if it is there."""
        with self._errors(place):
            self._connection.client.delete_object(Bucket=place.bucket, Key=place.key)

    def delete_folder(self, place: Place) -> None:
        """Remove every object below a folder, a thousand at a time."""
        if not place.key:
            raise ForbiddenPathError("will not delete a whole bucket.", where=place.uri, fix="Name a folder in it.")
        with self._errors(place):
            for keys in self._pages(place, f"{place.key}/"):
                names = [{"Key": found["Key"]} for found in keys]
                answer = self._connection.client.delete_objects(
                    Bucket=place.bucket, Delete={"Objects": names, "Quiet": True}
                )
                for failed in answer.get("Errors", ()):
                    raise StorageError(
                        f"could not delete '{failed['Key']}': {failed.get('Message', failed['Code'])}.", where=place.uri
                    )

    def create_bucket(self, place: Place) -> None:
        """Make the bucket, unless it is there and ours."""
        region = self._connection.region
        elsewhere = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        with self._errors(place):
            try:
                self._connection.client.create_bucket(Bucket=place.bucket, **elsewhere)
            except Exception as error:
                if code_of(error) != "BucketAlreadyOwnedByYou":
                    raise

    def _body(self, place: Place, *, max_bytes: int | None = None, **arguments: str) -> bytes:
        for attempt in range(1, BODY_ATTEMPTS + 1):
            answer = self._connection.client.get_object(Bucket=place.bucket, Key=place.key, **arguments)
            # Not `with answer["Body"] as body`: that gives the raw stream, whose errors are not the client's.
            with closing(answer["Body"]) as body:
                check_size(place.uri, answer["ContentLength"], max_bytes)
                try:
                    return bytes(body.read())
                except self._connection.errors:
                    if attempt == BODY_ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def _write_parts(self, place: Place, size_bytes: int, piece: Callable[[int, int], bytes], if_absent: bool) -> Entry:
        # Asked first to spare a long upload, and decided by the store when it joins the parts.
        if if_absent and self.exists(place):
            raise already_exists(place.uri)
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._errors(place, creating=if_absent):
            answer = _repeated_on_conflict(lambda: self._send_parts(place, size_bytes, piece, condition))
        return Entry(place.uri, size_bytes, answer["ETag"].strip('"'))

    def _send_parts(
        self, place: Place, size_bytes: int, piece: Callable[[int, int], bytes], condition: dict[str, str]
    ) -> Any:
        client, name = self._connection.client, {"Bucket": place.bucket, "Key": place.key}
        upload = {**name, "UploadId": client.create_multipart_upload(**name)["UploadId"]}
        part_bytes = max(PART_BYTES, -(-size_bytes // MAX_PARTS))

        def send(start: int) -> dict[str, Any]:
            end, number = min(start + part_bytes, size_bytes), start // part_bytes + 1
            body = piece(start, end)
            if len(body) != end - start:
                raise StorageError("the file became shorter while it was stored.", where=place.uri, fix="Try again.")
            return {"PartNumber": number, "ETag": client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]}

        try:
            with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(0, size_bytes, part_bytes)))
            return client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
        except BaseException:
            # Parts without an end are invisible and cost money; the first error is the one to tell.
            with suppress(*self._connection.errors):
                client.abort_multipart_upload(**upload)
            raise

    def _head(self, place: Place) -> Entry:
        answer = self._connection.client.head_object(Bucket=place.bucket, Key=place.key)
        return Entry(place.uri, answer["ContentLength"], answer["ETag"].strip('"'))

    def _alone(self, place: Place) -> Entries:
        """The object of this very name, if there is one."""
        with self._errors(place):
            try:
                return [self._head(place)]
            except Exception as error:
                if code_of(error) == "404":
                    return []
                raise

    def _listed(self, place: Place, prefix: str, **arguments: str) -> Entries:
        with self._errors(place):
            return [
                Entry(place.inside(found["Key"]).uri, found["Size"], found["ETag"].strip('"'))
                for page in self._pages(place, prefix, **arguments)
                for found in page
                # Consoles and Arrow mark folders with an empty object that ends in a slash: it is no file.
                if not found["Key"].endswith("/")
            ]

    def _pages(self, place: Place, prefix: str, **arguments: str) -> Iterator[Page]:
        pages = self._connection.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=place.bucket, Prefix=prefix, **arguments):
            if page.get("Contents"):
                yield page["Contents"]

    def _require_bucket(self, place: Place) -> None:
        # The answer to HEAD has no body, so it does not say whether the key or the bucket is missing.
        try:
            self._connection.client.head_bucket(Bucket=place.bucket)
        except self._connection.errors as error:
            if code_of(error) == "404":
                raise no_such_bucket(place.uri) from None

    @contextmanager
    def _errors(self, place: Place, *, creating: bool = False) -> Iterator[None]:
        try:
            yield
        except self._connection.errors as error:
            connection = self._connection
            raise explain(
                error, place.uri, endpoint=connection.endpoint, creating=creating, hidden=connection.secrets
            ) from error


def _repeated_on_conflict(attempt: Callable[[], Any]) -> Any:
    # Conditional creates of one name at the same moment may all be answered 409: the store asks to repeat them.
    for pause_s in CONFLICT_PAUSES_S:
        try:
            return attempt()
        except Exception as error:
            if code_of(error) != "ConditionalRequestConflict":
                raise
        time.sleep(pause_s)
    return attempt()
