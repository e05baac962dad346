"""API keys as they are kept: an id, a digest, what the key may ask, how much, and until when. Never the key itself.

    [[keys]]
    id = "web-2026"
    sha256 = "9f86d0…"
    scopes = ["embed", "perturb"]
    requests_per_minute = 600        # 0, or left out: no limit
    tokens_per_minute = 5000000
    expires = "2027-01-01T00:00:00+00:00"

SHA-256 without salt or stretching is right for these keys and would be wrong for passwords: a key is 256 random bits,
so there is nothing to guess, and the check costs microseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any

from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.settings import build, read_toml
from genescale.serving.access.scopes import ADMIN, SCOPES

KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
# Scanners for leaked secrets look for a prefix of its own.
KEY_PREFIX, KEY_BYTES = "gsk_", 32
LARGEST_FILE_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """One accepted key. Raises SettingsError for an id, digest, scope, limit or time that cannot be."""

    id: str
    sha256: str = field(repr=False)
    """Digest of the key, 64 hexadecimal digits."""
    scopes: tuple[str, ...] = (ADMIN,)
    requests_per_minute: int = 0
    """0 means no limit."""
    tokens_per_minute: int = 0
    """Tokens through the model (cells, and again for each edit); 0 means no limit."""
    expires: str = ""
    """ISO time with a time zone, from which on the key is refused; empty means never."""

    def __post_init__(self) -> None:
        if not KEY_ID.fullmatch(self.id):
            raise SettingsError(
                f"the id {self.id!r} is not one.", where="key", fix="Use up to 64 letters, digits, dots and dashes."
            )
        if not SHA256.fullmatch(self.sha256):
            raise SettingsError("sha256 is not 64 hexadecimal digits.", where=self._where, fix=MAKE_ONE)
        self._check_scopes()
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is below 0.", where=self._where, fix="Use 0 for no limit.")
        if self.expires:
            moment_of(self.expires, where=self._where)

    @property
    def digest(self) -> bytes:
        """What the digest of a presented key is compared with."""
        return bytes.fromhex(self.sha256)

    @property
    def expires_s(self) -> float:
        """Seconds since 1970 at which the key ends; infinity when it never does."""
        return moment_of(self.expires, where=self._where).timestamp() if self.expires else float("inf")

    @property
    def _where(self) -> str:
        return f"key {self.id}"

    def _check_scopes(self) -> None:
        if not self.scopes:
            raise SettingsError("has no scope.", where=self._where, fix=f"Known scopes: {', '.join(SCOPES)}.")
        for scope in self.scopes:
            if scope not in SCOPES:
                hint = did_you_mean(scope, SCOPES) or f"Known scopes: {', '.join(SCOPES)}."
                raise SettingsError(f"there is no scope {scope!r}.", where=self._where, fix=hint)


MAKE_ONE = "Make one with: genescale serve keys new ID --file FILE --scopes SCOPE."


def digest_of(key: bytes) -> bytes:
    """The SHA-256 of a key as it is presented."""
    return hashlib.sha256(key.strip()).digest()


def new_key() -> str:
    """A fresh key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def moment_of(text: str, *, where: str) -> datetime:
    """An ISO time with a time zone; SettingsError otherwise (a time without a zone means another one on each node)."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise SettingsError(
            f"expires is {text!r}.", where=where, fix="Use a time with a zone, such as 2027-01-01T00:00:00+00:00."
        )
    return moment


def read_keys(path: str | Path) -> tuple[ApiKey, ...]:
    """The keys of a TOML or JSON file (by its suffix).

    Raises SettingsError for a missing or broken file, an unknown field, and an id or digest that stands there twice.
    """
    content = _content(Path(path))
    entries = content.get("keys", [])
    if set(content) - {"keys"} or not isinstance(entries, list):
        raise SettingsError("is not a list of keys.", where=str(path), fix=f"Write [[keys]] tables. {MAKE_ONE}")
    keys = tuple(_key(entry, f"{path}: keys[{at}]") for at, entry in enumerate(entries))
    for name in ("id", "sha256"):
        value, times = next(iter(Counter(getattr(key, name) for key in keys).most_common(1)), ("", 0))
        if times > 1:
            twice = f"the id {value!r}" if name == "id" else "one key"
            raise SettingsError(f"{twice} stands there {times} times.", where=str(path), fix="Keep one of them.")
    return keys


def write_keys(path: str | Path, keys: Sequence[ApiKey]) -> None:
    """Replace the file in one step, readable by its owner only; a running service sees the old or the new one whole."""
    target = Path(path).resolve()
    text = _json(keys) if target.suffix == ".json" else _toml(keys)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """Nobody else changes the file inside the block: two `new` at a time must not lose a key."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise SettingsError("there is no such folder.", where=str(folder), fix="Make it first.")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _content(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise SettingsError("is too long to be a file of keys.", where=str(path), fix="Check the path.")
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else read_toml(path)
    except OSError as error:
        raise SettingsError(
            f"the file of keys cannot be read: {error.strerror}.", where=str(path), fix=MAKE_ONE
        ) from None
    except ValueError as error:
        raise SettingsError(f"not valid JSON: {error}.", where=str(path)) from None
    if not isinstance(content, Mapping):
        raise SettingsError("is not a table.", where=str(path), fix=MAKE_ONE)
    return content


def _key(entry: Any, where: str) -> ApiKey:
    if not isinstance(entry, Mapping):
        raise SettingsError("is not a table.", where=where, fix=MAKE_ONE)
    # TOML has times of its own.
    plain = {name: value.isoformat() if isinstance(value, date) else value for name, value in entry.items()}
    return build(ApiKey, plain, where=where)


def _fields(key: ApiKey) -> dict[str, Any]:
    values = {
        "id": key.id,
        "sha256": key.sha256,
        "scopes": list(key.scopes),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "expires": key.expires,
    }
    return {name: value for name, value in values.items() if value not in (0, "")}


def _json(keys: Sequence[ApiKey]) -> str:
    return json.dumps({"keys": [_fields(key) for key in keys]}, indent=1) + "\n"


def _toml(keys: Sequence[ApiKey]) -> str:
    # The values are checked texts of plain letters, numbers and lists of them: their JSON is TOML as well.
    tables = ["\n".join(f"{name} = {json.dumps(value)}" for name, value in _fields(key).items()) for key in keys]
    # An empty list is written out: a file without keys lets nobody in, and says so.
    return "\n".join(f"[[keys]]\n{table}\n" for table in tables) or "keys = []\n"
