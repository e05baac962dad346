// What the heads of a fine-tuned model say of the chosen cell, or of its first genes.

import { byId, digits, h, percent, replace, showProblem } from "./elements.js";
import { words } from "./map_tip.js";
import { Latest, ServiceError, ask } from "./service.js";

const SHOWN_CLASSES = 6;
const SHOWN_GENES = 20;

export class Heads {
  #heads;
  #latest = new Latest();

  constructor(heads) {
    this.#heads = heads;
    byId("heads").hidden = !heads.length;
  }

  async show(cell) {
    if (!this.#heads.length) return;
    const ofGenes = this.#heads[0].kind === "gene_classes";
    const json = { cells: [{ tokens: cell.tokens }], ...(ofGenes ? { genes: cell.genes.slice(0, SHOWN_GENES) } : {}) };
    try {
      const answer = await this.#latest.run((signal) => ask("v1/classify", { json, signal }));
      if (!answer) return;
      showProblem(byId("heads-problem"), null);
      replace(byId("heads-body"), ofGenes ? ofEachGene(answer.genes, cell) : answer.cells[0].heads.map(ofTheCell));
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      replace(byId("heads-body"));
      showProblem(byId("heads-problem"), error, () => this.show(cell));
    }
  }
}

function ofTheCell(head) {
  if (head.number !== null) {
    return h("div", { class: "head" }, h("h3", {}, words(head.label)), h("p", { class: "figure-number" }, digits(head.number, 2)));
  }
  const classes = Object.entries(head.probabilities).sort((one, other) => other[1] - one[1]);
  const rest = classes.slice(SHOWN_CLASSES).reduce((sum, [, share]) => sum + share, 0);
  const rows = classes.slice(0, SHOWN_CLASSES);
  if (classes.length > SHOWN_CLASSES) rows.push([`${classes.length - SHOWN_CLASSES} more`, rest]);
  return h("div", { class: "head votes" }, h("h3", {}, words(head.label)),
    h("ol", {}, rows.map(([name, share]) => h("li", { vars: { "--share": String(share) } }, h("span", { class: "name" }, name), h("span", { class: "n" }, percent(share))))));
}

function ofEachGene(genes, cell) {
  const symbolOf = new Map(cell.genes.map((id, at) => [id, cell.symbols[at]]));
  return h("div", { class: "scroll" }, h("table", { class: "numbers plain" },
    h("thead", {}, h("tr", {}, ["Gene", "Class", "Probability"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, genes.map((one) => h("tr", {}, h("th", { scope: "row" }, symbolOf.get(one.gene) ?? one.gene),
      h("td", { class: "text" }, one.predicted ?? "–"), h("td", {}, one.predicted ? percent(one.probabilities[one.predicted]) : "–"))))));
}
