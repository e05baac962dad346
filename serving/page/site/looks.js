// How classes look: seven colours that differ for any colour vision, times three marks.
// Okabe and Ito without yellow and black, which fade on one of the two backgrounds, and a violet; values in the CSS.

const COLOURS = 7;
const MARKS = ["dot", "ring", "triangle"];
export const MOST_LOOKS = COLOURS * MARKS.length;

// { colour: name of a CSS variable, mark }; -1, and what comes after the looks, share the pale one.
export function lookOf(code) {
  if (code < 0 || code >= MOST_LOOKS) return { colour: "--class-none", mark: "dot" };
  return { colour: `--class-${code % COLOURS}`, mark: MARKS[Math.floor(code / COLOURS)] };
}

// The colours of this moment, by CSS variable: they follow the theme.
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["--ink", "--soft", "--line", "--paper", "--accent", "--class-none"];
  for (let at = 0; at < COLOURS; at += 1) names.push(`--class-${at}`);
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name).trim()]));
}

// One mark on a canvas around (x, y).
export function drawMark(context, mark, x, y, radius) {
  context.beginPath();
  if (mark === "triangle") {
    context.moveTo(x, y - 1.25 * radius);
    context.lineTo(x + 1.1 * radius, y + 0.85 * radius);
    context.lineTo(x - 1.1 * radius, y + 0.85 * radius);
    context.closePath();
    context.fill();
  } else if (mark === "ring") {
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.lineWidth = Math.max(1, 0.55 * radius);
    context.stroke();
  } else {
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
}
