// A form that sends the true label of a prediction to /feedback.

import { ask } from "./api.js";
import { h } from "./dom.js";

const STATUS_TEXTS = {
  recorded: "The label was stored.",
  unchanged: "The prediction already has this label.",
  corrected: "Corrected. The previous label stays in the history.",
};

/** The label null, in words: none of the choices is the true answer. */
export const NONE = "None of these";
const NONE_VALUE = "none";

let forms = 0;

/**
 * The form. `current` is the label so far: a choice, null for none of them, undefined for no label. `done(label, status)` is
 * called with the server's answer; with `cancel` the form has a button for it.
 */
export function labelForm({ id, choices, current, done, cancel = null }) {
  forms += 1;
  const name = `label-${forms}`;
  const select = h(
    "select",
    { id: name, required: true },
    h("option", { value: "", disabled: true, selected: current === undefined }, "Choose…"),
    choices.map((choice, index) => h("option", { value: index, selected: choice === current }, choice)),
    h("option", { value: NONE_VALUE, selected: current === null }, NONE),
  );
  const button = h("button", { type: "submit" }, current === undefined ? "Send" : "Correct");
  const message = h("p", { class: "told quiet", role: "status" });
  const form = h(
    "form",
    { class: "label", submit: (event) => send(event) },
    h("label", { for: name }, "True answer"),
    h("div", { class: "row" }, select, button, cancel === null ? null : h("button", { type: "button", class: "plain", click: cancel }, "Cancel")),
    message,
  );

  async function send(event) {
    event.preventDefault();
    if (select.value === "") return;
    const label = select.value === NONE_VALUE ? null : choices[Number(select.value)];
    button.disabled = true;
    message.className = "told quiet";
    message.textContent = "Sending…";
    try {
      const { results } = await ask("feedback", { id, label });
      message.textContent = STATUS_TEXTS[results[0].status];
      button.textContent = "Correct";
      done(label, results[0].status);
    } catch (problem) {
      message.className = "told bad";
      message.textContent = problem.message;
    } finally {
      button.disabled = false;
    }
  }

  return form;
}
