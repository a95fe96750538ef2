// The list of recent abstentions, or of the most uncertain predictions, each with a form to label it.

import { ask } from "./api.js";
import { h } from "./dom.js";
import { NONE, labelForm } from "./label.js";
import { nats, percent, time } from "./words.js";

let drawn = ""; // the JSON that the list shows

/**
 * Fill the list, unless it shows the same already or a form in it is open. `labelled` is called when a form was sent or
 * cancelled.
 */
export function showDoubtful({ list, title, about }, stored, labelled) {
  const json = JSON.stringify([stored.abstains, stored.doubtful]);
  if (list.querySelector("form, button:disabled") !== null || (json === drawn && list.hasChildNodes())) return;
  drawn = json;
  const held = list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : undefined;
  title.textContent = stored.abstains ? "Recent abstentions" : "Most uncertain recent predictions";
  about.textContent = stored.abstains
    ? "Inputs on which the adapter abstained. Labels are most informative here."
    : "None of the recent predictions could abstain (run scalabl calibrate to add an abstention rule). These have the largest entropy.";
  about.hidden = stored.doubtful.length === 0;
  if (stored.doubtful.length === 0) {
    list.replaceChildren(h("li", { class: "empty" }, stored.abstains ? "None of the recent predictions abstained." : "No predictions yet."));
    return;
  }
  list.replaceChildren(...stored.doubtful.map((prediction) => item(prediction, labelled)));
  if (held !== undefined) list.querySelector(`[data-id="${CSS.escape(held)}"] button`)?.focus();
}

function item(prediction, labelled) {
  const act = h("div", { class: "act" });
  const element = h(
    "li",
    { "data-id": prediction.id },
    h(
      "div",
      { class: "what" },
      prediction.input === null ? h("p", { class: "id quiet" }, prediction.id) : h("p", { class: "input", dir: "auto" }, `“${prediction.input}”`),
      h("p", {}, h("span", { class: "choice", dir: "auto" }, prediction.prediction), ` ${percent(prediction.confidence)}`),
      h("p", { class: "quiet" }, h("time", { datetime: prediction.created_at }, time(prediction.created_at)), set(prediction)),
    ),
    h(
      "dl",
      { class: "scores" },
      h("div", {}, h("dt", {}, "Entropy"), h("dd", {}, nats(prediction.entropy))),
      h("div", {}, h("dt", {}, "MI"), h("dd", {}, nats(prediction.mutual_information))),
    ),
    act,
  );
  showButton(act, prediction, labelOf(prediction), labelled);
  return element;
}

function set(prediction) {
  if (prediction.set_labels === null || prediction.set_size === 1) return "";
  const more = prediction.set_size - prediction.set_labels.length;
  return ` · prediction set: ${prediction.set_labels.join(", ")}${more > 0 ? ` and ${more} more` : ""}`;
}

/** The label of a stored prediction: a choice, null for none of them, undefined for no label. */
function labelOf(prediction) {
  return prediction.labelled ? prediction.label : undefined;
}

function showButton(act, prediction, label, labelled, focus = false) {
  const button = h(
    "button",
    { type: "button", "aria-label": `${label === undefined ? "Label" : "Correct the label of"} ${prediction.prediction}, ${time(prediction.created_at)}` },
    label === undefined ? "Label" : "Correct",
  );
  button.addEventListener("click", () => open(act, prediction, label, labelled, button));
  act.replaceChildren(
    label === undefined ? h("p", { class: "quiet" }, "no label") : h("p", { dir: "auto" }, h("span", { class: "quiet" }, "label: "), label ?? NONE),
    button,
  );
  if (focus) button.focus();
}

async function open(act, prediction, label, labelled, button) {
  button.disabled = true;
  try {
    const full = await ask(`predictions/${encodeURIComponent(prediction.id)}`);
    const close = (newLabel) => showButton(act, prediction, newLabel, labelled, true);
    act.replaceChildren(
      labelForm({
        id: prediction.id,
        choices: Object.keys(full.prediction.probabilities),
        current: labelOf(full),
        done: (newLabel) => {
          close(newLabel);
          labelled();
        },
        cancel: () => {
          close(label);
          labelled();
        },
      }),
    );
    act.querySelector("select").focus();
  } catch (problem) {
    button.disabled = false;
    act.append(h("p", { class: "bad", role: "alert" }, problem.message));
  }
}
