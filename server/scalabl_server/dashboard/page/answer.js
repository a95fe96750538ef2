// Shows one answer: the prediction, its probabilities and uncertainty, and a form to send the true label.

import { h, s } from "./dom.js";
import { labelForm } from "./label.js";
import { aboutDoubt, nats, percent, rankOf } from "./words.js";

const MOST_CHOICES = 8;
const MOST_DOTS = 128;

/** The text before the first question. */
export function showNoAnswer(element) {
  element.replaceChildren(
    h("p", { class: "empty" }, "An answer is the average of posterior samples. If the samples disagree, the model is uncertain, and you see it here."),
  );
}

export function showWaiting(element) {
  element.replaceChildren(h("p", { class: "empty waiting" }, "Asking…"));
}

export function showFailure(element, problem) {
  element.replaceChildren(h("p", { class: "bad", role: "alert" }, problem.message));
}

/**
 * Show `response` of /predict for one input. `adapter` is from /info, with the choices of this input; `labelled` is called
 * when a label was stored.
 */
export function showAnswer(element, response, adapter, milliseconds, labelled) {
  const [answer] = response.predictions;
  element.replaceChildren(
    verdict(answer),
    distribution(answer, adapter.choices.length),
    h("p", { class: "caption quiet" }, caption(answer)),
    inTheSet(answer),
    doubt(answer, adapter),
    ...(response.warnings ?? []).map((warning) => h("p", { class: "warning" }, warning)),
    feedback(answer, adapter.choices, labelled),
    h(
      "p",
      { class: "quiet small" },
      `${answer.num_samples > 0 ? `${answer.num_samples} samples` : "linearised"}, ${response.usage.tokens} tokens, ${Math.round(milliseconds)} ms`,
      answer.id === null ? "" : h("span", { class: "id" }, ` · ${answer.id}`),
    ),
  );
}

/** The answer in a sentence, for screen readers. */
export function spoken(response, count) {
  const [answer] = response.predictions;
  const held = answer.abstain ? "The adapter abstains. If it had to answer: " : "";
  return `${held}${answer.prediction}, ${percent(answer.confidence)}. ${aboutDoubt(answer, count)}`;
}

function verdict(answer) {
  const held = answer.abstain === true;
  return h(
    "div",
    { class: held ? "verdict held" : "verdict" },
    held ? h("p", { class: "badge" }, "Abstains: too uncertain to act on") : null,
    h("p", { class: "choice", dir: "auto" }, answer.prediction),
    h("p", { class: "sure" }, percent(answer.confidence), h("span", { class: "quiet" }, held ? " if it had to answer" : " sure")),
  );
}

function distribution(answer, count) {
  const members = new Set(answer.prediction_set?.labels ?? []);
  const ranked = Object.entries(answer.probabilities).sort(([, a], [, b]) => b - a);
  const shown = ranked.slice(0, ranked.length > MOST_CHOICES ? MOST_CHOICES - 1 : MOST_CHOICES);
  const others = ranked.slice(shown.length);
  const list = h(
    "ol",
    { class: "distribution" },
    shown.map(([name, probability]) => row(name, probability, answer, members.has(name))),
  );
  if (others.length > 0) {
    const sum = others.reduce((total, [, probability]) => total + probability, answer.other ?? 0);
    list.append(
      h("li", { class: "others" }, h("span", { class: "name quiet" }, `${count - shown.length} others`), bar(sum), h("span", { class: "value" }, percent(sum))),
    );
  }
  return list;
}

function row(name, probability, answer, member) {
  const error = answer.standard_error.probabilities[name];
  const dots = (answer.samples ?? []).slice(0, MOST_DOTS).map((sample) => sample[name]);
  return h(
    "li",
    { class: member ? "member" : null },
    h("span", { class: "name", dir: "auto", title: name }, name),
    bar(probability, error, dots),
    h(
      "span",
      { class: "value" },
      percent(probability),
      error === null ? null : h("span", { class: "error", title: "Monte Carlo standard error" }, ` ± ${(100 * error).toFixed(1)}`),
    ),
  );
}

/** A bar for the mean, and above it a dot for each posterior sample. */
function bar(probability, error = null, dots = []) {
  const at = (value) => `${(100 * Math.min(1, Math.max(0, value))).toFixed(2)}%`;
  return s(
    "svg",
    { class: "bar", height: 24, "aria-hidden": "true", focusable: "false" },
    s("rect", { x: 0, y: 15, width: "100%", height: 6, rx: 3, class: "track" }),
    s("rect", { x: 0, y: 15, width: at(probability), height: 6, rx: 3, class: "mean" }),
    error === null
      ? null
      : s("line", { x1: at(probability - 2 * error), x2: at(probability + 2 * error), y1: 18, y2: 18, class: "whisker" }),
    dots.map((value, index) => s("circle", { cx: at(value), cy: 6.5 + 3.5 * Math.sin(2.4 * index), r: 2.4, class: "dot" })),
  );
}

function caption(answer) {
  const mean = answer.method === "control_variate" ? "their mean, corrected by the linearisation" : "their mean";
  const dots = answer.samples ? `Each dot is a posterior sample; the bar is ${mean}` : "Bars are probabilities";
  const error = answer.standard_error.probabilities[answer.prediction] === null ? "" : "; ± is the Monte Carlo standard error of the mean";
  return `${dots}${error}.`;
}

function inTheSet(answer) {
  const set = answer.prediction_set;
  if (set === null) {
    return h("p", { class: "quiet" }, "No prediction set and no abstention: the adapter has no calibration for these settings.");
  }
  const names = set.labels.slice(0, MOST_CHOICES);
  const more = set.labels.length - names.length;
  return h(
    "p",
    { class: "set" },
    `In ${percent(set.coverage, 0)} of such cases the true answer is one of: `,
    names.map((name) => [h("span", { class: "chip", dir: "auto" }, name), " "]),
    more > 0 ? `and ${more} more` : "",
  );
}

function doubt(answer, adapter) {
  const most = Math.log(adapter.choices.length);
  const part = (value) => `${((100 * value) / most).toFixed(2)}%`;
  const rank = rankOf(answer.mutual_information, answer.prediction_set === null ? null : adapter.calibration?.quantiles.mutual_information);
  return h(
    "div",
    { class: "doubt" },
    h("h3", {}, "Uncertainty"),
    h("p", {}, aboutDoubt(answer, adapter.choices.length), rank === null ? "" : ` ${rank}`),
    s(
      "svg",
      {
        class: "split", height: 14, role: "img",
        "aria-label": `Uncertainty in nats, of at most ${nats(most)}: ${nats(answer.expected_entropy)} from the input, ${nats(answer.mutual_information)} from the model`,
      },
      s("rect", { x: 0, y: 0, width: "100%", height: 14, rx: 3, class: "track" }),
      s("rect", { x: 0, y: 0, width: part(answer.entropy), height: 14, rx: 3, class: "own" }),
      s("rect", { x: 0, y: 0, width: part(answer.expected_entropy), height: 14, rx: 3, class: "question" }),
    ),
    h(
      "dl",
      { class: "parts" },
      entry("From the input", answer.expected_entropy, "question", "aleatoric: expected entropy, each sample is uncertain"),
      entry("From the model", answer.mutual_information, "own", "epistemic: mutual information, the samples disagree"),
      entry("Total", answer.entropy, "track", `entropy, at most ${nats(most)} nats`),
    ),
  );
}

function entry(name, value, kind, about) {
  return h(
    "div",
    {},
    h("dt", {}, h("span", { class: `swatch ${kind}` }), name),
    h("dd", {}, h("strong", {}, nats(value)), " nats", h("span", { class: "quiet about" }, about)),
  );
}

function feedback(answer, choices, labelled) {
  if (answer.id === null) {
    return h("p", { class: "quiet" }, "This answer was not stored, so it cannot be labelled.");
  }
  return labelForm({ id: answer.id, choices, done: labelled });
}
