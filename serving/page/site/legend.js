// The legend of the map: a button for each label, which shows that label alone.

import { h, replace, svg, whole } from "./elements.js";
import { MOST_LOOKS, lookOf } from "./looks.js";

// A mark as a small picture beside its label.
export function markOf(code) {
  const { colour, mark } = lookOf(code);
  const shape = {
    dot: () => svg("circle", { cx: 6, cy: 6, r: 4.2, fill: "currentColor" }),
    ring: () => svg("circle", { cx: 6, cy: 6, r: 3.6, fill: "none", stroke: "currentColor", "stroke-width": 2.2 }),
    triangle: () => svg("path", { d: "M6 1 11 10.2H1z", fill: "currentColor" }),
  }[mark]();
  const name = colour.replace("--", "");
  return svg("svg", { viewBox: "0 0 12 12", width: 12, height: 12, class: `mark ${name}`, "aria-hidden": "true" }, shape);
}

// Draws the labels of a column; `onChoose` gets the code that is to stand alone, or null.
export function drawLegend(list, column, onChoose) {
  const counts = new Map();
  for (const code of column.codes) {
    const shown = code >= MOST_LOOKS ? -2 : code;
    counts.set(shown, (counts.get(shown) ?? 0) + 1);
  }
  let alone = null;
  const buttons = new Map();
  const choose = (code) => {
    alone = alone === code ? null : code;
    for (const [key, button] of buttons) button.setAttribute("aria-pressed", String(key === alone));
    list.classList.toggle("one-alone", alone !== null);
    onChoose(alone);
  };
  const entry = (code, name) => {
    const button = h(
      "button",
      { type: "button", "aria-pressed": "false", onclick: () => choose(code) },
      markOf(code),
      h("span", { class: "name", title: name }, name),
      h("span", { class: "n" }, whole(counts.get(code) ?? 0)),
    );
    buttons.set(code, button);
    return h("li", {}, button);
  };
  const entries = column.values.slice(0, MOST_LOOKS).map((name, code) => entry(code, name));
  const rest = (name, n) => h("li", { class: "rest" }, markOf(-1), h("span", { class: "name" }, name), h("span", { class: "n" }, whole(n)));
  const rarer = column.values.length - MOST_LOOKS;
  if (counts.has(-2)) entries.push(rest(`${rarer} rarer labels`, counts.get(-2)));
  if (counts.has(-1)) entries.push(entry(-1, "no label"));
  list.classList.remove("one-alone");
  replace(list, entries);
}
