// The reliability diagram: the accuracy of predictions by their confidence, and the number of labels.

import { h, s, segmented, table } from "./dom.js";
import { PERCENTS, diamond, draw, image, line, scale, text, xAxis, yAxis } from "./plot.js";
import { count, many, percent, withInterval } from "./words.js";

const SPANS = { recent: "Newest labels", all: "All time" };

let span = "recent";

/** Fill the figure. `stored` is that of /v1/dashboard. */
export function showReliability(figure, stored) {
  const data = span === "recent" ? stored.recent : stored.totals.reliability;
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  const { total } = data.accuracy;
  figure.replaceChildren(
    h(
      "figcaption",
      {},
      h("h3", {}, "Does confidence match accuracy?"),
      h("p", { class: "finding" }, finding(data)),
    ),
    segmented("span", "Which labels", SPANS, span, (value) => {
      span = value;
      showReliability(figure, stored);
      figure.querySelector("input:checked").focus();
    }),
  );
  if (total === 0) {
    figure.append(h("p", { class: "empty" }, "No labels yet. Send true answers, here or with POST /feedback, to fill this diagram."));
    return;
  }
  figure.append(
    drawing,
    h(
      "ul",
      { class: "key" },
      h("li", {}, h("span", { class: "swatch band" }), "95% interval"),
      h("li", {}, h("span", { class: "swatch dot" }), "accuracy agrees with confidence"),
      h("li", {}, h("span", { class: "swatch off" }), "it does not"),
    ),
    table(
      "Reliability by bins of confidence",
      ["Confidence", "Mean", "Correct", "Accuracy, 95% interval"],
      data.bins
        .filter((bin) => bin.accuracy.total > 0)
        .map((bin) => [
          range(bin),
          percent(bin.confidence),
          `${count(bin.accuracy.count)} of ${count(bin.accuracy.total)}`,
          withInterval(bin.accuracy),
        ]),
      open,
    ),
  );
  draw(drawing, (width) => diagram(data, width));
}

function finding(data) {
  if (data.accuracy.total === 0) return "The accuracy is not known yet.";
  const off = data.bins.filter(isOff).length;
  const { share, total } = data.accuracy;
  const ece = (100 * data.ece).toFixed(1);
  const result = `${percent(share)} of ${many(total, "labelled answer")} were correct. Confidence differs from accuracy by ${ece} percentage points on average.`;
  return off === 0 ? result : `${result} In ${off === 1 ? "one bin" : `${off} bins`} the difference is larger than chance explains.`;
}

function isOff({ confidence, accuracy }) {
  return accuracy.total > 0 && (confidence < accuracy.low || confidence > accuracy.high);
}

function range(bin) {
  return `${Math.round(100 * bin.low)}–${Math.round(100 * bin.high)}%`;
}

function diagram(data, width) {
  const [left, right, top, middle, gap, tall] = [42, width - 8, 30, 30 + Math.min(250, width * 0.7), 38, 44];
  const bottom = middle + gap + tall;
  const x = scale([0, 1], [left, right]);
  const y = scale([0, 1], [middle, top]);
  const seen = data.bins.filter((bin) => bin.accuracy.total > 0);
  const most = Math.max(...seen.map((bin) => bin.accuracy.total));
  const high = scale([0, most], [0, tall]);
  const label = `Reliability diagram: accuracy against confidence in ${data.bins.length} bins. ${finding(data)}`;
  return image(
    width,
    bottom + 42,
    label,
    yAxis(y, PERCENTS, "accuracy", [left, right], top),
    seen.map((bin) => s("rect", { ...reach(bin, x, y), class: isOff(bin) ? "band off" : "band" })),
    line(x(0), y(0), x(1), y(1), "perfect"),
    seen.map((bin) => point(bin, x, y)),
    text(0, middle + gap - 8, "labels", { class: "name" }),
    data.bins.map((bin) => bar(bin, x, bottom, high, most)),
    xAxis(x, bottom, PERCENTS, "confidence", [left, right]),
  );
}

function across(bin, x) {
  const from = x(bin.low) + 1.5;
  return { x: from, width: x(bin.high) - 1.5 - from };
}

/** The rectangle of a bin's interval. */
function reach(bin, x, y) {
  const { low, high } = bin.accuracy;
  return { ...across(bin, x), y: y(high), height: y(low) - y(high), rx: 3 };
}

function point(bin, x, y) {
  const { confidence, accuracy } = bin;
  const off = isOff(bin);
  const [cx, cy] = [x(confidence), y(accuracy.share)];
  return s(
    "g",
    { class: off ? "bin off" : "bin", "data-right": accuracy.count, "data-of": accuracy.total },
    s("title", {}, `Confidence ${range(bin)}: ${count(accuracy.count)} of ${count(accuracy.total)} correct, ${withInterval(accuracy)}`),
    s("rect", { ...reach(bin, x, y), class: "reach" }),
    off ? diamond(cx, cy, 5.5, { class: "mark" }) : s("circle", { cx, cy, r: 4, class: "mark" }),
  );
}

function bar(bin, x, bottom, high, most) {
  const { total } = bin.accuracy;
  if (total === 0) return null;
  const place = across(bin, x);
  const height = Math.max(1, high(total));
  const short = total < 1000 ? String(total) : `${(total / 1000).toFixed(total < 9950 ? 1 : 0)}k`;
  return s(
    "g",
    { class: "count" },
    s("title", {}, `Confidence ${range(bin)}: ${many(total, "label")}`),
    s("rect", { ...place, y: bottom - height, height, rx: 1.5 }),
    (place.width > 13 && place.width + 3 >= 6 * short.length) || total === most
      ? text(place.x + place.width / 2, bottom - height - 4, short, { "text-anchor": "middle", class: "small" })
      : null,
  );
}
