// Edits of the chosen cell and what they change: chips, a chart, the same as a table, and the genes that moved.

import { HEAD, ROW, barChart, placesFor } from "./chart.js";
import { byId, counted, digits, h, option, replace, say, showProblem, whole } from "./elements.js";
import { Latest, ServiceError, ask } from "./service.js";

const LAYER = "second_to_last";
const MEASURE = "remaining_genes";
const POOLING = "mean_genes";
const TOP_GENES = 10;
const TOP_EDITS = 20;
const SIGNS = { delete: "−", overexpress: "↑" };
const WORDS = { delete: "Delete", overexpress: "Overexpress" };
const MOVING_MS = 150;

export class Shifts {
  #limits;
  #states;
  #onEdits;
  #head;
  #cell = null;
  #edits = [];
  #results = [];
  #asked = { a: null, b: null };
  #chosen = null;
  #latest = new Latest();
  #timer = 0;

  // `head`: label of a head of cell classes, or null. `onEdits` is told when edits change.
  constructor({ limits, states, head, onEdits }) {
    this.#limits = limits;
    this.#states = states;
    this.#head = head;
    this.#onEdits = onEdits;
    this.layer = LAYER;
    this.pooling = POOLING;
    byId("measure").addEventListener("change", () => this.#draw());
    byId("clear-edits").addEventListener("click", () => this.#change([]));
    new ResizeObserver(() => this.#draw()).observe(byId("shifts-body"));
    this.#drawMeasures();
    this.#draw();
  }

  isEdited(kind, id) {
    return this.#edits.some((edit) => edit.kind === kind && edit.gene.id === id);
  }

  toggle(kind, gene) {
    const without = this.#edits.filter((edit) => edit.kind !== kind || edit.gene.id !== gene.id);
    const removed = without.length < this.#edits.length;
    if (!removed && without.length >= this.#limits.max_edits) {
      say(`No more than ${counted(this.#limits.max_edits, "edit")} at a time.`);
      return;
    }
    this.#change(removed ? without : [...this.#edits, { kind, gene }]);
    say(`${WORDS[kind]} ${gene.symbol}: ${removed ? "taken back" : "added"}.`);
  }

  deleteTop(genes) {
    const wanted = genes.slice(0, Math.min(TOP_EDITS, this.#limits.max_edits));
    this.#change(wanted.map((gene) => ({ kind: "delete", gene })));
  }

  show(cell) {
    this.#cell = cell;
    this.#results = [];
    byId("top-genes").disabled = false;
    this.ask(0);
  }

  // Ask for the edits of now, shortly after the last change of them.
  ask(delay = MOVING_MS) {
    clearTimeout(this.#timer);
    if (!this.#cell || !this.#edits.length) {
      this.#latest.end();
      this.#results = [];
      showProblem(byId("shifts-problem"), null);
      this.#draw();
      return;
    }
    byId("shifts-body").setAttribute("aria-busy", "true");
    this.#timer = setTimeout(() => this.#ask(), delay);
  }

  #change(edits) {
    this.#edits = edits;
    if (!edits.some((edit) => nameOf(edit) === this.#chosen)) this.#chosen = null;
    this.#drawEdits();
    this.#onEdits();
    this.ask();
  }

  async #ask() {
    const [cell, edits] = [this.#cell, this.#edits];
    try {
      const found = await this.#latest.run((signal) => this.#question(cell, edits, signal));
      if (!found) return;
      this.#asked = found.states;
      this.#results = found.answer.cells[0].edits.map((result, at) => ({ ...result, edit: edits[at], name: nameOf(edits[at]) }));
      showProblem(byId("shifts-problem"), null);
      this.#drawMeasures();
      this.#draw();
      const most = this.#sorted()[0];
      say(`${counted(edits.length, "edit")} answered; ${WORDS[most.edit.kind].toLowerCase()} ${most.edit.gene.symbol} changes most.`);
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      this.#results = [];
      this.#draw();
      showProblem(byId("shifts-problem"), error, () => this.ask(0));
    } finally {
      byId("shifts-body").removeAttribute("aria-busy");
    }
  }

  async #question(cell, edits, signal) {
    const states = await this.#states.chosen(signal);
    const named = [states.a, states.b].filter(Boolean);
    const answer = await ask("v1/perturbations", {
      json: {
        cells: [{ tokens: cell.tokens }],
        edits: edits.map((edit) => ({ kind: edit.kind, genes: [edit.gene.id] })),
        layer: LAYER,
        measure: MEASURE,
        states: named.map((state) => (state.published ? { name: state.name } : { name: state.name, vector: state.vector })),
        top_gene_shifts: Math.min(TOP_GENES, this.#limits.max_gene_shifts),
        ...(this.#head ? { head: this.#head } : {}),
      },
      signal,
    });
    return { answer, states };
  }

  #drawEdits() {
    const chips = this.#edits.map((edit) =>
      h("li", {}, h("button", {
        type: "button", class: `chip ${edit.kind}`, title: "Take back", "aria-label": `Take back: ${nameOf(edit)}`,
        onclick: () => this.toggle(edit.kind, edit.gene),
      }, h("span", { "aria-hidden": "true" }, SIGNS[edit.kind]), edit.gene.symbol, h("span", { class: "x", "aria-hidden": "true" }, "×"))));
    replace(byId("edits"), chips);
    byId("clear-edits").disabled = !this.#edits.length;
  }

  // What can be shown: the shift, movements toward the states, changes of class probabilities.
  #measures() {
    const { a, b } = this.#asked;
    const found = [["shift", "Shift of the cell", (one) => one.shift]];
    if (a) found.push(["a", `Movement toward ${a.name}`, (one) => one.state_shifts[a.name] ?? null]);
    if (b) found.push(["b", `Movement toward ${b.name}`, (one) => one.state_shifts[b.name] ?? null]);
    if (a && b) {
      const difference = (one) => {
        const [to, from] = [one.state_shifts[a.name], one.state_shifts[b.name]];
        return to === null || from === null ? null : to - from;
      };
      found.push(["difference", `Toward ${a.name}, away from ${b.name}`, difference]);
    }
    for (const name of Object.keys(this.#results.find((one) => one.class_changes)?.class_changes ?? {})) {
      found.push([`class:${name}`, `Probability of ${name}`, (one) => one.class_changes?.[name] ?? null]);
    }
    return found;
  }

  #drawMeasures() {
    const select = byId("measure");
    const measures = this.#measures();
    const states = [this.#asked.a?.name, this.#asked.b?.name].join("|");
    // States that were just chosen are what one wants to see.
    const fresh = states !== select.dataset.states;
    const wanted = fresh ? (measures.find(([key]) => key === "difference") ?? measures.find(([key]) => key === "a") ?? measures[0])[0] : select.value;
    select.dataset.states = states;
    replace(select, measures.map(([key, name]) => option(key, name)));
    select.value = measures.some(([key]) => key === wanted) ? wanted : "shift";
  }

  #measure() {
    const measures = this.#measures();
    return measures.find(([key]) => key === byId("measure").value) ?? measures[0];
  }

  #sorted() {
    const [, , read] = this.#measure();
    const size = (one) => Math.abs(read(one) ?? -1);
    return [...this.#results].sort((one, other) => (read(other) === null ? -1 : size(other)) - (read(one) === null ? -1 : size(one)));
  }

  #draw() {
    const body = byId("shifts-body");
    if (!this.#results.length) {
      const text = this.#cell ? "Delete or overexpress genes in the list of ranked genes: each edit is tried by itself, and its shift appears here." : "Choose a cell first.";
      replace(body, this.#edits.length && this.#cell ? null : h("p", { class: "empty" }, text));
      return;
    }
    const [key, name, read] = this.#measure();
    const rows = this.#sorted();
    const places = placesFor(rows.map(read));
    const chosen = rows.find((one) => one.name === this.#chosen) ?? rows[0];
    const wide = body.clientWidth;
    const beside = wide >= 620;
    const chart = barChart(
      rows.map((one) => ({ label: one.edit.gene.symbol, value: read(one), kind: one.edit.kind, chosen: one === chosen })),
      { width: beside ? Math.round(wide * 0.56) - 12 : wide, places, numbers: !beside, title: `${name} for ${counted(rows.length, "edit")}, largest first; the table has the numbers` },
    );
    replace(
      body,
      h("div", { class: `figure${beside ? " beside" : ""}` }, h("div", { class: "chart" }, chart), this.#table(rows, chosen, key, name, read, places)),
      this.#moved(chosen),
      h("p", { class: "note" }, explain(key, this.#asked)),
    );
  }

  #table(rows, chosen, key, name, read, places) {
    const choose = (one) => {
      this.#chosen = one.name;
      this.#draw();
      byId("shifts-body").querySelector("tr.chosen button")?.focus();
    };
    const shiftPlaces = placesFor(rows.map((one) => one.shift));
    const line = (one) => h("tr", { class: one === chosen ? "chosen" : "" },
      h("th", { scope: "row" }, h("button", { type: "button", class: `edit-name ${one.edit.kind}`, "aria-pressed": String(one === chosen), onclick: () => choose(one) },
        h("span", { "aria-hidden": "true" }, SIGNS[one.edit.kind]), h("span", { class: "visually-hidden" }, `${WORDS[one.edit.kind]} `), one.edit.gene.symbol)),
      h("td", {}, one.found.length ? whole(one.found[0].rank + 1) : "absent"),
      h("td", {}, one.shift === null ? one.reason : digits(one.shift, shiftPlaces)),
      key === "shift" ? null : h("td", {}, read(one) === null ? "–" : digits(read(one), places)));
    return h("table", { class: "numbers", vars: { "--row": `${ROW}px`, "--head": `${HEAD}px` } },
      h("caption", { class: "visually-hidden" }, `${name}; press an edit to see which genes moved`),
      h("thead", {}, h("tr", {}, ["Edit", "Rank", "Shift", ...(key === "shift" ? [] : [short(key)])].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, rows.map(line)));
  }

  #moved(one) {
    const genes = one.top_gene_shifts ?? [];
    if (!genes.length) return one.reason ? h("p", { class: "note" }, `${one.name}: ${one.reason}`) : null;
    const places = placesFor(genes.map((gene) => gene.shift));
    const most = Math.max(...genes.map((gene) => gene.shift), 1e-12);
    return h("div", { class: "moved" },
      h("h3", {}, `Genes that move furthest: ${one.name.toLowerCase().replace(one.edit.gene.symbol.toLowerCase(), one.edit.gene.symbol)}`),
      h("ol", {}, genes.map((gene) => h("li", { title: gene.gene, vars: { "--share": String(Math.max(0, gene.shift / most)) } },
        h("span", { class: "symbol" }, gene.symbol), h("span", { class: "n" }, digits(gene.shift, places))))));
  }
}

function nameOf(edit) {
  return `${WORDS[edit.kind]} ${edit.gene.symbol}`;
}

function short(key) {
  return { a: "Toward", b: "Toward", difference: "Difference" }[key] ?? "Change";
}

function explain(key, { a, b }) {
  if (key === "shift") return "Shift: 1 minus the cosine between the genes' embeddings before and after, a mean over the genes that remain.";
  if (key === "difference") return `Movement toward ${a.name} minus movement toward ${b.name}. Most edits bring a cell nearer to every mean of cells: the difference says more than either.`;
  if (key.startsWith("class:")) return "Change of the probability that the head gives this class.";
  return "Positive: nearer to the state after the edit. Most edits bring a cell nearer to every mean of cells: compare two states.";
}
