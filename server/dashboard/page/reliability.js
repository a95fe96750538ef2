// The reliability diagram: how often answers of each confidence were right, with how many there are of each.

import { h, s, segmented, table } from "./dom.js";
import { PERCENTS, diamond, draw, image, line, scale, text, xAxis, yAxis } from "./plot.js";
import { count, many, percent, withInterval } from "./words.js";

const SPANS = { recent: "Newest labels", all: "All time" };

let span = "recent";

/** Fill the figure. `stored` as /v1/dashboard has it. */
export function showReliability(figure, stored) {
  const found = span === "recent" ? stored.recent : stored.totals.reliability;
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  const { total } = found.accuracy;
  figure.replaceChildren(
    h(
      "figcaption",
      {},
      h("h3", {}, "Is its confidence earned?"),
      h("p", { class: "finding" }, finding(found)),
    ),
    segmented("span", "Which labels", SPANS, span, (value) => {
      span = value;
      showReliability(figure, stored);
      figure.querySelector("input:checked").focus();
    }),
  );
  if (total === 0) {
    figure.append(h("p", { class: "empty" }, "No labels yet. Say what was true, above or with POST /feedback, and this diagram fills."));
    return;
  }
  figure.append(
    drawing,
    h(
      "ul",
      { class: "key" },
      h("li", {}, h("span", { class: "swatch band" }), "95% interval"),
      h("li", {}, h("span", { class: "swatch dot" }), "agrees with its confidence"),
      h("li", {}, h("span", { class: "swatch off" }), "does not"),
    ),
    table(
      "Reliability by bins of confidence",
      ["Confidence", "Mean", "Right", "Of", "Accuracy (95% interval)"],
      found.bins
        .filter((bin) => bin.accuracy.total > 0)
        .map((bin) => [
          range(bin), percent(bin.confidence), count(bin.accuracy.count), count(bin.accuracy.total), withInterval(bin.accuracy),
        ]),
      open,
    ),
  );
  draw(drawing, (width) => diagram(found, width));
}

function finding(found) {
  if (found.accuracy.total === 0) return "Nothing is known yet of how often it is right.";
  const off = found.bins.filter(isOff).length;
  const told = `${percent(found.accuracy.share)} of ${many(found.accuracy.total, "labelled answer")} were right; confidence is off by ${(100 * found.ece).toFixed(1)} points on average.`;
  return off === 0 ? told : `${told} In ${off === 1 ? "one bin" : `${off} bins`} by more than chance explains.`;
}

function isOff({ confidence, accuracy }) {
  return accuracy.total > 0 && (confidence < accuracy.low || confidence > accuracy.high);
}

function range(bin) {
  return `${Math.round(100 * bin.low)}–${Math.round(100 * bin.high)}%`;
}

function diagram(found, width) {
  const [left, right, top, middle, gap, tall] = [42, width - 8, 26, 26 + Math.min(260, width * 0.72), 22, 44];
  const bottom = middle + gap + tall;
  const x = scale([0, 1], [left, right]);
  const y = scale([0, 1], [middle, top]);
  const most = Math.max(...found.bins.map((bin) => bin.accuracy.total));
  const high = scale([0, most], [0, tall]);
  const label = `Reliability diagram: accuracy against confidence in ${found.bins.length} bins. ${finding(found)}`;
  return image(
    width,
    bottom + 42,
    label,
    yAxis(y, PERCENTS, "right", [left, right], top),
    line(x(0), y(0), x(1), y(1), "perfect"),
    found.bins.filter((bin) => bin.accuracy.total > 0).map((bin) => point(bin, x, y)),
    text(0, middle + gap - 6, "labels", { class: "name" }),
    found.bins.map((bin) => bar(bin, x, bottom, high)),
    xAxis(x, bottom, PERCENTS, "confidence", [left, right]),
  );
}

function point(bin, x, y) {
  const { confidence, accuracy } = bin;
  const [from, to] = [x(bin.low) + 1.5, x(bin.high) - 1.5];
  const off = isOff(bin);
  const [cx, cy] = [x(confidence), y(accuracy.share)];
  return s(
    "g",
    { class: off ? "bin off" : "bin", "data-right": accuracy.count, "data-of": accuracy.total },
    s("title", {}, `Confidence ${range(bin)}: ${count(accuracy.count)} of ${count(accuracy.total)} right, ${withInterval(accuracy)}`),
    s("rect", { x: from, y: y(accuracy.high), width: to - from, height: y(accuracy.low) - y(accuracy.high), rx: 3, class: "band" }),
    off ? diamond(cx, cy, 5.5, { class: "mark" }) : s("circle", { cx, cy, r: 4, class: "mark" }),
  );
}

function bar(bin, x, bottom, high) {
  const { total } = bin.accuracy;
  if (total === 0) return null;
  const [from, to] = [x(bin.low) + 1.5, x(bin.high) - 1.5];
  const height = Math.max(1, high(total));
  const short = total < 1000 ? String(total) : `${(total / 1000).toFixed(total < 9950 ? 1 : 0)}k`;
  return s(
    "g",
    { class: "count" },
    s("title", {}, `Confidence ${range(bin)}: ${many(total, "label")}`),
    s("rect", { x: from, y: bottom - height, width: to - from, height, rx: 1.5 }),
    to - from > 5.5 * short.length
      ? text((from + to) / 2, bottom - height - 4, short, { "text-anchor": "middle", class: "small" })
      : null,
  );
}
