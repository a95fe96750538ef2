// The predictions to look at: recent abstentions, or the most doubtful ones, each with a form to label it.

import { ask } from "./api.js";
import { h } from "./dom.js";
import { labelForm } from "./label.js";
import { nats, percent, time } from "./words.js";

let drawn = ""; // the JSON that the list was made from

/** Fill the list, unless it is so already or someone is at work in it. `labelled` is called when a label has been stored or given up. */
export function showDoubtful({ list, title, about }, stored, labelled) {
  const json = JSON.stringify([stored.abstains, stored.doubtful]);
  if (list.querySelector("form, button:disabled") !== null || (json === drawn && list.hasChildNodes())) return;
  drawn = json;
  const held = list.contains(document.activeElement) ? document.activeElement.closest("li")?.dataset.id : undefined;
  title.textContent = stored.abstains ? "Recent abstentions" : "Most doubtful of late";
  about.textContent = stored.abstains
    ? "What the adapter would not answer. A label here teaches you most about it."
    : "None of its recent predictions could abstain (scalabl calibrate finds a rule), so these are those of the largest entropy.";
  about.hidden = stored.doubtful.length === 0;
  if (stored.doubtful.length === 0) {
    list.replaceChildren(h("li", { class: "empty" }, stored.abstains ? "None among its recent predictions." : "No predictions yet."));
    return;
  }
  list.replaceChildren(...stored.doubtful.map((each) => item(each, labelled)));
  if (held !== undefined) list.querySelector(`[data-id="${CSS.escape(held)}"] button`)?.focus();
}

function item(each, labelled) {
  const act = h("div", { class: "act" });
  const element = h(
    "li",
    { "data-id": each.id },
    h(
      "div",
      { class: "what" },
      each.input === null ? h("p", { class: "id quiet" }, each.id) : h("p", { class: "input", dir: "auto" }, `“${each.input}”`),
      h("p", {}, h("span", { class: "choice", dir: "auto" }, each.prediction), ` ${percent(each.confidence)}`),
      h("p", { class: "quiet" }, h("time", { datetime: each.created_at }, time(each.created_at)), set(each)),
    ),
    h(
      "dl",
      { class: "scores" },
      h("div", {}, h("dt", {}, "Entropy"), h("dd", {}, nats(each.entropy))),
      h("div", {}, h("dt", {}, "MI"), h("dd", {}, nats(each.mutual_information))),
    ),
    act,
  );
  showButton(act, each, each.label, labelled);
  return element;
}

function set(each) {
  if (each.set_labels === null || each.set_size === 1) return "";
  const more = each.set_size - each.set_labels.length;
  return ` · among ${each.set_labels.join(", ")}${more > 0 ? ` and ${more} more` : ""}`;
}

function showButton(act, each, label, labelled, focus = false) {
  const button = h(
    "button",
    { type: "button", "aria-label": `${label === null ? "Label" : "Correct the label of"} ${each.prediction}, ${time(each.created_at)}` },
    label === null ? "Label" : "Correct",
  );
  button.addEventListener("click", () => open(act, each, label, labelled, button));
  act.replaceChildren(
    label === null ? h("p", { class: "quiet" }, "no label") : h("p", { dir: "auto" }, h("span", { class: "quiet" }, "was "), label),
    button,
  );
  if (focus) button.focus();
}

async function open(act, each, label, labelled, button) {
  button.disabled = true;
  try {
    const found = await ask(`predictions/${encodeURIComponent(each.id)}`);
    const close = (now) => showButton(act, each, now, labelled, true);
    act.replaceChildren(
      labelForm({
        id: each.id,
        choices: Object.keys(found.prediction.probabilities),
        current: found.label,
        done: (now) => {
          close(now);
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
