// The page's control flow: loading, the chosen adapter, asking, refreshing the figures, and error messages. Drawing is in
// the other files.

import { showAnswer, showFailure, showNoAnswer, showWaiting, spoken } from "./answer.js";
import { Problem, ask, forgetKey, hasKey, onKeyNeeded } from "./api.js";
import { byId, h, keepingFocus } from "./dom.js";
import { showDoubtful } from "./doubtful.js";
import { showInformation } from "./information.js";
import { showNumbers } from "./numbers.js";
import { showReliability } from "./reliability.js";
import { showRisk } from "./risk.js";
import { percent } from "./words.js";

const AGAIN_MS = 15_000; // between refreshes while the page is visible
const STARTING_MS = 2_000;
const MOST_PROBABILITIES = 50; // asked for; the page shows fewer, and the sum of the rest

const NOTHING_STORED =
  "This server stores no predictions (it runs with --outcomes-url none), so there are no figures and labels cannot be sent. " +
  "You can still ask questions.";

let info = null;
let refreshes = 0;
let questions = 0;
let shown = ""; // the JSON that the figures show
let watching = false; // whether to refresh the figures from time to time

function adapter() {
  return info.adapters.find(({ name }) => name === byId("adapter").value) ?? null;
}

// Start: wait for the server and, if needed, for a key.

function notice(text, again = null) {
  const place = byId("notice");
  place.hidden = text === null;
  place.replaceChildren();
  if (text === null) return;
  place.append(h("p", {}, text));
  if (again !== null) place.append(h("button", { type: "button", click: again }, "Try again"));
}

async function start() {
  notice("Loading…");
  try {
    info = await ask("info");
  } catch (problem) {
    if (problem.kind === "starting") {
      notice("The server is loading its model. This page continues when it is ready.");
      setTimeout(start, STARTING_MS);
    } else if (problem.status === 401) {
      notice("This server needs an API key.", start);
    } else {
      notice(problem.message, start);
    }
    return;
  }
  notice(null);
  byId("forget").hidden = !hasKey();
  byId("about").textContent = `${info.model.name}, ${info.model.dtype} on ${info.model.device} · version ${info.version}`;
  showAdapters();
  await refresh();
}

function showAdapters() {
  const select = byId("adapter");
  const wanted = new URLSearchParams(location.search).get("adapter") ?? info.adapter?.name;
  select.replaceChildren(...info.adapters.map(({ name }) => h("option", { value: name, selected: name === wanted }, name)));
  byId("adapter-field").hidden = info.adapters.length === 0;
  if (info.adapters.length === 0) notice("No adapter is loaded, so there is nothing to ask.", start);
  showTask();
}

/** Show the form's fields that the chosen adapter needs. */
function showTask() {
  const chosen = adapter();
  byId("ask").disabled = chosen === null;
  if (chosen === null) return;
  const several = chosen.task === "multiple_choice";
  byId("choices-field").hidden = !several;
  byId("choices").required = several;
  byId("samples").value = info.defaults.num_samples;
  byId("samples").max = info.limits.max_samples;
  const levels = Object.keys(chosen.calibration?.thresholds[chosen.calibration.method] ?? {});
  byId("coverage-field").hidden = levels.length === 0;
  byId("coverage").replaceChildren(
    h("option", { value: "" }, "The default"),
    ...levels.map((level) => h("option", { value: level }, percent(Number(level), 0))),
  );
}

// The figures of stored predictions.

async function refresh() {
  const chosen = adapter();
  if (chosen === null) return;
  refreshes += 1;
  const own = refreshes;
  const state = byId("state");
  if (byId("stored").hidden && !state.hasChildNodes()) state.replaceChildren(h("p", { class: "empty panel waiting" }, "Loading…"));
  try {
    const { stored } = await ask(`v1/dashboard?adapter=${encodeURIComponent(chosen.name)}`);
    if (own !== refreshes) return; // a newer refresh has begun
    byId("updated").textContent = `Updated ${new Date().toLocaleTimeString()}`;
    watching = stored !== null;
    show(stored);
  } catch (problem) {
    if (own !== refreshes) return;
    watching = problem.status !== 401; // do not ask for a key again unless the user does something
    if (state.querySelector(".bad")?.textContent === problem.message) return;
    byId("updated").textContent = "";
    show(null);
    const again = problem.kind === "unknown-adapter" ? start : refresh;
    state.replaceChildren(
      h("div", { class: "empty panel" }, h("p", { class: "bad", role: "alert" }, problem.message), h("button", { type: "button", click: again }, "Try again")),
    );
  }
}

function show(stored) {
  const json = JSON.stringify(stored);
  const same = json === shown && !byId("stored").hidden;
  shown = json;
  byId("stored").hidden = stored === null;
  byId("doubts").hidden = stored === null;
  byId("state").replaceChildren();
  if (stored === null) {
    byId("state").append(
      h("p", { class: "empty panel" }, NOTHING_STORED),
    );
    return;
  }
  showDoubtful({ list: byId("doubtful"), title: byId("doubts-title"), about: byId("doubts-about") }, stored, refresh);
  if (same) return;
  showNumbers(byId("numbers"), stored);
  const figures = {
    reliability: [showReliability, stored],
    information: [showInformation, stored.mutual_information],
    risk: [showRisk, stored.risk_coverage],
  };
  for (const [name, [render, data]] of Object.entries(figures)) keepingFocus(byId(name), () => render(byId(name), data));
}

// Asking a question.

function question(chosen) {
  const method = byId("method").value;
  const body = { inputs: byId("text").value, adapter: chosen.name, method };
  let choices = chosen.choices.length;
  if (chosen.task === "multiple_choice") {
    body.choices = byId("choices").value.split("\n").map((choice) => choice.trim()).filter((choice) => choice !== "");
    choices = body.choices.length;
  }
  if (choices > MOST_PROBABILITIES) {
    body.top_k = MOST_PROBABILITIES;
    choices = MOST_PROBABILITIES;
  }
  if (byId("coverage").value !== "") body.coverage = Number(byId("coverage").value);
  if (method !== "linearized") {
    body.num_samples = Number(byId("samples").value) || info.defaults.num_samples;
    body.return_samples = body.num_samples * choices <= info.limits.max_sample_values;
  }
  return body;
}

async function put(event) {
  event.preventDefault();
  const chosen = adapter();
  if (chosen === null || byId("ask").disabled) return;
  questions += 1;
  const own = questions;
  const place = byId("answer");
  byId("ask").disabled = true;
  byId("announce").textContent = "";
  showWaiting(place);
  try {
    const started = performance.now();
    const body = question(chosen);
    const response = await ask("predict", body);
    if (own !== questions) return;
    const choices = body.choices ?? chosen.choices;
    showAnswer(place, response, { ...chosen, choices }, performance.now() - started, refresh);
    byId("announce").textContent = spoken(response, choices.length);
    refresh();
  } catch (problem) {
    if (own === questions) showFailure(place, problem);
    if (!(problem instanceof Problem)) throw problem;
  } finally {
    byId("ask").disabled = false;
  }
}

// The API key.

function askForKey(wrong) {
  const dialog = byId("key");
  const input = byId("key-text");
  byId("key-error").textContent = wrong ? "The server rejected this API key. Try another one." : "";
  if (wrong) forgetKey();
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const key = dialog.returnValue === "key" ? input.value.trim() : "";
        input.value = "";
        byId("forget").hidden = key === "" && !hasKey();
        resolve(key === "" ? null : key);
      },
      { once: true },
    );
  });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (/^[\x20-\x7e]+$/.test(byId("key-text").value.trim())) byId("key").close("key");
  else byId("key-error").textContent = "A key consists of printable ASCII characters.";
});
byId("key-cancel").addEventListener("click", () => byId("key").close());
byId("forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

byId("adapter").addEventListener("change", () => {
  history.replaceState(null, "", `?adapter=${encodeURIComponent(byId("adapter").value)}`);
  questions += 1; // ignore an answer of the previous adapter that is still under way
  showNoAnswer(byId("answer"));
  byId("doubtful").replaceChildren();
  byId("stored").hidden = true;
  byId("doubts").hidden = true;
  byId("state").replaceChildren();
  showTask();
  refresh();
});
byId("method").addEventListener("change", () => {
  byId("samples").disabled = byId("method").value === "linearized";
});
byId("query").addEventListener("submit", put);
byId("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("query").requestSubmit();
});
byId("refresh").addEventListener("click", refresh);
setInterval(() => {
  if (watching && !document.hidden && !byId("key").open) refresh();
}, AGAIN_MS);

onKeyNeeded(askForKey);
showNoAnswer(byId("answer"));
start();
