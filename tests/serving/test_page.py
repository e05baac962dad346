"""The explorer in a real browser: what it shows is what the service answers, by mouse, by keys, on any screen."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from genescale.platform.settings import Settings
from genescale.serving.gate import Gate
from genescale.serving.in_process import InProcessModel
from genescale.serving.neighbours.building import IndexConfig, build_index
from genescale.serving.neighbours.reference import Reference
from tests.serving.browser import Page, chromium
from tests.serving.mapped_index import with_map

if TYPE_CHECKING:
    from genescale.ingestion.corpus import Corpus
    from genescale.platform.bundle import Bundle
    from genescale.training.embedder import Embedder

pytestmark = pytest.mark.slow
KEY = "the-only-key-0123456789abcdef"
SIZES = [(1440, 900), (390, 844)]
LOADED = "document.querySelectorAll('#gene-rows tbody tr').length > 5 && !!document.querySelector('#company .votes li')"
SYMBOLS = "[...document.querySelectorAll('#gene-rows .symbol')].map((one) => one.innerText)"
OFFLINE = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
SHOTS = os.environ.get("GENESCALE_SCREENSHOTS", "")

# Contrast of every text with what lies behind it (WCAG 2.1, success criterion 1.4.3); gives the worst ones.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgb('Canvas');
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const one = node.parentElement;
    if (!node.data.trim() || !one.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (one.closest('.visually-hidden, .skip, script, option, :disabled, [aria-busy=true]')) continue;
    const style = getComputedStyle(one);
    const [a, b] = [light(rgb(one.closest('svg') ? style.fill : style.color)), light(behind(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push([Number(ratio.toFixed(2)), node.data.trim().slice(0, 30), one.className]);
  }
  return found;
})()"""
# Controls without a name, and pictures without a text.
NAMELESS = """[...document.querySelectorAll('button, a, input, select, canvas, svg[role=img], [role=listbox], section')]
  .filter((one) => one.checkVisibility() && !(one.innerText?.trim() && one.matches('button, a'))
    && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby') && !one.labels?.length)
  .map((one) => one.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def reference(bundle: Bundle, reference_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    scratch = tmp_path_factory.mktemp("reference")
    config = IndexConfig(device="cpu", map_cells=0, sampled=20)
    store = reference_corpus.store
    build_index(bundle, reference_corpus, out_uri=str(scratch / "plain"), store=store, config=config)
    places_n2 = np.random.default_rng(2).normal(scale=4, size=(90, 2)).astype(np.float32)
    uri = with_map(scratch / "plain", places_n2, store, scratch)
    return Reference.open(str(uri), Settings(), scratch)


@pytest.fixture
def serve(http_side: Callable[..., Gate], bundle: Bundle, embedder: Embedder) -> Iterator[Callable[..., str]]:
    """Serve the tiny model on a free port: `serve(reference=…, keys=…)` gives the address."""
    import uvicorn

    running: list[tuple[Any, threading.Thread]] = []

    def start(*, app: Any = None, **more: Any) -> str:
        app = app or http_side(bundle, InProcessModel(embedder), **more)
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def url(serve: Callable[..., str], reference: Reference) -> str:
    return serve(reference=reference)


def opened(page: Page, url: str, **more: Any) -> None:
    page.errors.clear()
    page.asked.clear()
    page.open(f"{url}/", **more)
    page.wait(LOADED)


def shown(page: Page, name: str) -> None:
    """A picture for whoever wants to look: GENESCALE_SCREENSHOTS names the folder."""
    if SHOTS:
        page.screenshot(Path(SHOTS) / f"{name}.png")


def test_a_cell_its_place_its_genes_and_its_edits_by_keys_alone(page: Page, url: str) -> None:
    opened(page, url)
    example = httpx.get(f"{url}/v1/reference/examples").json()["examples"][0]
    cell = {"tokens": example["tokens"]}
    genes = httpx.post(f"{url}/v1/tokens", json={"cells": [cell]}).json()["cells"][0]
    assert page.value(SYMBOLS) == genes["symbols"]
    votes = httpx.post(f"{url}/v1/neighbors", json={"cells": [cell], "k": 15}).json()["cells"][0]["votes"]["cell_type"]
    assert page.text("#company .votes li .name") == (votes[0]["label"] or "no label")
    # From the search box: down into the list, delete the first gene, overexpress the third.
    page.value("document.getElementById('gene-search').focus()")
    page.press("ArrowDown")
    page.press("d")
    page.press("ArrowDown", times=2)
    page.press("o")
    page.wait("document.querySelectorAll('.bars .bar').length === 2")
    edits = [
        {"kind": "delete", "genes": [genes["genes"][0]]},
        {"kind": "overexpress", "genes": [genes["genes"][2]]},
    ]
    answer = httpx.post(f"{url}/v1/perturbations", json={"cells": [cell], "edits": edits}).json()["cells"][0]["edits"]
    told = {genes["symbols"][at]: one["shift"] for at, one in zip((0, 2), answer, strict=True)}
    names = page.value("[...document.querySelectorAll('.figure tbody .edit-name')].map((one) => one.lastChild.data)")
    values = page.value("[...document.querySelectorAll('.figure tbody td:nth-child(3)')].map((one) => one.innerText)")
    assert names == sorted(told, key=lambda name: -told[name])
    for name, value in zip(names, values, strict=True):
        assert float(value) == pytest.approx(told[name], abs=2e-3 * max(told.values()))
    # The same key takes the edit back.
    page.press("o")
    page.wait("document.querySelectorAll('.bars .bar').length === 1")
    assert page.text("#status").startswith("1 edit answered")
    assert page.errors == []


def test_states_are_compared(page: Page, url: str) -> None:
    opened(page, url)
    page.click("#top-genes")
    page.choose("#state-a", "label:t")
    page.choose("#state-b", "label:b")
    page.wait("document.getElementById('measure').value === 'difference'")
    page.wait("document.querySelectorAll('.figure tbody tr').length > 9")
    given = page.value("[...document.querySelectorAll('.figure tbody td:nth-child(4)')].map((one) => one.innerText)")
    differences = [float(text.replace("−", "-")) for text in given]
    assert [abs(one) for one in differences] == sorted((abs(one) for one in differences), reverse=True)
    # The same from the service: means of the examples' embeddings, and the movement toward each.
    examples = httpx.get(f"{url}/v1/reference/examples").json()["examples"]
    states = []
    for label in ("t", "b"):
        cells = [{"tokens": one["tokens"]} for one in examples if one["labels"]["cell_type"] == label]
        found = httpx.post(f"{url}/v1/embeddings", json={"cells": cells}).json()["cells"]
        states.append({"name": label, "vector": np.mean([one["embedding"] for one in found], axis=0).tolist()})
    cell = {"tokens": examples[0]["tokens"]}
    genes = httpx.post(f"{url}/v1/tokens", json={"cells": [cell]}).json()["cells"][0]["genes"][:20]
    edits = [{"kind": "delete", "genes": [gene]} for gene in genes]
    body = {"cells": [cell], "edits": edits, "states": states}
    answer = httpx.post(f"{url}/v1/perturbations", json=body).json()["cells"][0]["edits"]
    moved = [one["state_shifts"]["t"] - one["state_shifts"]["b"] for one in answer]
    assert differences[0] == pytest.approx(max(moved, key=abs), rel=0.02)
    assert page.errors == []


def test_a_file_of_ones_own(page: Page, url: str, counts_ng: np.ndarray, tmp_path: Path) -> None:
    import anndata

    adata = anndata.AnnData(counts_ng.astype(np.float32))
    adata.var_names = [f"GENE{gene}" for gene in range(counts_ng.shape[1])]
    adata.obs_names = [f"mine-{at}" for at in range(len(counts_ng))]
    adata.write_h5ad(tmp_path / "mine.h5ad")
    opened(page, url)
    page.give_file("#file", tmp_path / "mine.h5ad")
    page.wait("document.getElementById('cells').innerText.includes('mine-0')")
    page.wait("document.querySelector('#cell-facts h3').innerText === 'mine-0'")
    counts = {f"GENE{gene}": int(counts_ng[0, gene]) for gene in np.flatnonzero(counts_ng[0])}
    told = httpx.post(f"{url}/v1/tokens", json={"cells": [{"counts": counts}]}).json()["cells"][0]
    assert (
        page.value("[...document.querySelectorAll('#gene-rows .symbol')].map((one) => one.innerText)")
        == told["symbols"]
    )
    assert page.value("document.querySelectorAll('#cells li').length") == len(counts_ng)
    # Normalised values are refused, in the service's words.
    adata.X = adata.X * 0.37
    adata.write_h5ad(tmp_path / "normalised.h5ad")
    page.give_file("#file", tmp_path / "normalised.h5ad")
    page.wait("!!document.querySelector('#file-problem .what')")
    assert "raw counts" in page.text("#file-problem .what").lower()
    assert page.text("#file-problem .id")


def test_a_service_with_keys_asks_for_one_and_keeps_it_in_memory(
    page: Page, serve: Callable[..., str], reference: Reference
) -> None:
    page.open(f"{serve(reference=reference, keys=[KEY])}/")
    page.wait("!document.getElementById('key-form').hidden")
    assert page.value("document.getElementById('main').hidden")
    page.type("#key", "not-the-key-0123456789")
    page.press("Enter")
    page.wait("!!document.querySelector('#page-problem .what')")
    page.value("document.getElementById('key').value = ''")
    page.type("#key", KEY)
    page.press("Enter")
    page.wait(LOADED)
    kept = page.value("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert KEY not in kept
    assert not any(KEY in address for address in page.asked)


def test_what_the_service_says_stays_text(page: Page, url: str) -> None:
    opened(page, url)
    name = "<img src=x onerror=document.title='run'>"
    page.type("#gene-search", name)
    page.wait("!!document.querySelector('#gene-absent button')")
    page.click("#gene-absent button")
    page.wait("!!document.querySelector('#shifts-problem .what')")
    assert name in page.text("#shifts-problem .what")
    assert page.text("#shifts-problem dd") == "edits[0].genes[0]"
    assert page.value("document.title") == "Genescale explorer"
    assert page.value("document.querySelectorAll('main img').length") == 0


def test_a_service_that_went_away_is_told_and_can_be_asked_again(page: Page, url: str) -> None:
    opened(page, url)
    page.call("Network.emulateNetworkConditions", offline=True, **OFFLINE)
    try:
        page.click("#top-genes")
        page.wait("!!document.querySelector('#shifts-problem button')")
        assert "cannot be reached" in page.text("#shifts-problem .what")
    finally:
        page.call("Network.emulateNetworkConditions", offline=False, **OFFLINE)
    page.click("#shifts-problem button")
    page.wait("document.querySelectorAll('.bars .bar').length > 9 && !document.querySelector('#shifts-problem .what')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_it_can_be_read_on_every_screen(page: Page, url: str, width: int, height: int, dark: bool) -> None:
    opened(page, url, width=width, height=height, dark=dark, still=True)
    page.click("#top-genes")
    page.wait("document.querySelectorAll('.bars .bar').length > 9")
    page.click("#company summary")
    shown(page, f"explorer-{width}-{'dark' if dark else 'light'}")
    assert page.value(CONTRAST) == []
    assert page.value(NAMELESS) == []
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value("getComputedStyle(document.getElementById('shifts-body')).transitionDuration") == "0s"
    assert page.value("['header', 'main', 'footer', 'nav', 'h1'].filter((one) => !document.querySelector(one))") == []
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (not dark)
    if width == SIZES[1][0]:
        small = page.value(
            "[...document.querySelectorAll('main button, main select')].filter((one) => one.checkVisibility()"
            " && one.getBoundingClientRect().height < 24).map((one) => one.className)"
        )
        assert small == []


def test_the_map_is_drawn_followed_by_keys_and_filtered_by_the_legend(page: Page, url: str) -> None:
    opened(page, url)
    colours = """(() => { const canvas = document.getElementById('map');
      const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      const found = {};
      for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 200) {
        const key = `${data[at]},${data[at + 1]},${data[at + 2]}`; found[key] = (found[key] ?? 0) + 1; }
      return Object.values(found).filter((n) => n > 60).length; })()"""
    assert page.value(colours) >= 4
    before = page.value("document.getElementById('map').toDataURL()")
    page.click("#legend button")
    assert page.value("document.getElementById('map').toDataURL()") != before
    page.click("#legend button")
    assert page.value("document.getElementById('map').toDataURL()") == before
    page.value("document.getElementById('map').focus()")
    page.press("ArrowRight")
    assert page.text("#status").startswith("cell type")
    assert page.value("!document.getElementById('map-tip').hidden")
    cell = page.text("#map-tip .id")
    known = httpx.get(f"{url}/v1/reference/map").json()
    kind = known["labels"]["cell_type"]
    code = kind["codes"][known["ids"].index(cell)]
    assert page.text("#map-tip p").endswith("not given" if code < 0 else kind["values"][code])
    page.press("+")
    assert page.value("document.getElementById('map').toDataURL()") != before
    page.press("Escape")
    page.press("0")
    assert page.value("document.getElementById('map').toDataURL()") == before


def test_a_service_without_a_reference_still_takes_a_cell(
    page: Page, serve: Callable[..., str], counts_ng: np.ndarray, tmp_path: Path
) -> None:
    import anndata

    adata = anndata.AnnData(counts_ng.astype(np.float32))
    adata.var_names = [f"GENE{gene}" for gene in range(counts_ng.shape[1])]
    adata.write_h5ad(tmp_path / "mine.h5ad")
    page.open(f"{serve()}/")
    page.wait("document.getElementById('place-problem').innerText.includes('no reference')")
    assert "read a file" in page.text("#no-cells")
    page.give_file("#file", tmp_path / "mine.h5ad")
    page.wait("document.querySelectorAll('#gene-rows tbody tr').length > 4")
    page.click("#top-genes")
    page.wait("document.querySelectorAll('.bars .bar').length > 4")


def test_a_rollout_under_an_open_page_is_told(
    page: Page,
    serve: Callable[..., str],
    http_side: Callable[..., Gate],
    embedder: Embedder,
    reference: Reference,
    bundle: Bundle,
    write_bundle_at: Callable[..., Bundle],
    tmp_path: Path,
) -> None:
    now, after = (
        http_side(one, InProcessModel(embedder), reference=reference)
        for one in (bundle, write_bundle_at(tmp_path / "after", 78))
    )

    async def rolled_out(scope: Any, receive: Any, send: Any) -> None:
        # The page began with the version that gave it its facts.
        await (now if scope["method"] == "GET" else after)(scope, receive, send)

    page.open(f"{serve(app=rolled_out)}/")
    page.wait("!!document.getElementById('other-version')")
    page.wait(LOADED)
    assert "Load the page again" in page.text("#other-version")


def test_nothing_comes_from_another_host(page: Page, url: str) -> None:
    opened(page, url)
    page.open(f"{url}/docs")
    page.wait("document.querySelectorAll('#interface .opblock').length > 5")
    assert {json.dumps(address) for address in page.asked if not address.startswith((url, "data:"))} == set()
    assert page.errors == []
