// Mutual information of recent traffic, and of the calibration set beside it.

import { h, s, table } from "./dom.js";
import { draw, image, line, scale, text, xAxis } from "./plot.js";
import { many, nats, percent, time, withInterval } from "./words.js";

const LIMIT = 0.95; // the quantile of the calibration set beyond which traffic is shown as unusual

/** Fill the figure. `found` is `mutual_information` of /v1/dashboard. */
export function showInformation(figure, found) {
  const drawing = h("div", { class: "drawing" });
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    h("figcaption", {}, h("h3", {}, "Is the traffic like what it knows?"), h("p", { class: "finding" }, finding(found))),
  );
  if (found.count === 0) {
    const why = found.left_out > 0 ? `${many(found.left_out, "recent prediction")} cannot be compared: they were made with other samples than the calibration.` : "No predictions yet. Ask something.";
    figure.append(h("p", { class: "empty" }, why));
    return;
  }
  const left = found.left_out > 0 ? ` ${many(found.left_out, "other")} left out, made with other samples than the calibration.` : "";
  figure.append(
    drawing,
    h("p", { class: "quiet" }, `${many(found.count, "prediction")}, ${time(found.oldest)} to ${time(found.newest)}.${left}`),
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
  const verdict =
    mark.above.low > mark.expected ? "More of it is unfamiliar than chance explains" : mark.above.high < mark.expected ? "It is even more familiar" : "It is as familiar";
  const than = mark.above.low > mark.expected ? "" : mark.above.high < mark.expected ? " than the calibration set" : " as the calibration set";
  return `${verdict}${than}: ${withInterval(mark.above)} lie above the mark that ${percent(mark.expected, 0)} of the calibration set exceeded.`;
}

function histogram(found, width) {
  const { edges, counts } = found;
  const used = counts.map((each, index) => (each > 0 ? index : -1)).filter((index) => index >= 0);
  const shown = [...Object.values(found.quantiles), ...Object.values(found.calibration ?? {})].filter((value) => value > edges[0]);
  const low = Math.max(1e-5, Math.min(10 ** -3, ...shown.map((value) => 10 ** Math.floor(Math.log10(value))), edges[Math.max(0, used[0] - 1)]));
  const high = Math.max(1, ...shown.map((value) => 10 ** Math.ceil(Math.log10(value))));
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
  for (let power = Math.round(Math.log10(low)); power <= Math.round(Math.log10(high)); power += 1) {
    powers.push([10 ** power, String(Number((10 ** power).toPrecision(1)))]);
  }
  const bars = counts.map((each, index) => {
    if (each === 0) return null;
    const [from, to] = [at(index === 0 ? low : edges[index - 1]), at(index < edges.length ? edges[index] : high)];
    if (to - from < 2 && index > 0) return null;
    const over = limit !== undefined && index > 0 && edges[index - 1] >= limit;
    const told = index === 0 ? `Below ${nats(edges[0])}` : `${nats(edges[index - 1])} to ${nats(edges[index] ?? high)}`;
    return s(
      "g",
      { class: over ? "share off" : "share" },
      s("title", {}, `${told} nats: ${many(each, "prediction")}`),
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

