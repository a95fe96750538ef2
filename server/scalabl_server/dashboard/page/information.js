// The figure of mutual information: recent predictions compared with the calibration set.

import { h, s, table } from "./dom.js";
import { draw, image, line, scale, text, xAxis } from "./plot.js";
import { many, nats, percent, times, withInterval } from "./words.js";

const LIMIT = 0.95; // predictions above this quantile of the calibration set are shown as unusual

/** Fill the figure. `data` is `mutual_information` of /v1/dashboard. */
export function showInformation(figure, data) {
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    h("figcaption", {}, h("h3", {}, "Do the posterior samples agree on recent inputs?"), h("p", { class: "finding" }, finding(data))),
  );
  if (data.count === 0) {
    const others = `${many(data.left_out, "recent prediction")} cannot be compared: their method or samples differ from the calibration’s.`;
    const reason = data.left_out > 0 ? others : "No predictions yet. Ask a question.";
    figure.append(h("p", { class: "empty" }, reason));
    return;
  }
  const left = data.left_out > 0 ? ` ${many(data.left_out, "other")} left out: their method or samples differ from the calibration’s.` : "";
  figure.append(
    drawing,
    h("p", { class: "quiet" }, `${many(data.count, "prediction")}, ${times(data.oldest, data.newest)}.${left}`),
    table(
      "Mutual information, in nats, by quantile",
      data.calibration === null ? ["Quantile", "Recent"] : ["Quantile", "Recent", "Calibration"],
      Object.entries(data.quantiles).map(([name, value]) => [
        percent(Number(name), 0),
        nats(value),
        ...(data.calibration === null ? [] : [name in data.calibration ? nats(data.calibration[name]) : "–"]),
      ]),
      open,
    ),
  );
  draw(drawing, (width) => histogram(data, width));
}

function markAt(data) {
  return data.marks.find((mark) => mark.probability === LIMIT);
}

function finding(data) {
  const mark = markAt(data);
  if (data.count === 0) return "Mutual information is high when the posterior samples disagree.";
  if (mark === undefined) {
    return `Half of the recent predictions have a mutual information below ${nats(data.quantiles["0.5"])} nats. The adapter is not calibrated, so there is nothing to compare with.`;
  }
  let verdict = "Recent inputs are as familiar as the calibration set";
  if (mark.above.low > mark.expected) verdict = "More recent inputs are unfamiliar than chance explains";
  if (mark.above.high < mark.expected) verdict = "Recent inputs are more familiar than the calibration set";
  return `${verdict}: ${withInterval(mark.above)} are above the value that ${percent(mark.expected, 0)} of the calibration set exceeds.`;
}

function histogram(data, width) {
  const { edges, counts } = data;
  const first = counts.findIndex((number) => number > 0);
  const values = [...Object.values(data.quantiles), ...Object.values(data.calibration ?? {})];
  const decade = (value, round) => 10 ** round(Math.log10(value) + 1e-9);
  // Values below the first edge share a decade at the left.
  const least = Math.min(1e-3, edges[Math.max(0, first - 1)], ...values.filter((value) => value > edges[0]));
  const low = first === 0 ? edges[0] / 10 : decade(least, Math.floor);
  const high = decade(Math.max(0.999, ...values), Math.ceil);
  const [left, right, top] = [8, width - 8, 8];
  const x = scale([low, high], [left, right], true);
  const at = (value) => Math.min(right, Math.max(left, x(Math.max(value, 1e-12))));
  const strips = [["recent", data.quantiles], ...(data.calibration === null ? [] : [["calibration", data.calibration]])];
  const upper = top + 20 + 34 * strips.length;
  const bottom = upper + Math.min(190, width * 0.5);
  const most = Math.max(...counts);
  const y = scale([0, most], [0, bottom - upper - 18]);
  const limit = markAt(data)?.value;
  const powers = [];
  const step = (right - left) / Math.log10(high / low) < 72 ? 2 : 1; // on a narrow screen only every other power
  for (let power = Math.round(Math.log10(high)); 10 ** power >= 0.99 * Math.max(low, edges[0]); power -= step) {
    powers.push([10 ** power, short(10 ** power)]);
  }
  const bars = counts.map((number, index) => {
    if (number === 0) return null;
    const [from, to] = [at(index === 0 ? low : edges[index - 1]), at(index < edges.length ? edges[index] : high)];
    if (to - from < 2 && index > 0) return null;
    const over = limit !== undefined && index > 0 && edges[index - 1] >= limit;
    const span = index === 0 ? `Below ${short(edges[0])}` : `${short(edges[index - 1])} to ${short(edges[index] ?? high)}`;
    return s(
      "g",
      { class: over ? "share off" : "share" },
      s("title", {}, `${span} nats: ${many(number, "prediction")}`),
      s("rect", { x: from + 0.75, y: bottom - y(number), width: Math.max(1.5, to - from - 1.5), height: y(number), rx: 1.5 }),
    );
  });
  return image(
    width,
    bottom + 42,
    `Histogram of mutual information. ${finding(data)}`,
    strips.map(([name, quantiles], index) => strip(name, quantiles, at, top + 34 * index)),
    bars,
    limit === undefined
      ? null
      : [
          line(at(limit), upper - 4, at(limit), bottom, "limit"),
          text(at(limit) + (at(limit) > width * 0.62 ? -5 : 5), upper + 6, "95% of the calibration set", {
            "text-anchor": at(limit) > width * 0.62 ? "end" : "start",
            class: "small",
          }),
        ],
    xAxis(x, bottom, powers, "mutual information (nats)", [left, right]),
  );
}

function short(value) {
  return String(Number(value.toPrecision(2)));
}

/** A box plot: whiskers from 5% to 95%, a box from 20% to 80%, and the median. */
function strip(name, quantiles, at, top) {
  const [first, from, middle, to, last] = ["0.05", "0.2", "0.5", "0.8", "0.95"].map((level) => at(quantiles[level] ?? NaN));
  const y = top + 20;
  if ([first, from, middle, to, last].some(Number.isNaN)) return null;
  return s(
    "g",
    { class: `strip ${name}` },
    s("title", {}, `${name}: 5% to 95% from ${nats(quantiles["0.05"])} to ${nats(quantiles["0.95"])} nats, median ${nats(quantiles["0.5"])}`),
    text(8, top + 9, name === "recent" ? "recent predictions" : "calibration set", { class: "small" }),
    line(first, y, last, y, "whisker"),
    s("rect", { x: from, y: y - 5, width: Math.max(1, to - from), height: 10, rx: 2 }),
    line(middle, y - 8, middle, y + 8, "median"),
  );
}

