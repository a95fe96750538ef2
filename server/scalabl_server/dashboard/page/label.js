// Saying what was true: a form that sends one label to /feedback.

import { ask } from "./api.js";
import { h } from "./dom.js";

const SAID = {
  recorded: "Recorded, on disk.",
  unchanged: "That was the label already.",
  corrected: "Corrected; the label before is kept in its history.",
};

let made = 0;

/**
 * The form. `done(label, status)` is told what the server said; `cancel`, where given, gets a button.
 */
export function labelForm({ id, choices, current = null, done, cancel = null }) {
  made += 1;
  const name = `label-${made}`;
  const select = h(
    "select",
    { id: name, required: true },
    h("option", { value: "", disabled: true, selected: current === null }, "Choose…"),
    choices.map((choice, index) => h("option", { value: index, selected: choice === current }, choice)),
  );
  const button = h("button", { type: "submit" }, current === null ? "Send" : "Correct");
  const told = h("p", { class: "told quiet", role: "status" });
  const form = h(
    "form",
    { class: "label", submit: (event) => send(event) },
    h("label", { for: name }, "What was true?"),
    h("div", { class: "row" }, select, button, cancel === null ? null : h("button", { type: "button", class: "plain", click: cancel }, "Cancel")),
    told,
  );

  async function send(event) {
    event.preventDefault();
    if (select.value === "") return;
    const label = choices[Number(select.value)];
    button.disabled = true;
    told.className = "told quiet";
    told.textContent = "Sending…";
    try {
      const { results } = await ask("feedback", { id, label });
      told.textContent = SAID[results[0].status];
      button.textContent = "Correct";
      done(label, results[0].status);
    } catch (problem) {
      told.className = "told bad";
      told.textContent = problem.message;
    } finally {
      button.disabled = false;
    }
  }

  return form;
}
