"""Which addresses a job may read: absolute ones below an allowed root, once everything in them is resolved."""

from __future__ import annotations

import re
from urllib.parse import unquote

from genescale.platform.address import is_remote, parse, within
from genescale.platform.errors import GenescaleError, InputError
from genescale.serving.jobs.settings import JobsConfig

_VERSION = re.compile(r"@[0-9]+$")
ASK_THE_OPERATOR = "Ask the operator of the service which places its jobs may read (--jobs-roots)."
LONGEST_ADDRESS = 1_024


def check_source(address: str, config: JobsConfig, *, where: str) -> str:
    """The one spelling of an address that a job may read, a version behind `@` included; InputError for any other.

    Nothing is said of what lies outside: a wrong address and a forbidden one look the same.
    """
    found = _VERSION.search(address)
    version = found[0] if found else ""
    bare = address.removesuffix(version) if version else address
    reason = _why_not(bare)
    if not reason:
        try:
            place = parse(bare)
            if within(place, config.roots):
                return place.uri + version
            reason = "is not below a place that jobs may read"
        except (GenescaleError, OSError, RuntimeError):
            # A loop of links, a name that is too long, a bucket that is no name.
            reason = "is not an address"
    raise InputError(f"the address {reason}.", where=where, fix=ASK_THE_OPERATOR)


def _why_not(address: str) -> str:
    if len(address) > LONGEST_ADDRESS:
        return "is too long"
    if not is_remote(address) and not address.startswith("/"):
        return "is neither an s3:// address nor an absolute path"
    decoded = address
    while (further := unquote(decoded)) != decoded:
        decoded = further
    parts = decoded.replace("\\", "/").split("/")
    return "has a '.' or '..' part" if any(part in (".", "..") for part in parts) else ""
