// The row of numbers above the figures.

import { h } from "./dom.js";
import { count, percent } from "./words.js";

/** Fill the list. `stored` is that of /v1/dashboard. */
export function showNumbers(list, stored) {
  const { totals } = stored;
  const { reliability } = totals;
  const entries = [
    ["Predictions", count(totals.predictions), `${count(reliability.accuracy.total)} with a label`],
    ["Accuracy", percent(reliability.accuracy.share), interval(reliability.accuracy)],
    ["Calibration error", reliability.ece === null ? "–" : percent(reliability.ece), "ECE in 15 bins, all time"],
    ...outside(reliability),
    ["Abstained", stored.abstains || totals.abstained.count > 0 ? percent(totals.abstained.share) : "–", abstained(stored)],
    ...reliability.sets.map((set) => [
      `Coverage of ${percent(set.coverage, 0)} sets`,
      percent(set.covered.share),
      `${interval(set.covered)}; ${(totals.set_sizes[String(set.coverage)] ?? 0).toFixed(1)} choices on average`,
    ]),
  ];
  list.replaceChildren(
    ...entries.map(([name, value, about]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, h("strong", {}, value), h("span", { class: "quiet" }, about))),
    ),
  );
}

/** An entry for labels that are none of the choices, if there are any. */
function outside({ accuracy, outside: { abstained, answered } }) {
  const labels = abstained.count + answered.count;
  if (labels === 0) return [];
  return [["None of the choices", percent(labels / accuracy.total), `of the labels: ${part(abstained, "abstained")}, ${part(answered, "answered")}`]];
}

function part(share, name) {
  return `${count(share.count)} of ${count(share.total)} ${name}`;
}

function interval(share) {
  return share.share === null ? "no labels yet" : `${(100 * share.low).toFixed(1)} to ${(100 * share.high).toFixed(1)}%`;
}

function abstained({ abstains, totals }) {
  return abstains || totals.abstained.count > 0 ? `${count(totals.abstained.count)} of ${count(totals.abstained.total)}` : "none could abstain";
}
