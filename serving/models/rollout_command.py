"""`genescale serve rollout NAME@ALIAS`: another version of a model that a running service answers with."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from genescale.client import GenescaleClient
from genescale.client.questions import JSON_TYPE, Question, json_object, posted
from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import ConflictError, GenescaleError, ServiceError, SettingsError

EPILOG = """\
The alias is looked up now. Every replica loads the version beside the one that answers; then all requests go to it, and
what was begun is finished by the old one. A version that cannot be loaded changes nothing.

  genescale serve rollout encoder@production
  genescale serve rollout encoder/7 --canary 0.05      (a version by number; it answers one request in twenty)
  genescale serve rollout encoder/7                    (all of them)
  genescale serve rollout encoder --back               (a canary leaves; else the version before answers again)

The key needs the scope admin. It is read from the environment variable that --api-key-env names.
"""
TARGET = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[A-Za-z0-9._-]+)|/(?P<version>[1-9][0-9]*))?")
ASK_EVERY_S = 0.5
# A service that restarts in the middle is asked again for so long before it is given up.
PATIENCE_S = 60.0
DOING = {
    "resolve": "looking the version up",
    "load": "loading it beside the running one",
    "prepare": "opening its vocabulary",
    "switch": "switching",
    "finish": "finishing what the old version was asked",
    "done": "done",
}


def rollout(argv: Sequence[str]) -> int:
    """Run the command; returns 0 when the version answers."""
    arguments, _ = begin(_parser(), argv)
    name, asked = asked_of(arguments)
    with GenescaleClient(arguments.url, _key(arguments.api_key_env, os.environ)) as client:
        facts = _begun(client, name, asked)
        _follow(client, name, facts)
    return 0


def asked_of(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name, and the body of the question; SettingsError for what cannot be meant."""
    found = TARGET.fullmatch(arguments.target)
    if found is None:
        raise SettingsError(
            f"'{arguments.target}' is no model and version.",
            where="genescale serve rollout",
            fix="Write NAME@ALIAS or NAME/VERSION.",
        )
    asked: dict[str, Any] = {}
    if arguments.back:
        if arguments.canary is not None:
            raise SettingsError(
                "--back has no --canary.", where="genescale serve rollout", fix="Leave one of them out."
            )
        asked["back"] = True
    elif found["alias"]:
        asked["alias"] = found["alias"]
    elif found["version"]:
        asked["version"] = found["version"]
    else:
        raise SettingsError(
            f"which version of '{found['name']}'?",
            where="genescale serve rollout",
            fix=f"Write {found['name']}@ALIAS or {found['name']}/VERSION, or --back.",
        )
    if arguments.canary is not None:
        if not 0 < arguments.canary < 1:
            raise SettingsError(
                f"the share is {arguments.canary:g}.", where="--canary", fix="Use a number between 0 and 1."
            )
        asked["canary"] = arguments.canary
    if arguments.accept_losses:
        asked["accept_losses"] = True
    return found["name"], asked


def _begun(client: GenescaleClient, name: str, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    path = f"/v1/models/{name}/rollout"
    try:
        answer: Mapping[str, Any] = client.ask(posted(path, asked, lambda found: found["rollout"]))
    except ConflictError:
        # A question whose answer was cut off is asked again: what is under way may be what it began.
        under_way = _rollout_of(client, name)
        if under_way is None or under_way["state"] != "running" or under_way["asked"] != _as_told(asked):
            raise
        return under_way
    return answer


def _follow(
    client: GenescaleClient, name: str, facts: Mapping[str, Any], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Say what is being done until it has ended; ServiceError when it failed."""
    step, begun, alive_s = "", facts["id"], time.monotonic()
    while facts["state"] == "running":
        if facts["step"] != step:
            step = facts["step"]
            print(f"{DOING.get(step, step)} …", flush=True)
        sleep(ASK_EVERY_S)
        try:
            found = _rollout_of(client, name)
        except GenescaleError:
            if time.monotonic() - alive_s > PATIENCE_S:
                raise
            continue
        alive_s = time.monotonic()
        if found is None or found["id"] != begun:
            raise ServiceError("the service knows no more of this rollout.", fix=f"GET /v1/models/{name} says more.")
        facts = found
    if facts["state"] == "failed":
        raise ServiceError(
            f"the rollout failed, and nothing changed: {facts['message']}",
            where=f"{name}, step {facts['step']}",
        )
    print(f"{name}: {facts['message']}", flush=True)


def _rollout_of(client: GenescaleClient, name: str) -> Mapping[str, Any] | None:
    question = Question(
        method="GET", path=f"/v1/models/{name}", headers={"Accept": JSON_TYPE}, read=lambda found: json_object(found)
    )
    found: Mapping[str, Any] | None = client.ask(question).get("rollout")
    return found


def _as_told(asked: Mapping[str, Any]) -> str:
    return "back" if asked.get("back") else f"@{asked['alias']}" if "alias" in asked else str(asked["version"])


def _key(variable: str | None, environment: Mapping[str, str]) -> str | None:
    if variable is None:
        return None
    # The same variable may hold all keys of the service, with commas between them.
    key = environment.get(variable, "").partition(",")[0].strip()
    if not key:
        raise SettingsError(
            f"the environment variable {variable} holds no key.",
            where="--api-key-env",
            fix="Set it to a key with the scope admin.",
        )
    return key


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve rollout", "Let a running service answer with another version.", epilog=EPILOG)
    parser.add_argument("target", metavar="NAME@ALIAS", help="the model's name in the service, and the version")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the service (default %(default)s)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key")
    parser.add_argument("--canary", type=float, metavar="SHARE", help="share of requests that the version answers")
    parser.add_argument("--back", action="store_true", help="the canary leaves, or the version before answers again")
    parser.add_argument(
        "--accept-losses", action="store_true", help="go on although the version lacks a head, states or the reference"
    )
    return parser
