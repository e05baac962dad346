// Bars on one scale: what each edit moved, the largest first.

import { digits, svg } from "./elements.js";

export const ROW = 26;
export const HEAD = 30;
const LABEL = 104;
const VALUE = 74;
const GAP = 8;

// Enough decimals for three digits of the largest value.
export function placesFor(values) {
  const largest = Math.max(...values.map((value) => Math.abs(value ?? 0)), 1e-9);
  return Math.min(7, Math.max(2, 2 - Math.floor(Math.log10(largest))));
}

// rows: [{ label, value, kind, chosen }]; `numbers`: whether the values stand at the end of their rows.
export function barChart(rows, { width, title, places, numbers }) {
  const values = rows.map((row) => row.value ?? 0);
  const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
  const plot = Math.max(40, width - LABEL - GAP - (numbers ? VALUE : GAP));
  const span = high - low || 1;
  const x = (value) => LABEL + GAP + ((value - low) / span) * plot;
  const height = HEAD + rows.length * ROW + 4;
  const marks = ticks(low, high || 1, plot < 220 ? 2 : 4).flatMap((tick) => [
    svg("line", { x1: x(tick), x2: x(tick), y1: HEAD - 6, y2: height, class: tick === 0 ? "zero" : "grid" }),
    svg("text", { x: x(tick), y: HEAD - 12, class: "tick", "text-anchor": "middle" }, tick === 0 ? "0" : trimmed(tick)),
  ]);
  const bars = rows.map((row, at) => bar(row, HEAD + at * ROW, x, numbers ? places : null, width));
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "bars" }, marks, bars);
}

function bar(row, top, x, places, width) {
  const middle = top + ROW / 2;
  const [from, to] = [x(Math.min(0, row.value ?? 0)), x(Math.max(0, row.value ?? 0))];
  const words = places === null ? "" : row.value === null ? "no value" : digits(row.value, places);
  return svg("g", { class: `one ${row.kind}${row.chosen ? " chosen" : ""}` },
    row.chosen ? svg("rect", { x: 0, y: top, width, height: ROW, class: "row" }) : null,
    svg("text", { x: LABEL, y: middle, class: "name", "text-anchor": "end", "dominant-baseline": "central" }, fitted(row.label)),
    svg("rect", { x: from, y: top + 6, width: Math.max(row.value ? 1 : 0, to - from), height: ROW - 12, rx: 1.5, class: "bar" }),
    words === "" ? null : svg("text", { x: width - 2, y: middle, class: "value", "text-anchor": "end", "dominant-baseline": "central" }, words));
}

function fitted(text) {
  return text.length > 15 ? `${text.slice(0, 14)}…` : text;
}

// Round numbers from low to high, zero among them.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k === 0 ? 0 : k * step);
  return found;
}

function trimmed(value) {
  return String(Number(value.toPrecision(3))).replace("-", "−");
}
