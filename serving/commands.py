"""`genescale serve`: answer embeddings, perturbations and classes over HTTP until it is told to stop."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genescale.platform.address import parse
from genescale.platform.cli import begin, command_parser
from genescale.platform.errors import SettingsError
from genescale.platform.settings import build, read_toml

if TYPE_CHECKING:
    from genescale.serving.app import RunningService
    from genescale.serving.config import ServingConfig

EPILOG = """\
MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, a bundle folder or an s3:// address; an alias is resolved once, now.
Several models are written NAME=MODEL; the first answers questions that name none with ?model=NAME.
Everything else, limits included, can stand in a TOML file given by --config; /v1/info of the running service lists it.

  genescale serve models:/encoder@production
  KEYS=$(openssl rand -hex 24) genescale serve models:/encoder@production --api-key-env KEYS
  genescale serve keys new web --file keys.toml --scopes embed,perturb
  genescale serve models:/encoder@production --keys-file keys.toml --host 0.0.0.0
  genescale serve encoder=models:/encoder@production types=models:/cell-types@production
  genescale serve rollout encoder@candidate --canary 0.1
  genescale serve models:/encoder@production --index s3://lake/references/heart
  genescale serve models:/encoder@production --jobs-uri s3://lake-jobs --jobs-roots s3://lake/corpus s3://lake/atlases
  genescale serve --openapi > docs/openapi.json
"""
FROM_OPTIONS = (
    "host",
    "port",
    "replicas",
    "num_cpus",
    "num_gpus",
    "tokens_per_batch",
    "max_model_bytes",
    "cache",
    "keys_file",
    "index",
    "states",
)


def serve(argv: Sequence[str]) -> int:
    """Run the service until Ctrl-C or SIGTERM, or change its keys or models; returns 0 after a clean stop."""
    if argv and argv[0] == "keys":
        from genescale.serving.access.keys_command import keys

        return keys(argv[1:])
    if argv and argv[0] == "rollout":
        from genescale.serving.models.rollout_command import rollout

        return rollout(argv[1:])
    arguments, settings = begin(_parser(), argv)
    if arguments.openapi:
        print(openapi_text(), end="")
        return 0
    if not arguments.models:
        raise SettingsError("no model is named.", where="genescale serve", fix="Name one: genescale serve MODEL.")
    config = serving_config(arguments, os.environ)
    from genescale.serving.models.named import read_named

    models = read_named(arguments.models)
    from genescale.platform.cluster import ray_cluster
    from genescale.platform.progress import stage

    with termination_interrupts(), ray_cluster(settings), termination_interrupts(), contextlib.ExitStack() as stack:
        from genescale.serving.app import service

        with stage("start the service"):
            running = stack.enter_context(service(models, config, settings))
        print(greeting(running), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            # From here on a second signal must not leave half a service behind.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            print("stopping: requests that are being answered are finished first", flush=True)
    return 0


def openapi_text() -> str:
    """The OpenAPI document as the repository keeps it."""
    from genescale.serving.routes import openapi_document

    return json.dumps(openapi_document(), indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def serving_config(arguments: argparse.Namespace, environment: Mapping[str, str]) -> ServingConfig:
    """The config of a service: the file's values, then those of options, then the keys of the environment.

    Raises SettingsError for unknown or impossible values, and when the variable for keys is empty.
    """
    from genescale.serving.config import ServingConfig

    values: dict[str, Any] = read_toml(arguments.config) if arguments.config else {}
    values.update({name: given for name in FROM_OPTIONS if (given := getattr(arguments, name)) is not None})
    if arguments.jobs_uri:
        # As the command line has it, a folder is one below where the command runs; the service needs it absolute.
        roots = [parse(root).uri for root in arguments.jobs_roots or ()]
        values["jobs"] = {**values.get("jobs", {}), "uri": parse(arguments.jobs_uri).uri, "allowed_roots": roots}
    elif arguments.jobs_roots:
        raise SettingsError("roots without jobs.", where="--jobs-roots", fix="Say where jobs are kept: --jobs-uri.")
    if arguments.api_key_env:
        keys = environment.get(arguments.api_key_env, "")
        if not keys.strip():
            raise SettingsError(
                f"the environment variable {arguments.api_key_env} holds no key.",
                where="--api-key-env",
                fix="Set it to one key, or several with commas between them.",
            )
        values["api_keys"] = keys
    return with_readable_keys(build(ServingConfig, values, where=arguments.config or "genescale serve"))


def with_readable_keys(config: ServingConfig) -> ServingConfig:
    """The config with its file of keys read once and named absolutely; SettingsError now instead of in a replica."""
    from genescale.serving.access.keys import read_keys

    if not config.keys_file:
        return config
    read_keys(config.keys_file)
    return replace(config, keys_file=str(Path(config.keys_file).absolute()))


def greeting(running: RunningService) -> str:
    """What is served, where, and a first question to try."""
    from genescale.serving.facts import HEAD_FILE

    release, url = running.release, running.url
    others = [
        f"  ?model={name}: {one.name} version {one.version} ({one.digest[:12]})"
        for name, one in list(running.releases.items())[1:]
    ]
    key = " \\\n    -H 'Authorization: Bearer '$KEY" if running.config.has_keys else ""
    body = '{"cells": [{"counts": {"GATA4": 3, "TTN": 41}}]}'
    question = "classify" if Path(release.folder, HEAD_FILE).is_file() else "embeddings"
    return "\n".join(
        [
            f"serving {release.name} version {release.version} ({release.digest[:12]}) at {url}",
            *others,
            f"  documentation {url}/docs   facts and limits {url}/v1/info",
            f"  curl {url}/v1/{question}{key} \\\n    -H 'Content-Type: application/json' \\\n    -d '{body}'",
            "Ctrl-C stops it.",
        ]
    )


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does inside the block, so that an orchestrator's stop is a clean one.

    Ray puts its own reaction to SIGTERM in place when it starts: who starts it enters this once more afterwards.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("serve", "Answer embeddings, perturbations and classes over HTTP.", epilog=EPILOG)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="what to serve, several as NAME=MODEL (see below)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with fields of the serving config")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1; 0.0.0.0 for all)")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000; 0 takes a free one)")
    parser.add_argument("--replicas", type=int, help="copies of the model (default 1)")
    parser.add_argument("--num-cpus", type=float, help="processors per copy (default 1)")
    parser.add_argument("--num-gpus", type=float, help="GPUs per copy (default 0)")
    parser.add_argument("--tokens-per-batch", type=int, help="token budget of one pass through the model")
    parser.add_argument("--max-model-bytes", type=int, help="bytes of weights that one copy holds (default 8 GiB)")
    parser.add_argument("--cache", metavar="DIR", help="folder for downloaded models (default: a temporary one)")
    parser.add_argument("--index", metavar="URI", help="reference that /v1/neighbors searches (genescale index)")
    parser.add_argument(
        "--states", metavar="URI", action="append", help="states that requests may name (genescale perturb states)"
    )
    parser.add_argument("--jobs-uri", metavar="URI", help="folder or s3:// address where jobs are kept; takes jobs")
    parser.add_argument("--jobs-roots", nargs="+", metavar="URI", help="folders and s3:// prefixes that jobs may read")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with keys that may ask everything")
    parser.add_argument("--keys-file", metavar="FILE", help="file of accepted keys (genescale serve keys --help)")
    parser.add_argument("--openapi", action="store_true", help="print the OpenAPI document and stop")
    return parser
