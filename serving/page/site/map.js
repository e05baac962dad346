// The reference as a map on a canvas: points by label, one cell among them, hover, keyboard, zoom.

import { say } from "./elements.js";
import { MOST_LOOKS, drawMark, lookOf, readColours } from "./looks.js";
import { describe, fillTip } from "./map_tip.js";

const MARGIN = 26;
const HIT = 14;
const LEAST_STEP = 14;
const ZOOM_STEP = 1.6;
const MOST_ZOOM = 60;
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class CellMap {
  #canvas;
  #frame;
  #tip;
  #onOpen;
  #base = document.createElement("canvas");
  #points = { x: [], y: [], ids: [], labels: {} };
  #examples = new Map();
  #column = "";
  #alone = null;
  #focus = null;
  #at = -1;
  #view = { zoom: 1, x: 0, y: 0 };
  #size = { width: 0, height: 0, ratio: 1 };
  #box = { x: 0, y: 0, scale: 1 };

  constructor({ canvas, frame, tip, onOpen }) {
    this.#canvas = canvas;
    this.#frame = frame;
    this.#tip = tip;
    this.#onOpen = onOpen;
    new ResizeObserver(() => this.#resize()).observe(frame);
    this.#listen();
  }

  // Columns of the reference, and the examples among them (by id) that can be opened.
  show(points, examples) {
    this.#points = points;
    this.#examples = examples;
    const bounds = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    this.#box.bounds = { x: bounds(points.x), y: bounds(points.y) };
    this.#resize();
  }

  colourBy(column) {
    this.#column = column;
    this.#alone = null;
    this.#redraw();
  }

  // Show one label before pale others; null shows all.
  isolate(code) {
    this.#alone = code;
    this.#redraw();
  }

  // The asked cell: { name, place, neighbors: [{ place }] }, or null.
  focus(cell) {
    this.#focus = cell;
    if (cell) this.#bringIntoView(...this.#screen(cell.place[0], cell.place[1]));
    this.#draw();
  }

  refresh() {
    this.#redraw();
  }

  showAll() {
    this.#view = { zoom: 1, x: 0, y: 0 };
    this.#redraw();
  }

  zoomBy(steps, around) {
    const [x, y] = around ?? this.#middle();
    const zoom = Math.min(MOST_ZOOM, Math.max(1, this.#view.zoom * ZOOM_STEP ** steps));
    const factor = zoom / this.#view.zoom;
    this.#view = { zoom, x: x - factor * (x - this.#view.x), y: y - factor * (y - this.#view.y) };
    if (zoom === 1) this.#view = { zoom: 1, x: 0, y: 0 };
    this.#redraw();
  }

  // Around the asked cell if there is one, else the middle.
  #middle() {
    if (this.#focus) return this.#screen(...this.#focus.place);
    return [this.#size.width / 2, this.#size.height / 2];
  }

  #resize() {
    const { width, height } = this.#frame.getBoundingClientRect();
    if (!width || !height) return;
    const ratio = window.devicePixelRatio || 1;
    this.#size = { width, height, ratio };
    for (const canvas of [this.#canvas, this.#base]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const { bounds } = this.#box;
    if (bounds) {
      const wide = Math.max(1e-9, bounds.x[1] - bounds.x[0]);
      const high = Math.max(1e-9, bounds.y[1] - bounds.y[0]);
      const scale = Math.min((width - 2 * MARGIN) / wide, (height - 2 * MARGIN) / high);
      this.#box = {
        bounds,
        scale,
        x: width / 2 - (scale * (bounds.x[0] + bounds.x[1])) / 2,
        y: height / 2 + (scale * (bounds.y[0] + bounds.y[1])) / 2,
      };
    }
    this.#redraw();
  }

  #screen(x, y) {
    const { zoom, x: left, y: top } = this.#view;
    return [left + zoom * (this.#box.x + this.#box.scale * x), top + zoom * (this.#box.y - this.#box.scale * y)];
  }

  get #radius() {
    const n = Math.max(1, this.#points.x.length);
    const plain = Math.min(3.4, Math.max(1.4, 150 / Math.sqrt(n)));
    return Math.min(7, plain * Math.sqrt(Math.sqrt(this.#view.zoom)));
  }

  #redraw() {
    const context = this.#base.getContext("2d");
    const { width, height, ratio } = this.#size;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const colours = readColours();
    const column = this.#points.labels[this.#column];
    const many = this.#points.x.length > 3000;
    for (const [code, rows] of this.#byCode(column)) {
      const look = lookOf(code);
      const faded = this.#alone !== null && this.#alone !== code;
      context.globalAlpha = faded ? 0.14 : many ? 0.72 : 0.85;
      context.fillStyle = context.strokeStyle = colours[faded ? "--class-none" : look.colour];
      for (const row of rows) {
        const [x, y] = this.#screen(this.#points.x[row], this.#points.y[row]);
        if (x > -9 && y > -9 && x < width + 9 && y < height + 9) drawMark(context, look.mark, x, y, this.#radius);
      }
    }
    context.globalAlpha = 1;
    this.#draw();
  }

  // Rows by class: those without a label first, then the commonest, so that rare ones lie on top.
  #byCode(column) {
    const groups = new Map([[-1, []]]);
    for (let row = 0; row < this.#points.x.length; row += 1) {
      const code = column ? column.codes[row] : -1;
      const shown = code >= MOST_LOOKS ? -1 : code;
      if (!groups.has(shown)) groups.set(shown, []);
      groups.get(shown).push(row);
    }
    const order = [...groups].sort((a, b) => a[0] - b[0]);
    const alone = order.findIndex(([code]) => code === this.#alone);
    if (alone >= 0) order.push(...order.splice(alone, 1));
    return order;
  }

  #draw() {
    const context = this.#canvas.getContext("2d");
    const { width, height, ratio } = this.#size;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.drawImage(this.#base, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const colours = readColours();
    if (this.#at >= 0) {
      const [x, y] = this.#screen(this.#points.x[this.#at], this.#points.y[this.#at]);
      ring(context, x, y, this.#radius + 3.5, colours["--ink"], colours["--paper"], 1.5);
    }
    if (this.#focus) this.#drawFocus(context, colours, width);
  }

  #drawFocus(context, colours, width) {
    const [x, y] = this.#screen(...this.#focus.place);
    context.strokeStyle = colours["--ink"];
    context.lineWidth = 1;
    for (const neighbor of this.#focus.neighbors) {
      if (!neighbor.place) continue;
      const [nx, ny] = this.#screen(...neighbor.place);
      context.globalAlpha = 0.4;
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(nx, ny);
      context.stroke();
      context.globalAlpha = 0.9;
      ring(context, nx, ny, this.#radius + 1.5, colours["--ink"], colours["--paper"], 1.2);
    }
    context.globalAlpha = 1;
    context.fillStyle = colours["--accent"];
    context.beginPath();
    context.arc(x, y, 5.5, 0, 2 * Math.PI);
    context.fill();
    ring(context, x, y, 5.5, colours["--ink"], colours["--paper"], 2);
    context.font = "600 13px system-ui, sans-serif";
    const left = x > width - context.measureText(this.#focus.name).width - 26;
    context.textAlign = left ? "right" : "left";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 4;
    context.strokeStyle = colours["--paper"];
    context.strokeText(this.#focus.name, x + (left ? -13 : 13), y);
    context.fillStyle = colours["--ink"];
    context.fillText(this.#focus.name, x + (left ? -13 : 13), y);
  }

  #listen() {
    const canvas = this.#canvas;
    let dragged = null;
    canvas.addEventListener("pointerdown", (event) => {
      dragged = { x: event.clientX, y: event.clientY, moved: false };
      if (event.pointerType === "mouse") canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (dragged && this.#view.zoom > 1) {
        const [dx, dy] = [event.clientX - dragged.x, event.clientY - dragged.y];
        if (!dragged.moved && Math.hypot(dx, dy) < 4) return;
        dragged = { x: event.clientX, y: event.clientY, moved: true };
        this.#view.x += dx;
        this.#view.y += dy;
        this.#goTo(-1);
        this.#redraw();
      } else this.#goTo(this.#under(event.offsetX, event.offsetY));
    });
    canvas.addEventListener("pointerup", () => {
      if (dragged && !dragged.moved) this.#open();
      dragged = null;
    });
    canvas.addEventListener("pointerleave", () => this.#goTo(-1));
    canvas.addEventListener("blur", () => this.#goTo(-1));
    canvas.addEventListener("wheel", (event) => {
      // A plain wheel scrolls the page; a pinch, and the wheel with Ctrl, zoom.
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoomBy(-Math.sign(event.deltaY) * 0.5, [event.offsetX, event.offsetY]);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (STEPS[event.key]) this.#step(STEPS[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoomBy(1, this.#cursor());
    else if (event.key === "-") this.zoomBy(-1, this.#cursor());
    else if (event.key === "0") this.showAll();
    else if (event.key === "Enter") this.#open();
    else if (event.key === "Escape") this.#goTo(-1);
    else return;
    event.preventDefault();
  }

  #cursor() {
    if (this.#at < 0) return this.#middle();
    return this.#screen(this.#points.x[this.#at], this.#points.y[this.#at]);
  }

  // To the cell that lies nearest in this direction, far enough away to get anywhere among thousands.
  #step([dx, dy]) {
    const [x, y] = this.#cursor();
    let best = -1;
    let least = Infinity;
    for (let row = 0; row < this.#points.x.length; row += 1) {
      const [px, py] = this.#screen(this.#points.x[row], this.#points.y[row]);
      const along = (px - x) * dx + (py - y) * dy;
      const across = Math.abs((px - x) * dy - (py - y) * dx);
      if (along >= LEAST_STEP && along + 2.5 * across < least) {
        best = row;
        least = along + 2.5 * across;
      }
    }
    if (best < 0) return;
    this.#bringIntoView(...this.#screen(this.#points.x[best], this.#points.y[best]));
    this.#goTo(best);
    say(describe(this.#points, best, this.#examples));
  }

  #bringIntoView(x, y) {
    const { width, height } = this.#size;
    if (this.#view.zoom === 1 || (x > MARGIN && y > MARGIN && x < width - MARGIN && y < height - MARGIN)) return;
    this.#view.x += width / 2 - x;
    this.#view.y += height / 2 - y;
    this.#redraw();
  }

  #under(x, y) {
    let best = -1;
    let least = HIT * HIT;
    for (let row = 0; row < this.#points.x.length; row += 1) {
      const [px, py] = this.#screen(this.#points.x[row], this.#points.y[row]);
      const away = (px - x) ** 2 + (py - y) ** 2;
      if (away < least) [best, least] = [row, away];
    }
    return best;
  }

  #goTo(row) {
    if (row === this.#at) return;
    this.#at = row;
    this.#canvas.classList.toggle("opens", row >= 0 && this.#examples.has(this.#points.ids[row]));
    this.#tip.hidden = row < 0;
    if (row >= 0) {
      const at = this.#screen(this.#points.x[row], this.#points.y[row]);
      fillTip(this.#tip, this.#points, row, this.#examples, at, this.#size);
    }
    this.#draw();
  }

  #open() {
    const example = this.#examples.get(this.#points.ids[this.#at]);
    if (example) this.#onOpen(example);
  }
}

function ring(context, x, y, radius, colour, halo, width) {
  for (const [style, wide] of [[halo, width + 2], [colour, width]]) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.strokeStyle = style;
    context.lineWidth = wide;
    context.stroke();
  }
}
