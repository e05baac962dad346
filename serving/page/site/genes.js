// The ranked genes of a cell: a grid to search and to edit from, by mouse or by keys.

import { byId, counted, h, replace, whole } from "./elements.js";

const AT_A_TIME = 100;
const PAGE = 10;

export class GeneTable {
  #rows = byId("gene-rows");
  #search = byId("gene-search");
  #onToggle;
  #isEdited;
  #genes = [];
  #found = [];
  #shown = AT_A_TIME;
  #active = 0;

  // `onToggle(kind, gene)` edits or takes the edit back; `isEdited(kind, id)` says whether it stands.
  constructor({ onToggle, isEdited }) {
    this.#onToggle = onToggle;
    this.#isEdited = isEdited;
    this.#search.addEventListener("input", () => this.#filter());
    this.#search.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" && this.#found.length) {
        event.preventDefault();
        this.#go(0);
      } else if (event.key === "Escape" && this.#search.value) {
        event.preventDefault();
        this.#search.value = "";
        this.#filter();
      }
    });
    this.#rows.addEventListener("keydown", (event) => this.#key(event));
  }

  get genes() {
    return this.#genes;
  }

  show(cell) {
    this.#genes = cell.genes.map((id, rank) => ({ id, rank, symbol: cell.symbols[rank] }));
    this.#search.disabled = false;
    this.#filter();
  }

  // After edits changed: the buttons say so.
  refresh() {
    for (const button of this.#rows.querySelectorAll("button[data-kind]")) {
      button.setAttribute("aria-pressed", String(this.#isEdited(button.dataset.kind, button.dataset.gene)));
    }
  }

  #filter() {
    const text = this.#search.value.trim().toLowerCase();
    this.#found = text
      ? this.#genes.filter((gene) => gene.symbol.toLowerCase().includes(text) || gene.id.toLowerCase().includes(text))
      : this.#genes;
    this.#shown = AT_A_TIME;
    this.#active = 0;
    byId("genes-count").textContent = text
      ? `${whole(this.#found.length)} of ${counted(this.#genes.length, "gene")}`
      : counted(this.#genes.length, "gene");
    this.#drawAbsent(text);
    this.#draw();
  }

  // Only overexpression puts a gene where there was none.
  #drawAbsent(text) {
    const name = this.#search.value.trim();
    const here = this.#genes.some((gene) => gene.symbol.toLowerCase() === text || gene.id.toLowerCase() === text);
    if (!text || here || this.#found.length > 5) {
      replace(byId("gene-absent"));
      return;
    }
    const add = () => this.#onToggle("overexpress", { id: name, symbol: name, rank: null });
    replace(
      byId("gene-absent"),
      h("p", { class: "note" }, this.#found.length ? "" : "Not among this cell's genes. ",
        h("button", { type: "button", class: "quiet", onclick: add }, `Overexpress ${name}`)),
    );
  }

  #draw() {
    const shown = this.#found.slice(0, this.#shown);
    const table = h("table", { role: "grid", "aria-label": "Genes by rank", "aria-rowcount": this.#found.length },
      h("colgroup", {}, ["rank", "name", "act", "act"].map((name) => h("col", { class: name }))),
      h("thead", { class: "visually-hidden" }, h("tr", {}, ["Rank", "Gene", "Delete", "Overexpress"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, shown.map((gene, at) => this.#row(gene, at))));
    const more = this.#found.length - shown.length;
    replace(this.#rows, shown.length ? table : null, more > 0
      ? h("button", { type: "button", class: "quiet more", onclick: () => this.#more() }, `Show ${whole(Math.min(more, AT_A_TIME))} more`)
      : null);
  }

  #row(gene, at) {
    const button = (kind, sign, word) =>
      h("td", {}, h("button", {
        type: "button", class: `edit ${kind}`, tabindex: -1, "data-kind": kind, "data-gene": gene.id,
        "aria-pressed": String(this.#isEdited(kind, gene.id)), "aria-label": `${word} ${gene.symbol}`, title: `${word} ${gene.symbol}`,
        onclick: () => this.#onToggle(kind, gene),
      }, sign));
    return h("tr", { tabindex: at === this.#active ? 0 : -1, "data-at": at, "aria-rowindex": at + 1 },
      h("td", { class: "rank" }, whole(gene.rank + 1)),
      h("th", { scope: "row" }, h("span", { class: "symbol" }, gene.symbol), gene.symbol === gene.id ? null : h("span", { class: "id" }, gene.id)),
      button("delete", "−", "Delete"),
      button("overexpress", "↑", "Overexpress"));
  }

  #more() {
    this.#shown += AT_A_TIME;
    this.#draw();
    this.#go(this.#shown - AT_A_TIME);
  }

  #go(at) {
    const rows = this.#rows.querySelectorAll("tbody tr");
    if (!rows.length) return;
    rows[this.#active]?.setAttribute("tabindex", "-1");
    this.#active = Math.max(0, Math.min(rows.length - 1, at));
    rows[this.#active].setAttribute("tabindex", "0");
    rows[this.#active].focus();
  }

  #key(event) {
    const row = event.target.closest("tr[data-at]");
    if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = Number(row.dataset.at);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + PAGE, PageUp: at - PAGE, Home: 0, End: Infinity }[event.key];
    const kind = { d: "delete", Delete: "delete", o: "overexpress" }[event.key];
    if (to !== undefined) {
      if (to < 0 && at === 0) this.#search.focus();
      else this.#go(to);
    } else if (kind) this.#onToggle(kind, this.#found[at]);
    else return;
    event.preventDefault();
  }
}
