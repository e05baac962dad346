"""`genescale serve keys new|list|revoke`: the file of keys that a service accepts.

A running service reads the file again when it changes, so a key is rotated without a pause: make the new one, hand it
out, revoke the old one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import SettingsError, did_you_mean
from genescale.platform.text_table import text_table
from genescale.serving.access.keys import ApiKey, changing, digest_of, moment_of, new_key, read_keys, write_keys
from genescale.serving.access.scopes import SCOPES

EPILOG = f"""\
scopes: {", ".join(SCOPES)} (admin may ask everything)

  genescale serve keys new web --file keys.toml --scopes embed,perturb --tokens-per-minute 5000000 --expires 90d
  genescale serve keys list --file keys.toml
  genescale serve keys revoke web --file keys.toml

The key is printed once, on standard output, and kept nowhere: the file holds its digest. A service that was started
with --keys-file FILE follows the file within seconds.
"""
DAYS = re.compile(r"([1-9][0-9]{0,4})d")


def keys(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    arguments, _ = begin(_parser(), argv)
    actions = {"new": _new, "list": _list, "revoke": _revoke}
    actions[arguments.action](arguments)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve keys", "Make, list and revoke the keys of a service.", epilog=EPILOG)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser("new", help="make a key and print it, once")
    new.add_argument("id", metavar="ID", help="name of the key in lists and logs, such as the caller and the year")
    new.add_argument("--scopes", required=True, metavar="SCOPE,…", help=f"what it may ask: {', '.join(SCOPES)}")
    new.add_argument("--requests-per-minute", type=int, default=0, metavar="N", help="default: no limit")
    new.add_argument("--tokens-per-minute", type=int, default=0, metavar="N", help="tokens through the model")
    new.add_argument("--expires", default="", metavar="WHEN", help="such as 90d or 2027-01-01 (default: never)")
    listing = actions.add_parser("list", help="the keys of a file, without their digests")
    listing.add_argument("--json", action="store_true", help="print JSON")
    revoke = actions.add_parser("revoke", help="take a key out of the file")
    revoke.add_argument("id", metavar="ID")
    for each in (new, listing, revoke):
        each.add_argument("--file", required=True, metavar="FILE", help="the file of keys, .toml or .json")
    return parser


def _new(arguments: argparse.Namespace) -> None:
    key = new_key()
    entry = ApiKey(
        id=arguments.id,
        sha256=digest_of(key.encode()).hex(),
        scopes=tuple(scope.strip() for scope in arguments.scopes.split(",") if scope.strip()),
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        expires=expiry(arguments.expires, datetime.now(UTC)),
    )
    with changing(arguments.file):
        there = read_keys(arguments.file) if Path(arguments.file).exists() else ()
        if any(other.id == entry.id for other in there):
            raise SettingsError(
                f"there is a key '{entry.id}' already.",
                where=arguments.file,
                fix="Give the new one another id, and revoke the old one when nobody uses it any more.",
            )
        write_keys(arguments.file, (*there, entry))
    print(key)
    print(f"'{entry.id}' is in {arguments.file}; the key above is shown this once.", file=sys.stderr)


def expiry(text: str, now: datetime) -> str:
    """The ISO time at which a key ends: of days to come (`90d`), a date (its beginning, UTC) or a time with a zone."""
    if not text:
        return ""
    days = DAYS.fullmatch(text)
    if days:
        return (now + timedelta(days=int(days[1]))).isoformat(timespec="seconds")
    moment = moment_of(f"{text}T00:00:00+00:00" if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else text, where="--expires")
    if moment <= now:
        raise SettingsError(f"{text} is in the past.", where="--expires", fix="Use a time to come, such as 90d.")
    return moment.isoformat()


def _list(arguments: argparse.Namespace) -> None:
    found, now_s = read_keys(arguments.file), time.time()
    facts = [
        {
            "id": key.id,
            "scopes": list(key.scopes),
            "requests_per_minute": key.requests_per_minute or None,
            "tokens_per_minute": key.tokens_per_minute or None,
            "expires": key.expires or None,
            "state": "accepted" if now_s < key.expires_s else "expired",
        }
        for key in found
    ]
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return
    rows = [
        (
            one["id"],
            ",".join(key.scopes),
            _limit(key.requests_per_minute),
            _limit(key.tokens_per_minute),
            key.expires or "never",
            one["state"],
        )
        for one, key in zip(facts, found, strict=True)
    ]
    header = ("id", "scopes", "requests/min", "tokens/min", "expires", "state")
    print(text_table(header, rows) if rows else "the file holds no key: a service that reads it lets nobody in")


def _limit(per_minute: int) -> str:
    return f"{per_minute:,}" if per_minute else "any"


def _revoke(arguments: argparse.Namespace) -> None:
    with changing(arguments.file):
        there = read_keys(arguments.file)
        left = tuple(key for key in there if key.id != arguments.id)
        if len(left) == len(there):
            hint = did_you_mean(arguments.id, [key.id for key in there]) or "`list` shows the keys."
            raise SettingsError(f"there is no key '{arguments.id}'.", where=arguments.file, fix=hint)
        write_keys(arguments.file, left)
    print(f"'{arguments.id}' is revoked; running services follow within seconds")
