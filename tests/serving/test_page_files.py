"""The explorer's files: what is sent, to whom, and what a browser may load beside them."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
import pytest

from genescale.serving.gate import Gate
from genescale.serving.page.site_files import site_files

Ask = Callable[..., httpx.Response]
KEY = "the-only-key-0123456789abcdef"
OURS = [path for path in site_files() if "swagger-ui" not in path]


def test_pages_are_open_and_what_they_ask_for_is_not(ask: Ask, build: Callable[..., Gate]) -> None:
    app = build(keys=[KEY])
    for path in site_files():
        assert ask(app, "GET", path).status_code == 200, path
    assert ask(app, "GET", "/assets/nothing.js").status_code == 404
    for path in ("/v1/info", "/openapi.json", "/v1/reference/map", "/v1/reference/examples", "/index.html"):
        assert ask(app, "GET", path).status_code == 401


def test_a_browser_may_load_our_own_files_only_and_run_no_script_inside_a_page(ask: Ask, app: Gate) -> None:
    for path in site_files():
        policy = ask(app, "GET", path).headers["content-security-policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert (rules["default-src"], rules["script-src"], rules["connect-src"]) == ("'none'", "'self'", "'self'")
        assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    page_rules = ask(app, "GET", "/").headers["content-security-policy"]
    assert "unsafe" not in page_rules


@pytest.mark.parametrize("path", OURS)
def test_no_file_names_another_host_or_writes_markup(path: str) -> None:
    text = site_files()[path].content.decode()
    hosts = set(re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text))
    assert hosts <= {"http://www.w3.org"}
    # Texts of the service become text nodes: one of these would let a gene's name run as a script.
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
    )
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", text)
    if path in ("/", "/docs"):
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", text)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_every_file_that_a_page_names_is_there(ask: Ask, app: Gate, path: str) -> None:
    named = re.findall(r'(?:src|href)="([^"#]+)"', site_files()[path].content.decode())
    assert len(named) >= 4
    for name in named:
        assert ask(app, "GET", f"/{name.lstrip('/')}").status_code == 200, name
    scripts = [file for file in OURS if file.endswith(".js")]
    for file in scripts:
        for name in re.findall(r'from "\./([^"]+)"', site_files()[file].content.decode()):
            assert f"/assets/{name}" in site_files(), f"{file} imports {name}"


def test_a_browser_that_has_a_file_is_not_sent_it_again(ask: Ask, app: Gate) -> None:
    first = ask(app, "GET", "/assets/explorer.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    again = ask(app, "GET", "/assets/explorer.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = ask(app, "GET", "/assets/explorer.css", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200
