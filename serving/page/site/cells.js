// Which cell is looked at: examples of the reference, or cells of an .h5ad file that the service reads.

import { byId, counted, h, option, replace, say, showProblem, whole } from "./elements.js";
import { markOf } from "./legend.js";
import { words } from "./map_tip.js";
import { Latest, ServiceError, ask } from "./service.js";

const H5AD = "application/x-hdf5";
const PAGE = 50;
const MEGABYTE = 1024 * 1024;

export class CellList {
  #list = byId("cells");
  #source = byId("source");
  #limits;
  #onChoose;
  #examples = [];
  #read = null;
  #shown = [];
  #chosen = null;
  #reading = new Latest();

  constructor({ limits, onChoose }) {
    this.#limits = limits;
    this.#onChoose = onChoose;
    this.#source.addEventListener("change", () => this.#listSource());
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.#list.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.choose(this.#shown[Number(row.dataset.at)]);
    });
    this.#listenForFiles();
    this.#drawSources();
  }

  // Examples of the reference, with the column whose labels they are listed by.
  setExamples(examples, column, values) {
    this.#examples = examples.map((one) => ({
      ...one,
      kind: "example",
      title: one.labels[column] ?? "no label",
      code: values.indexOf(one.labels[column]),
    }));
    this.#drawSources();
    return this.#examples;
  }

  choose(cell) {
    this.#chosen = cell;
    if (!this.#shown.includes(cell)) {
      this.#source.value = cell.kind === "file" ? "file" : "all";
      this.#listSource();
    }
    this.#mark();
    this.#onChoose(cell);
  }

  get examples() {
    return this.#examples;
  }

  // Cells that were read from a file, all of one page of it.
  get fileCells() {
    return this.#read?.cells ?? [];
  }

  #drawSources() {
    const before = this.#source.value;
    const labels = [...new Set(this.#examples.map((one) => one.title))];
    const options = [];
    if (this.#read) options.push(option("file", this.#read.name));
    if (this.#examples.length) options.push(option("all", "Examples of the reference"));
    for (const label of labels) options.push(option(`label:${label}`, `Examples: ${label}`));
    replace(this.#source, options);
    byId("source-field").hidden = !options.length;
    if ([...this.#source.options].some((one) => one.value === before)) this.#source.value = before;
    this.#listSource();
  }

  #listSource() {
    const source = this.#source.value;
    if (source === "file") this.#shown = this.#read.cells;
    else if (source.startsWith("label:")) this.#shown = this.#examples.filter((one) => one.title === source.slice(6));
    else this.#shown = this.#examples;
    const rows = this.#shown.map((cell, at) =>
      h(
        "li",
        { role: "option", id: `cell-${at}`, "data-at": at, "aria-selected": "false" },
        cell.kind === "example" ? markOf(cell.code) : null,
        h("span", { class: "title" }, cell.title),
        h("span", { class: "id", title: cell.id }, cell.kind === "example" ? cell.id : counted(cell.n_genes, "gene")),
      ),
    );
    replace(this.#list, rows);
    this.#list.hidden = !rows.length;
    byId("no-cells").hidden = rows.length > 0;
    this.#mark();
  }

  #mark() {
    const at = this.#shown.indexOf(this.#chosen);
    for (const row of this.#list.children) row.setAttribute("aria-selected", String(Number(row.dataset.at) === at));
    if (at < 0) this.#list.removeAttribute("aria-activedescendant");
    else {
      this.#list.setAttribute("aria-activedescendant", `cell-${at}`);
      this.#list.children[at].scrollIntoView({ block: "nearest" });
    }
  }

  #key(event) {
    const at = this.#shown.indexOf(this.#chosen);
    const last = this.#shown.length - 1;
    const next = { ArrowDown: Math.min(last, at + 1), ArrowUp: Math.max(0, at - 1), Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    if (next !== at) this.choose(this.#shown[next]);
  }

  #listenForFiles() {
    const drop = byId("drop");
    const input = byId("file");
    input.addEventListener("change", () => {
      if (input.files.length) this.readFile(input.files[0]);
      input.value = "";
    });
    for (const kind of ["dragenter", "dragover"]) {
      document.addEventListener(kind, (event) => {
        if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
        event.preventDefault();
        drop.classList.add("over");
      });
    }
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) drop.classList.remove("over");
    });
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      drop.classList.remove("over");
      if (event.dataTransfer.files.length) this.readFile(event.dataTransfer.files[0]);
    });
  }

  // Sends the file and lists a page of its cells, with their genes as the model ranks them.
  async readFile(file, offset = 0) {
    showProblem(byId("file-problem"), null);
    if (file.size > this.#limits.max_body_bytes) {
      showProblem(byId("file-problem"), tooLarge(file, this.#limits.max_body_bytes));
      return;
    }
    const limit = Math.min(PAGE, this.#limits.max_cells);
    byId("drop").setAttribute("aria-busy", "true");
    replace(byId("file-facts"), `Reading ${file.name} …`);
    try {
      const answer = await this.#reading.run((signal) =>
        ask("v1/tokens", { body: file, type: H5AD, query: { offset, limit }, signal }),
      );
      if (answer) this.#take(file, answer);
    } catch (error) {
      if (!(error instanceof ServiceError)) throw error;
      replace(byId("file-facts"));
      showProblem(byId("file-problem"), error);
    } finally {
      byId("drop").removeAttribute("aria-busy");
    }
  }

  #take(file, answer) {
    const cells = answer.cells.map((cell, at) => ({
      ...cell,
      kind: "file",
      id: cell.id ?? `cell ${answer.file.offset + at + 1}`,
      title: cell.id ?? `Cell ${answer.file.offset + at + 1}`,
      labels: {},
    }));
    this.#read = { name: file.name, cells };
    this.#drawSources();
    this.#source.value = "file";
    this.#listSource();
    replace(byId("file-facts"), this.#factsOf(file, answer.file, cells.length));
    say(`${counted(cells.length, "cell")} of ${file.name} read.`);
    if (cells.length) this.choose(cells[0]);
  }

  #factsOf(file, facts, n) {
    const [first, last] = [facts.offset + 1, facts.offset + n];
    const turn = (text, offset) =>
      h("button", { type: "button", class: "quiet", onclick: () => this.readFile(file, offset) }, text);
    const pages = [];
    if (facts.offset > 0) pages.push(turn("Earlier", Math.max(0, facts.offset - PAGE)));
    if (last < facts.cells) pages.push(turn("Further", last));
    return [
      h("p", {}, `Cells ${whole(first)} to ${whole(last)} of ${whole(facts.cells)}. Counts from ${facts.counts_slot}; `
        + `${whole(facts.genes_known)} of ${counted(facts.genes, "gene")} known to the model.`),
      pages.length ? h("p", { class: "pages" }, pages) : null,
      facts.notes.length ? h("details", {}, h("summary", {}, "How it was read"), h("ul", {}, facts.notes.map((note) => h("li", {}, note)))) : null,
    ];
  }
}

function tooLarge(file, limit) {
  return {
    message: `The file has ${whole(Math.ceil(file.size / MEGABYTE))} MB; this service reads ${whole(Math.floor(limit / MEGABYTE))} MB at a time.`,
    where: file.name,
    next: "Write a smaller one: adata[:100].write_h5ad(\"some.h5ad\").",
  };
}

// What became of a cell's genes on the way into the model.
export function drawCellFacts(place, cell) {
  const rows = [];
  const row = (name, value) => rows.push(h("dt", {}, name), h("dd", {}, value));
  for (const [column, label] of Object.entries(cell.labels)) if (label !== null) row(words(column), label);
  row("Genes ranked", whole(cell.n_genes));
  row("Tokens seen", cell.cropped ? `${whole(cell.n_tokens)}, the rest is cropped` : whole(cell.n_tokens));
  const { ignored } = cell;
  if (ignored.n) {
    const reasons = [["unknown", "unknown"], ["no_median", "without a median"], ["zero", "zero"]];
    row("Ignored", reasons.filter(([key]) => ignored[key]).map(([key, text]) => `${whole(ignored[key])} ${text}`).join(", "));
  }
  replace(
    place,
    h("h3", { title: cell.id }, cell.id),
    h("dl", {}, rows),
    ignored.genes.length
      ? h("details", {}, h("summary", {}, "Ignored genes"), h("p", { class: "small" }, ignored.genes.map((one) => `${one.gene} (${one.reason.replace("_", " ")})`).join(", ")))
      : null,
  );
}
