"""The keys that are accepted now: those of the config, and those of a file that is read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from genescale.platform.errors import SettingsError
from genescale.platform.log import get_logger
from genescale.platform.settings import Secret
from genescale.serving.access.keys import ApiKey, digest_of, read_keys

Signature = tuple[int, int, int]
CHECK_EVERY_S = 1.0
log = get_logger(__name__)


class KeyRing:
    """Accepted keys. `required` is whether a key is needed at all: a file without keys lets nobody in.

    Raises SettingsError when the file cannot be used at the start. When it breaks later, the keys it held stay in force
    and an error is logged: a slip of the pen must not shut everybody out, and never lets anybody in.
    """

    def __init__(
        self,
        keys: Iterable[Secret] = (),
        file: str = "",
        *,
        check_every_s: float = CHECK_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = tuple(_of_config(at, key) for at, key in enumerate(keys, start=1))
        self._file = Path(file) if file else None
        self.required = bool(self._fixed or self._file)
        self._check_every_s, self._clock = check_every_s, clock
        self._checked_s = clock()
        self._seen = _signature(self._file) if self._file else None
        self._refused: tuple[Signature | None, str] | None = None
        self._known = _digests((*self._fixed, *(read_keys(self._file) if self._file else ())))

    def find(self, presented: bytes) -> ApiKey | None:
        """The key whose digest is that of `presented`, expired ones included; None when there is none."""
        self._read_again()
        digest, found = digest_of(presented), None
        # Every key is compared, in constant time: neither the match nor its place can be timed.
        for known, key in self._known:
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def _read_again(self) -> None:
        now_s = self._clock()
        if self._file is None or now_s - self._checked_s < self._check_every_s:
            return
        self._checked_s = now_s
        seen = _signature(self._file)
        if seen == self._seen:
            return
        try:
            keys = read_keys(self._file)
        except SettingsError as error:
            # Read again at the next look, for it may be storage that failed; said once.
            if self._refused != (seen, error.what):
                self._refused = seen, error.what
                # What is wrong, without the place: a log line names no path.
                log.error("the keys file cannot be used any more; the keys it held stay in force: %s", error.what)
            return
        self._seen, self._refused = seen, None
        self._known = _digests((*self._fixed, *keys))
        log.info("read the keys file again: %d keys", len(keys))


def _of_config(at: int, key: Secret) -> ApiKey:
    return ApiKey(id=f"config-{at}", sha256=hashlib.sha256(key.reveal().strip().encode()).hexdigest())


def _digests(keys: Iterable[ApiKey]) -> tuple[tuple[bytes, ApiKey], ...]:
    return tuple((key.digest, key) for key in keys)


def _signature(file: Path) -> Signature | None:
    """What changes with the file's content; None when it is not there. Links are followed: secrets are mounted so."""
    try:
        facts = file.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino
