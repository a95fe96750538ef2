// Mutual information of recent traffic, and of the calibration set beside it.

import { h, s, table } from "./dom.js";
import { draw, image, line, scale, text, xAxis } from "./plot.js";
import { many, nats, percent, times, withInterval } from "./words.js";

const LIMIT = 0.95; // the quantile of the calibration set beyond which traffic is shown as unusual

/** Fill the figure. `found` is `mutual_information` of /v1/dashboard. */
export function showInformation(figure, found) {
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    h("figcaption", {}, h("h3", {}, "Is the traffic like what it knows?"), h("p", { class: "finding" }, finding(found))),
  );
  if (found.count === 0) {
    const others = `${many(found.left_out, "recent prediction")} cannot be compared: made with other samples than the calibration.`;
    const why = found.left_out > 0 ? others : "No predictions yet. Ask something.";
    figure.append(h("p", { class: "empty" }, why));
    return;
  }
  const left = found.left_out > 0 ? ` ${many(found.left_out, "other")} left out, made with other samples than the calibration.` : "";
  figure.append(
    drawing,
    h("p", { class: "quiet" }, `${many(found.count, "prediction")}, ${times(found.oldest, found.newest)}.${left}`),
    table(
      "Mutual information, in nats, by quantile",
      found.calibration === null ? ["Quantile", "Recent"] : ["Quantile", "Recent", "Calibration"],
      Object.entries(found.quantiles).map(([name, value]) => [
        percent(Number(name), 0),
        nats(value),
        ...(found.calibration === null ? [] : [name in found.calibration ? nats(found.calibration[name]) : "–"]),
      ]),
      open,
    ),
  );
  draw(drawing, (width) => histogram(found, width));
}

function markAt(found) {
  return found.marks.find((mark) => mark.probability === LIMIT);
}

function finding(found) {
  const mark = markAt(found);
  if (found.count === 0) return "Mutual information is high where the posterior samples disagree.";
  if (mark === undefined) {
    return `Half of the recent predictions have a mutual information below ${nats(found.quantiles["0.5"])} nats. The adapter is not calibrated, so there is nothing to hold this against.`;
  }
  let verdict = "It is as familiar as the calibration set";
  if (mark.above.low > mark.expected) verdict = "More of it is unfamiliar than chance explains";
  if (mark.above.high < mark.expected) verdict = "It is even more familiar than the calibration set";
  return `${verdict}: ${withInterval(mark.above)} lie above the mark that ${percent(mark.expected, 0)} of the calibration set exceeded.`;
}

function histogram(found, width) {
  const { edges, counts } = found;
  const first = counts.findIndex((each) => each > 0);
  const told = [...Object.values(found.quantiles), ...Object.values(found.calibration ?? {})];
  const decade = (value, round) => 10 ** round(Math.log10(value) + 1e-9);
  // What lies below the first edge gets a decade of its own at the left.
  const least = Math.min(1e-3, edges[Math.max(0, first - 1)], ...told.filter((value) => value > edges[0]));
  const low = first === 0 ? edges[0] / 10 : decade(least, Math.floor);
  const high = decade(Math.max(0.999, ...told), Math.ceil);
  const [left, right, top] = [8, width - 8, 8];
  const x = scale([low, high], [left, right], true);
  const at = (value) => Math.min(right, Math.max(left, x(Math.max(value, 1e-12))));
  const strips = [["recent", found.quantiles], ...(found.calibration === null ? [] : [["calibration", found.calibration]])];
  const upper = top + 20 + 34 * strips.length;
  const bottom = upper + Math.min(190, width * 0.5);
  const most = Math.max(...counts);
  const y = scale([0, most], [0, bottom - upper - 18]);
  const limit = markAt(found)?.value;
  const powers = [];
  const each = (right - left) / Math.log10(high / low) < 72 ? 2 : 1; // on a narrow screen every other one
  for (let power = Math.round(Math.log10(high)); 10 ** power >= 0.99 * Math.max(low, edges[0]); power -= each) {
    powers.push([10 ** power, short(10 ** power)]);
  }
  const bars = counts.map((each, index) => {
    if (each === 0) return null;
    const [from, to] = [at(index === 0 ? low : edges[index - 1]), at(index < edges.length ? edges[index] : high)];
    if (to - from < 2 && index > 0) return null;
    const over = limit !== undefined && index > 0 && edges[index - 1] >= limit;
    const span = index === 0 ? `Below ${short(edges[0])}` : `${short(edges[index - 1])} to ${short(edges[index] ?? high)}`;
    return s(
      "g",
      { class: over ? "share off" : "share" },
      s("title", {}, `${span} nats: ${many(each, "prediction")}`),
      s("rect", { x: from + 0.75, y: bottom - y(each), width: Math.max(1.5, to - from - 1.5), height: y(each), rx: 1.5 }),
    );
  });
  return image(
    width,
    bottom + 42,
    `Histogram of mutual information. ${finding(found)}`,
    strips.map(([name, quantiles], index) => strip(name, quantiles, at, top + 34 * index)),
    bars,
    limit === undefined
      ? null
      : [
          line(at(limit), upper - 4, at(limit), bottom, "limit"),
          text(at(limit) + (at(limit) > width * 0.62 ? -5 : 5), upper + 6, "calibration’s 95%", {
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

/** A box plot: from 5% to 95%, the middle from 20% to 80%, the median. */
function strip(name, quantiles, at, top) {
  const [first, from, middle, to, last] = ["0.05", "0.2", "0.5", "0.8", "0.95"].map((each) => at(quantiles[each] ?? NaN));
  const y = top + 20;
  if ([first, from, middle, to, last].some(Number.isNaN)) return null;
  return s(
    "g",
    { class: `strip ${name}` },
    s("title", {}, `${name}: 5% to 95% from ${nats(quantiles["0.05"])} to ${nats(quantiles["0.95"])} nats, median ${nats(quantiles["0.5"])}`),
    text(8, top + 9, name === "recent" ? "recent traffic" : "calibration set", { class: "small" }),
    line(first, y, last, y, "whisker"),
    s("rect", { x: from, y: y - 5, width: Math.max(1, to - from), height: 10, rx: 2 }),
    line(middle, y - 8, middle, y + 8, "median"),
  );
}

