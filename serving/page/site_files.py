"""The files of the explorer and of the documentation page: read once, sent as they are.

They hold no data of the service, so everybody may have them; what they ask for needs a key. Nothing on them comes
from another host, and no script stands inside a page: the policy below forbids both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from fastapi import FastAPI, Request, Response

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Not through importlib.resources: an editable install gives a package without __init__.py a place that it cannot read.
SITE = Path(__file__).parent / "site"
PAGES = {"/": "index.html", "/docs": "docs.html"}
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css")
ASSETS = "/assets/"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger's interface sets style attributes while it draws; its scripts are held to the same policy as ours.
DOCS_POLICY = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")


@dataclass(frozen=True, kw_only=True)
class SiteFile:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str
    policy: str

    def response(self, request: Request) -> Response:
        """The file, or 304 for a browser that has it."""
        headers = {"cache-control": "no-cache", "etag": self.etag, "content-security-policy": self.policy}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@cache
def site_files() -> dict[str, SiteFile]:
    """Every file by its address."""
    assets: list[Traversable] = [one for one in SITE.iterdir() if one.suffix != ".html"]
    assets += [files("fastapi_offline").joinpath("static", name) for name in SWAGGER_FILES]
    found = {f"{ASSETS}{one.name}": _site_file(one, POLICY) for one in sorted(assets, key=lambda one: one.name)}
    for path, name in PAGES.items():
        found[path] = _site_file(SITE / name, DOCS_POLICY if path == "/docs" else POLICY)
    return found


def add_site(app: FastAPI) -> None:
    """Make the application answer with the pages and their files; they are no part of the OpenAPI document."""
    for path in site_files():
        app.add_api_route(path, _site, methods=["GET"], include_in_schema=False)


async def _site(request: Request) -> Response:
    """A file of the site."""
    return site_files()[request.scope["route"].path].response(request)


def _site_file(file: Traversable, policy: str) -> SiteFile:
    content = file.read_bytes()
    kind = MEDIA_TYPES[file.name[file.name.rindex(".") :]]
    return SiteFile(
        content=content, media_type=kind, etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"', policy=policy
    )
