// The risk-coverage curve: the share of wrong answers if only the least doubtful are given.

import { h, s, segmented, table } from "./dom.js";
import { PERCENTS, diamond, draw, image, line, roundTicks, scale, text, xAxis, yAxis } from "./plot.js";
import { DOUBTS, count, many, nats, percent, withInterval } from "./words.js";

const SHORT = { entropy: "Entropy", mutual_information: "MI", confidence: "Confidence" };
const ROWS = 12; // of the table, about

let chosen = null;

/** Fill the figure. `data` is `risk_coverage` of /v1/dashboard. */
export function showRisk(figure, data) {
  const score = chosen ?? data.score;
  const points = data.curves[score];
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    h("figcaption", {}, h("h3", {}, "What would abstaining gain?"), h("p", { class: "finding" }, finding(points, data.rule))),
    segmented("score", "Doubt score by which to abstain", SHORT, score, (value) => {
      chosen = value;
      showRisk(figure, data);
      figure.querySelector("input:checked").focus();
    }),
  );
  if (points.length === 0) {
    figure.append(h("p", { class: "empty" }, "No labels yet."));
    return;
  }
  figure.append(
    drawing,
    h(
      "ul",
      { class: "key" },
      h("li", {}, h("span", { class: "swatch band" }), "95% interval"),
      h("li", {}, h("span", { class: "swatch dash" }), "if everything is answered"),
      data.rule === null ? null : h("li", {}, h("span", { class: "swatch off" }), "the adapter’s rule"),
    ),
    table(
      `Risk and coverage by ${DOUBTS[score]}`,
      ["Answered", "Doubt up to", "Wrong", "Share wrong, 95% interval"],
      thinned(points).map((point) => [
        percent(point.coverage),
        nats(point.doubt),
        `${count(point.wrong.count)} of ${count(point.wrong.total)}`,
        withInterval(point.wrong),
      ]),
      open,
    ),
  );
  draw(drawing, (width) => curve(points, data.rule, width));
}

function thinned(points) {
  const step = Math.ceil(points.length / ROWS);
  return points.filter((_, index) => (points.length - 1 - index) % step === 0);
}

function finding(points, rule) {
  if (points.length === 0) return "Abstaining from uncertain answers leaves fewer wrong answers.";
  const all = points.at(-1).wrong;
  const result = `If everything is answered, ${percent(all.share)} of ${many(all.total, "labelled answer")} are wrong`;
  if (rule !== null && rule.wrong.share !== null) {
    return `${result}. The adapter’s rule answers ${percent(rule.answered.share)}; ${percent(rule.wrong.share)} of these answers are wrong.`;
  }
  const surest = points.find((point) => point.coverage >= 0.8);
  return `${result}. Of the ${percent(surest.coverage, 0)} with the least doubt, ${percent(surest.wrong.share)} are wrong.`;
}

function curve(points, rule, width) {
  const [left, right, top] = [42, width - 8, 30];
  const bottom = top + Math.min(330, width * 0.85);
  // The first few answers have very wide intervals. They are drawn, but do not determine the axis.
  const steady = points.filter((point) => point.wrong.total >= 10);
  const ticks = roundTicks(Math.min(1, Math.max(0.05, 1.1 * Math.max(...(steady.length ? steady : points).map((point) => point.wrong.high)))));
  const most = ticks.at(-1)[0];
  const x = scale([0, 1], [left, right]);
  const y = scale([0, most], [bottom, top]);
  const at = (value) => Math.max(top, y(value));
  const all = points.at(-1).wrong.share;
  const path = points.map((point, index) => `${index ? "L" : "M"}${x(point.coverage)} ${at(point.wrong.share)}`).join("");
  const there = points.map((point) => `${x(point.coverage)} ${at(point.wrong.high)}`);
  const back = points.map((point) => `${x(point.coverage)} ${at(point.wrong.low)}`).reverse();
  return image(
    width,
    bottom + 42,
    `Risk–coverage curve. ${finding(points, rule)}`,
    yAxis(y, ticks, "wrong among the answered", [left, right], top),
    s("path", { d: `M${[...there, ...back].join("L")}Z`, class: "band" }),
    line(left, y(all), right, y(all), "whole"),
    s("path", { d: path, class: "curve" }),
    points.length > 1 ? null : s("circle", { cx: x(points[0].coverage), cy: at(points[0].wrong.share), r: 4, class: "mark" }),
    rule === null || rule.wrong.share === null ? null : operating(rule, x, at, width),
    xAxis(x, bottom, PERCENTS, "share answered, least doubtful first", [left, right]),
  );
}

function operating(rule, x, at, width) {
  const [cx, cy] = [x(rule.answered.share), at(rule.wrong.share)];
  const leftward = cx > width / 2;
  return s(
    "g",
    { class: "rule" },
    s("title", {}, `The adapter’s rule answers ${withInterval(rule.answered)}; of these ${withInterval(rule.wrong)} are wrong`),
    line(cx, at(rule.wrong.low), cx, at(rule.wrong.high), "error"),
    diamond(cx, cy, 6, { class: "mark" }),
    text(cx + (leftward ? -10 : 10), cy - 10, "rule", { "text-anchor": leftward ? "end" : "start", class: "small" }),
  );
}
