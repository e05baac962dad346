// A cell among the reference: its neighbours, what their labels say, and how unlike all of them it is.

import { byId, digits, h, percent, replace, say, showProblem, whole } from "./elements.js";
import { markOf } from "./legend.js";
import { words } from "./map_tip.js";
import { Latest, ServiceError, ask } from "./service.js";

const NEIGHBORS = 15;
const UNUSUAL = 0.95;
const STRANGE = 0.99;
const SHOWN_VOTES = 4;

export class Place {
  #map;
  #reference;
  #column = "";
  #codeOf = () => -1;
  #cell = null;
  #answer = null;
  #latest = new Latest();

  constructor({ map, reference }) {
    this.#map = map;
    this.#reference = reference;
  }

  // The column whose labels are shown, and the looks of its labels.
  colourBy(column, values) {
    this.#column = column;
    this.#codeOf = (label) => (label === null ? -1 : values.indexOf(label));
    if (this.#answer) this.#draw();
  }

  async show(cell) {
    this.#cell = cell;
    byId("company").setAttribute("aria-busy", "true");
    try {
      const k = Math.min(NEIGHBORS, this.#reference.max_neighbors);
      const answer = await this.#latest.run((signal) => ask("v1/neighbors", { json: { cells: [{ tokens: cell.tokens }], k }, signal }));
      if (!answer) return;
      this.#answer = answer;
      showProblem(byId("place-problem"), null);
      const found = answer.cells[0];
      this.#map?.focus(found.place ? { name: cell.title, place: found.place, neighbors: found.neighbors } : null);
      this.#draw();
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      this.#map?.focus(null);
      this.#answer = null;
      replace(byId("company"));
      showProblem(byId("place-problem"), error, () => this.show(cell));
    } finally {
      byId("company").removeAttribute("aria-busy");
    }
  }

  #draw() {
    const [found] = this.#answer.cells;
    const votes = found.votes[this.#column] ?? [];
    const timings = this.#answer.timings_ms;
    replace(
      byId("company"),
      h("div", { class: "votes" },
        h("h3", {}, `Its ${found.neighbors.length} nearest, by ${words(this.#column)}`),
        h("ol", {}, votes.slice(0, SHOWN_VOTES).map((vote) => h("li", { vars: { "--share": String(vote.share) } },
          markOf(this.#codeOf(vote.label)), h("span", { class: "name" }, vote.label ?? "no label"), h("span", { class: "n" }, percent(vote.share)))))),
      h("div", { class: "unlike" },
        h("h3", {}, "Unlike the reference"),
        h("p", { class: "figure-number" }, digits(found.out_of_distribution, 2)),
        h("p", { class: "soft small" }, verdict(found.out_of_distribution))),
      h("div", { class: "took" },
        h("h3", {}, "Time"),
        h("p", { class: "figure-number" }, `${whole(Math.round(timings.parse + timings.queue + timings.forward + timings.search))}`, h("small", {}, " ms")),
        h("p", { class: "soft small" }, `of these ${digits(timings.forward, 0)} ms in the model`)),
      this.#table(found.neighbors));
    const first = votes[0];
    if (first) say(`${this.#cell.title}: ${percent(first.share)} of the nearest cells are ${first.label ?? "without a label"}.`);
  }

  #table(neighbors) {
    const columns = this.#reference.columns;
    const places = Math.min(6, Math.max(3, 2 - Math.floor(Math.log10(Math.max(1e-6, neighbors.at(-1).distance)))));
    return h("details", {}, h("summary", {}, `The ${neighbors.length} nearest cells`),
      h("div", { class: "scroll" }, h("table", { class: "numbers plain" },
        h("thead", {}, h("tr", {}, ["Distance", ...columns.map(words), "Cell"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, neighbors.map((one) => h("tr", {},
          h("td", {}, digits(one.distance, places)),
          columns.map((column) => h("td", { class: "text" }, one.labels[column] ?? "–")),
          h("td", { class: "text id" }, one.id)))))));
  }
}

function verdict(score) {
  if (score >= STRANGE) return "The reference holds little like it: its labels are a guess.";
  if (score >= UNUSUAL) return "Few reference cells are this far from their company.";
  return "Reference cells lie like this among themselves.";
}
