"""Who asks: the key of a request, whether it may ask this, and on which terms."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from genescale.platform.errors import ForbiddenError, UnauthorizedError
from genescale.serving.access.keys import ApiKey
from genescale.serving.access.ring import KeyRing
from genescale.serving.access.scopes import allows, scope_needed

Scope = MutableMapping[str, Any]
SEND_A_KEY = "Send the header `Authorization: Bearer <key>`."


def header(scope: Scope, name: bytes) -> bytes:
    """The first value of a request's header, empty when it has none."""
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def caller_of(scope: Scope, ring: KeyRing, *, now: Callable[[], float] = time.time) -> ApiKey | None:
    """The key of a request that may be made; None where the service needs no key.

    Raises UnauthorizedError without an accepted key, ForbiddenError for a key without the scope that the address needs.
    """
    if not ring.required:
        _check_loopback(scope)
        return None
    key = _key(scope, ring, now())
    needed = scope_needed(_path(scope))
    if not allows(key.scopes, needed):
        raise ForbiddenError(
            f"this key may not ask this; it needs the scope '{needed}'.", fix="Ask for a key that has it."
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _key(scope: Scope, ring: KeyRing, now_s: float) -> ApiKey:
    scheme, _, presented = header(scope, b"authorization").partition(b" ")
    # Looked up whatever the scheme says, so that the time taken says nothing either.
    key = ring.find(presented)
    if key is None or scheme.lower() != b"bearer":
        raise UnauthorizedError("a key is needed, and this request has none that is accepted.", fix=SEND_A_KEY)
    if now_s >= key.expires_s:
        raise UnauthorizedError(f"this key expired at {key.expires}.", fix="Ask for a new one.")
    return key


def _check_loopback(scope: Scope) -> None:
    # The address to listen on is checked in the config; behind a proxy of its own that address is not the one that
    # counts. A caller without an address is in this process or on a local socket.
    client = scope.get("client")
    if client and not is_loopback(str(client[0])):
        raise UnauthorizedError(
            "this service has no keys, and answers callers on its own machine only.",
            fix="Its operator can give it keys: --keys-file or --api-key-env.",
        )


def _path(scope: Scope) -> str:
    """The address as the routes see it: below the prefix that the application is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
