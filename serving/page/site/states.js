// States to compare: published with the model, or the mean of cells that this page knows.

import { byId, counted, option, replace } from "./elements.js";
import { ask } from "./service.js";

export class StateChoice {
  #known = new Map();
  #selects = [byId("state-a"), byId("state-b")];

  constructor(onChange) {
    for (const select of this.#selects) select.addEventListener("change", onChange);
    this.offer({ published: [], examples: [], fileCells: [], layer: "", pooling: "" });
  }

  // What can be chosen now; a choice that is still possible stays.
  offer({ published, examples, fileCells, layer, pooling }) {
    this.layer = layer;
    this.pooling = pooling;
    const before = this.#known;
    const fitting = published.filter((one) => one.layer === layer && one.pooling === pooling);
    const cellsOf = (one) => (one.cells === null ? "published" : `published, ${counted(one.cells, "cell")}`);
    this.#known = new Map(fitting.map((one) => [`published:${one.name}`, { name: one.name, note: cellsOf(one), published: true }]));
    const groups = new Map();
    for (const cell of examples) groups.set(cell.title, [...(groups.get(cell.title) ?? []), cell]);
    for (const [label, cells] of groups) this.#add(`label:${label}`, label, `mean of ${counted(cells.length, "example")}`, cells, before);
    if (fileCells.length > 1) this.#add(`file:${fileCells[0].id}`, "the file's cells", `mean of ${counted(fileCells.length, "cell")}`, fileCells, before);
    for (const select of this.#selects) {
      const chosen = select.value;
      replace(select, option("", "no state"), [...this.#known].map(([id, state]) => option(id, `${state.name} (${state.note})`)));
      select.value = this.#known.has(chosen) ? chosen : "";
    }
  }

  #add(id, name, note, cells, before) {
    this.#known.set(id, { name, note, cells, vector: before.get(id)?.vector });
  }

  // The chosen states as a request has them, by their place; null for none, and twice the same is once.
  async chosen(signal) {
    const [a, b] = await Promise.all(this.#selects.map((select) => this.#state(select.value, signal)));
    return { a, b: a && b && a.name === b.name ? null : b };
  }

  async #state(id, signal) {
    const state = this.#known.get(id);
    if (!state) return null;
    if (state.published) return { name: state.name, published: true };
    state.vector ??= await this.#mean(state.cells, signal);
    return { name: state.name, vector: state.vector };
  }

  async #mean(cells, signal) {
    const answer = await ask("v1/embeddings", {
      json: { cells: cells.map((cell) => ({ tokens: cell.tokens })), layer: this.layer, output: "cell", pooling: this.pooling },
      signal,
    });
    const sum = new Float64Array(answer.cells[0].embedding.length);
    for (const { embedding } of answer.cells) for (let at = 0; at < sum.length; at += 1) sum[at] += embedding[at];
    return Array.from(sum, (value) => value / cells.length);
  }
}
