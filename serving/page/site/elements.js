// Elements of the page. Texts of the service become text nodes, never markup.

const SVG = "http://www.w3.org/2000/svg";

// h("button", { type: "button", class: "x", onclick: f, "aria-label": "…" }, "text", child, …)
export function h(tag, given = {}, ...children) {
  return filled(document.createElement(tag), given, children);
}

export function svg(tag, given = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), given, children);
}

export function replace(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

export function byId(id) {
  return document.getElementById(id);
}

function filled(element, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(key, one);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

// Says a sentence to those who do not see what changed.
export function say(sentence) {
  byId("status").textContent = sentence;
}

// What went wrong, where, and what next; empty for no error.
export function showProblem(place, error, again) {
  if (!error) {
    replace(place);
    return;
  }
  const lines = [h("p", { class: "what" }, sentence(error.message || String(error)))];
  const facts = [];
  if (error.where) facts.push(h("dt", {}, "Where"), h("dd", {}, error.where));
  if (error.next) facts.push(h("dt", {}, "What next"), h("dd", {}, error.next));
  if (error.requestId) facts.push(h("dt", {}, "Request"), h("dd", { class: "id" }, error.requestId));
  if (facts.length) lines.push(h("dl", {}, facts));
  if (again) lines.push(h("button", { type: "button", onclick: again }, "Ask again"));
  replace(place, h("div", { class: "problem", role: "alert" }, lines));
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function option(value, text, selected = false) {
  return h("option", { value, selected }, text);
}

// Numbers as a reader compares them: a real minus sign, thin groups, a fixed number of digits.
export function whole(value) {
  return value.toLocaleString("en-GB");
}

export function counted(n, one, many = `${one}s`) {
  return `${whole(n)} ${n === 1 ? one : many}`;
}

export function percent(share) {
  const value = 100 * share;
  return `${value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}

export function digits(value, places) {
  return value.toFixed(places).replace("-", "−");
}
