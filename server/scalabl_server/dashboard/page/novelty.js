// The figure of novelty: p-values of recent inputs, which are uniform if the traffic is like the calibration set.

import { h, s, table } from "./dom.js";
import { draw, image, line, scale, text, xAxis } from "./plot.js";
import { count, many, percent, times, withInterval } from "./words.js";

const NONE =
  "This adapter has no novelty reference, or the server’s engine gives no hidden states. Make one with scalabl calibrate --reference.";
const PROVEN = 2; // decimal logarithm of the martingale from which a change counts as shown

/** Fill the figure. `data` is `novelty` of /v1/dashboard. */
export function showNovelty(figure, data) {
  const open = figure.querySelector("details")?.open;
  figure.replaceChildren(
    h("figcaption", {}, h("h3", {}, "Is the traffic like what it knows?"), h("p", { class: "finding" }, finding(data))),
  );
  if (data === null) {
    figure.append(h("p", { class: "empty" }, NONE));
    return;
  }
  if (data.count === 0) {
    figure.append(h("p", { class: "empty" }, "No predictions with a novelty p-value yet. Ask a question."));
    return;
  }
  const drawing = h("div", { class: "drawing" });
  const left = data.left_out > 0 ? ` ${many(data.left_out, "other")} left out: they have no p-value.` : "";
  figure.append(
    drawing,
    h("p", { class: "quiet" }, `${many(data.count, "prediction")}, ${times(data.oldest, data.newest)}.${left} ${change(data)}`),
    table(
      "Predictions by novelty p-value",
      ["p-value up to", "Predictions", "If inputs are alike"],
      data.counts.map((number, index) => [edge(data, index + 1), count(number), (data.count / data.counts.length).toFixed(1)]),
      open,
    ),
  );
  draw(drawing, (width) => histogram(data, width));
}

function finding(data) {
  if (data === null) return "Nothing is known about the novelty of inputs.";
  if (data.count === 0) return "A small p-value means that few inputs of the calibration set are as strange.";
  let verdict = "Recent inputs are like the calibration set";
  if (data.novel.low > data.level) verdict = "More recent inputs are novel than chance explains";
  if (data.novel.high < data.level) verdict = "Fewer recent inputs are novel than in the calibration set";
  return `${verdict}: ${withInterval(data.novel)} have a p-value of at most ${percent(data.level, 0)}, where ${percent(data.level, 0)} are expected.`;
}

/** What the martingale says since the server started. */
function change(data) {
  if (data.highest_log10 >= PROVEN) {
    return "Since this server started, its inputs have changed: without a change so much evidence has a probability below 1%.";
  }
  return "Since this server started, nothing shows that its inputs have changed.";
}

function edge(data, index) {
  return (index / data.counts.length).toFixed(2);
}

function histogram(data, width) {
  const { counts } = data;
  const [left, right, top] = [8, width - 8, 8];
  const bottom = top + Math.min(190, width * 0.5);
  const expected = data.count / counts.length;
  const x = scale([0, 1], [left, right]);
  const y = scale([0, Math.max(...counts, 1.5 * expected)], [0, bottom - top - 18]);
  const bars = counts.map((number, index) => {
    if (number === 0) return null;
    const [from, to] = [x(index / counts.length), x((index + 1) / counts.length)];
    const novel = (index + 1) / counts.length <= data.level + 1e-9;
    return s(
      "g",
      { class: novel ? "share off" : "share" },
      s("title", {}, `${edge(data, index)} to ${edge(data, index + 1)}: ${many(number, "prediction")}`),
      s("rect", { x: from + 0.75, y: bottom - y(number), width: Math.max(1.5, to - from - 1.5), height: y(number), rx: 1.5 }),
    );
  });
  return image(
    width,
    bottom + 42,
    `Histogram of novelty p-values. ${finding(data)}`,
    bars,
    line(left, bottom - y(expected), right, bottom - y(expected), "limit"),
    text(right, bottom - y(expected) - 6, "if inputs are alike", { "text-anchor": "end", class: "small" }),
    xAxis(x, bottom, [0, 0.25, 0.5, 0.75, 1].map((value) => [value, String(value)]), "novelty p-value (small: strange)", [left, right]),
  );
}
