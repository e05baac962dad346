// What a point of the map says: in a box beside it, and in a sentence for those who listen.

import { h, replace } from "./elements.js";

const FAR = 14;

export function labelsOf(points, row) {
  return Object.entries(points.labels).map(([column, { values, codes }]) => [
    column,
    codes[row] < 0 ? null : values[codes[row]],
  ]);
}

export function describe(points, row, examples) {
  const labels = labelsOf(points, row).map(([column, label]) => `${words(column)} ${label ?? "not given"}`);
  const more = examples.has(points.ids[row]) ? ". An example: Enter opens it." : "";
  return `${labels.join(", ")}; cell ${points.ids[row]}${more}`;
}

export function fillTip(tip, points, row, examples, [x, y], { width }) {
  const labels = labelsOf(points, row);
  replace(
    tip,
    labels.map(([column, label]) => h("p", {}, h("span", {}, words(column)), label ?? "not given")),
    h("p", { class: "id" }, points.ids[row]),
    examples.has(points.ids[row]) ? h("p", { class: "hint" }, "Example: click to open") : null,
  );
  const wide = tip.offsetWidth;
  const left = x + FAR + wide > width ? Math.max(0, x - FAR - wide) : x + FAR;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${Math.max(0, y - tip.offsetHeight / 2)}px`);
}

// cell_type -> cell type
export function words(column) {
  return column.replace(/^labels\./, "").replaceAll("_", " ");
}
