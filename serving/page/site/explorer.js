// The explorer: what the service is, a cell, its place, its genes, edits and what they change.

import { CellList, drawCellFacts } from "./cells.js";
import { byId, counted, h, option, replace, showProblem, whole } from "./elements.js";
import { GeneTable } from "./genes.js";
import { Heads } from "./heads.js";
import { drawLegend } from "./legend.js";
import { CellMap } from "./map.js";
import { words } from "./map_tip.js";
import { Place } from "./place.js";
import { Latest, MODEL, ServiceError, ask, onProvenance, useKey } from "./service.js";
import { Shifts } from "./shifts.js";
import { StateChoice } from "./states.js";
import { onThemeChange, startTheme } from "./theme.js";

let explorer = null;

async function start() {
  showProblem(byId("page-problem"), null);
  let info;
  try {
    info = await ask("v1/info");
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error;
    wantKey(error);
    return;
  }
  setKeyForm(false);
  byId("main").hidden = false;
  drawFacts(info);
  if (explorer) {
    explorer.again();
    return;
  }
  onProvenance((model) => tellVersion(info.provenance.model, model));
  explorer = new Explorer(info);
  await explorer.begin();
}

// A refused key is asked for again; anything else is told, with a way to try once more.
function wantKey(error) {
  const wanted = error.status === 401 || error.status === 403;
  if (wanted) {
    byId("key-open").hidden = false;
    setKeyForm(true);
  }
  showProblem(byId("page-problem"), wanted && !byId("key").value ? null : error, wanted ? null : start);
}

function setKeyForm(open) {
  byId("key-form").hidden = !open;
  byId("key-open").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

// A rollout changes versions under an open page, and a canary mixes them: then it is said.
function tellVersion(first, now) {
  if (now.digest === first.digest || byId("other-version")) return;
  const text = `The last answer came from version ${now.version}; this page began with version ${first.version}. `;
  const again = h("button", { type: "button", class: "quiet", onclick: () => location.reload() }, "Load the page again");
  byId("page-problem").append(h("p", { id: "other-version", class: "note", role: "status" }, text, again));
}

function drawFacts(info) {
  const { model, corpus } = info.provenance;
  const fact = (name, value, title) => h("div", {}, h("dt", {}, name), h("dd", { title }, value));
  replace(
    byId("facts"),
    fact("Model", modelChoice(info) ?? `${model.name} ${model.version}`, `digest ${model.digest}`),
    corpus.version === null ? null : fact("Corpus", String(corpus.version)),
    fact("Encoder", `${info.encoder.layers} layers of ${info.encoder.width}`, `window ${whole(info.encoder.window)} tokens, ${whole(info.encoder.n_genes)} genes`),
    info.reference ? fact("Reference", counted(info.reference.cells, "cell"), `digest ${info.reference.digest}`) : null,
  );
  replace(byId("foot"), `Genescale ${info.build} · model digest `, h("code", {}, model.digest.slice(0, 12)), " · vocabulary ", h("code", {}, info.provenance.vocabulary.digest.slice(0, 12)));
}

// Where a service has several models: a list of them, by which the page is opened for another one.
function modelChoice(info) {
  const names = Object.keys(info.models ?? {});
  if (names.length < 2) return null;
  const current = MODEL || names[0];
  const choose = (event) => location.assign(`?model=${encodeURIComponent(event.target.value)}`);
  const options = names.map((name) => option(name, `${name} ${info.models[name].version}`, name === current));
  return h("select", { "aria-label": "Model", onchange: choose }, options);
}

class Explorer {
  #info;
  #map = null;
  #points = null;
  #place = null;
  #cell = null;
  #latest = new Latest();

  constructor(info) {
    this.#info = info;
    const { limits } = info;
    this.states = new StateChoice(() => this.shifts.ask());
    this.shifts = new Shifts({
      limits,
      states: this.states,
      head: info.heads.find((head) => head.kind === "cell_classes")?.label ?? null,
      onEdits: () => this.genes.refresh(),
    });
    this.genes = new GeneTable({
      onToggle: (kind, gene) => this.shifts.toggle(kind, gene),
      isEdited: (kind, id) => this.shifts.isEdited(kind, id),
    });
    this.heads = new Heads(info.heads);
    this.cells = new CellList({ limits, onChoose: (cell) => this.choose(cell) });
    byId("top-genes").addEventListener("click", () => this.shifts.deleteTop(this.genes.genes));
  }

  async begin() {
    const reference = this.#info.reference;
    if (!reference) this.#withoutMap("This service has no reference cells: it was started without an index. Genes, edits and shifts work without.");
    else await this.#reference(reference);
    this.#offerStates();
  }

  async #reference(reference) {
    try {
      const [points, { examples }] = await Promise.all([ask("v1/reference/map"), ask("v1/reference/examples")]);
      this.#points = points;
      const [column] = reference.columns;
      const shown = this.cells.setExamples(examples, column, points.labels[column]?.values ?? []);
      if (points.method === null) this.#withoutMap("This reference was made without a map; the nearest cells are listed all the same.");
      else this.#showMap(shown, reference);
      this.#place = new Place({ map: this.#map, reference });
      this.#colourBy(column ?? "");
      if (shown.length) this.cells.choose(shown[0]);
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      this.#withoutMap("");
      showProblem(byId("place-problem"), error, () => this.begin());
    }
  }

  #showMap(examples, reference) {
    const frame = byId("map-frame");
    this.#map = new CellMap({ canvas: byId("map"), frame, tip: byId("map-tip"), onOpen: (cell) => this.cells.choose(cell) });
    this.#map.show(this.#points, new Map(examples.map((one) => [one.id, one])));
    byId("map").setAttribute("aria-label", `Map of ${counted(this.#points.cells, "reference cell")}, laid out by UMAP`);
    const select = byId("colour-by");
    replace(select, reference.columns.map((column) => option(column, words(column))));
    select.addEventListener("change", () => this.#colourBy(select.value));
    byId("zoom-in").addEventListener("click", () => this.#map.zoomBy(1));
    byId("zoom-out").addEventListener("click", () => this.#map.zoomBy(-1));
    byId("zoom-all").addEventListener("click", () => this.#map.showAll());
    onThemeChange(() => this.#map.refresh());
  }

  #withoutMap(text) {
    byId("place-body").hidden = true;
    document.querySelector(".place .tools").hidden = true;
    if (text) replace(byId("place-problem"), h("p", { class: "empty" }, text));
  }

  #colourBy(column) {
    const labels = this.#points.labels[column] ?? { values: [], codes: [] };
    this.#place.colourBy(column, labels.values);
    if (!this.#map) return;
    this.#map.colourBy(column);
    drawLegend(byId("legend"), labels, (code) => this.#map.isolate(code));
  }

  // With another key: the same cell once more.
  again() {
    if (this.#cell) this.choose(this.#cell);
    else this.begin();
  }

  #offerStates() {
    this.states.offer({
      published: this.#info.states ?? [],
      examples: this.cells.examples,
      fileCells: this.cells.fileCells,
      layer: this.shifts.layer,
      pooling: this.shifts.pooling,
    });
  }

  // A cell was chosen: its genes first, then everything that is asked about it, side by side.
  async choose(cell) {
    this.#cell = cell;
    this.#offerStates();
    try {
      const whole = await this.#latest.run((signal) => withGenes(cell, signal));
      if (!whole) return;
      showProblem(byId("file-problem"), null);
      drawCellFacts(byId("cell-facts"), whole);
      this.genes.show(whole);
      this.shifts.show(whole);
      await Promise.all([this.#place?.show(whole), this.heads.show(whole)]);
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      showProblem(byId("file-problem"), error, () => this.choose(cell));
    }
  }
}

// The cell with its ranked genes: the service is asked once for each cell.
async function withGenes(cell, signal) {
  if (!cell.genes) {
    const answer = await ask("v1/tokens", { json: { cells: [{ tokens: cell.tokens }] }, signal });
    Object.assign(cell, answer.cells[0], { id: cell.id });
  }
  return cell;
}

byId("key-open").addEventListener("click", () => setKeyForm(byId("key-form").hidden));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  start();
});
startTheme(byId("theme"));
start();
