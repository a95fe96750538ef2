// Shared by the figures: drawings that follow the page's width, scales and axes. Colours and fonts are in page.css.

import { s } from "./dom.js";

const drawn = new WeakMap();
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    // In the next frame, since drawing changes the height that the observer is reporting.
    if (target.isConnected) requestAnimationFrame(() => redraw(target));
    else sizes.unobserve(target);
  }
});

/** Fill an element with the SVG of `render(width)`, now and whenever its width changes. */
export function draw(element, render) {
  drawn.set(element, { render, width: 0 });
  sizes.observe(element);
  redraw(element, true);
}

function redraw(element, always = false) {
  const state = drawn.get(element);
  const width = Math.floor(element.clientWidth);
  if (state === undefined || width === 0 || (!always && width === state.width)) return;
  state.width = width;
  element.replaceChildren(state.render(width));
}

/** A function from value to position: linear, or logarithmic if `log`. */
export function scale([from, to], [start, end], log = false) {
  const of = log ? Math.log10 : (value) => value;
  const [low, high] = [of(from), of(to)];
  return (value) => start + ((of(value) - low) / (high - low)) * (end - start);
}

/** An SVG that screen readers treat as one image with a label. The table below it has the numbers. */
export function image(width, height, label, ...children) {
  return s(
    "svg",
    { role: "img", "aria-label": label, width, height, viewBox: `0 0 ${width} ${height}`, class: "plot" },
    ...children,
  );
}

export function text(x, y, content, attributes = {}) {
  return s("text", { x, y, ...attributes }, content);
}

export function line(x1, y1, x2, y2, name) {
  return s("line", { x1, y1, x2, y2, class: name });
}

/** The horizontal axis at `y` with labelled ticks and a name. `ticks` are [value, label] pairs. */
export function xAxis(x, y, ticks, name, [left, right]) {
  return s(
    "g",
    { class: "axis" },
    line(left, y, right, y, "base"),
    ticks.map(([value, label]) => [
      line(x(value), y, x(value), y + 4, "base"),
      text(x(value), y + 17, label, { "text-anchor": x(value) < left + 15 && label.length > 4 ? "start" : "middle" }),
    ]),
    text((left + right) / 2, y + 36, name, { "text-anchor": "middle", class: "name" }),
  );
}

/** Grid lines with labels at their left, and the name of the vertical axis above. */
export function yAxis(y, ticks, name, [left, right], top) {
  return s(
    "g",
    { class: "axis" },
    ticks.map(([value, label]) => [
      line(left, y(value), right, y(value), "grid"),
      text(left - 7, y(value) + 4, label, { "text-anchor": "end" }),
    ]),
    text(0, top - 14, name, { class: "name" }),
  );
}

export function diamond(x, y, size, attributes) {
  return s("path", { d: `M${x} ${y - size} L${x + size} ${y} L${x} ${y + size} L${x - size} ${y} Z`, ...attributes });
}

export const PERCENTS = [0, 0.25, 0.5, 0.75, 1].map((value) => [value, `${100 * value}%`]);

/** A few round ticks from 0 to `most`, or to the next tick above it. */
export function roundTicks(most) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25].find((size) => most / size <= 5) ?? 0.25;
  const last = Math.ceil(most / step - 1e-9);
  return Array.from({ length: last + 1 }, (_, n) => [n * step, `${Math.round(1000 * n * step) / 10}%`]);
}
