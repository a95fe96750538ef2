// The page: what is loaded, which adapter is looked at, when figures are drawn anew, and what is said when they cannot be.

import { showAnswer, showFailure, showNoAnswer, showWaiting, spoken } from "./answer.js";
import { Problem, ask, forgetKey, hasKey, onKeyNeeded } from "./api.js";
import { byId, h, keepingFocus } from "./dom.js";
import { showDoubtful } from "./doubtful.js";
import { showInformation } from "./information.js";
import { showNumbers } from "./numbers.js";
import { showReliability } from "./reliability.js";
import { showRisk } from "./risk.js";
import { percent } from "./words.js";

const AGAIN_MS = 15_000; // between looks while the page is seen
const STARTING_MS = 2_000;

const NOTHING_STORED =
  "This server stores no predictions (it runs with --outcomes-url none), so there is nothing to draw and no label to send. " +
  "Questions are answered all the same.";

let info = null;
let looks = 0;
let questions = 0;
let shown = ""; // the JSON that the figures were drawn from
let watching = false; // whether looking again by itself makes sense

function adapter() {
  return info.adapters.find((each) => each.name === byId("adapter").value) ?? null;
}

// What the whole page waits for: a key, a server that has started.

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
      notice("The server is loading its model; this page goes on when it is ready.");
      setTimeout(start, STARTING_MS);
    } else if (problem.status === 401) {
      notice("This server wants an API key before it shows anything.", start);
    } else {
      notice(problem.message, start);
    }
    return;
  }
  notice(null);
  byId("forget").hidden = !hasKey();
  byId("about").textContent = `${info.model.name}, ${info.model.dtype} on ${info.model.device} · version ${info.version}`;
  showAdapters();
  await look();
}

function showAdapters() {
  const select = byId("adapter");
  const wanted = new URLSearchParams(location.search).get("adapter") ?? info.adapter?.name;
  select.replaceChildren(...info.adapters.map(({ name }) => h("option", { value: name, selected: name === wanted }, name)));
  byId("adapter-field").hidden = info.adapters.length === 0;
  if (info.adapters.length === 0) notice("No adapter is loaded, so there is nothing to ask.", start);
  showTask();
}

/** The form's fields, as the chosen adapter needs them. */
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

// What is stored.

async function look() {
  const chosen = adapter();
  if (chosen === null) return;
  looks += 1;
  const mine = looks;
  const state = byId("state");
  if (byId("stored").hidden && !state.hasChildNodes()) state.replaceChildren(h("p", { class: "empty panel waiting" }, "Loading…"));
  try {
    const found = await ask(`v1/dashboard?adapter=${encodeURIComponent(chosen.name)}`);
    if (mine !== looks) return; // another look began meanwhile
    byId("updated").textContent = `Updated ${new Date().toLocaleTimeString()}`;
    watching = found.stored !== null;
    show(found.stored);
  } catch (problem) {
    if (mine !== looks) return;
    watching = problem.status !== 401; // a prompt is for someone who is there
    if (state.querySelector(".bad")?.textContent === problem.message) return;
    byId("updated").textContent = "";
    show(null);
    const again = problem.kind === "unknown-adapter" ? start : look;
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
  showDoubtful({ list: byId("doubtful"), title: byId("doubts-title"), about: byId("doubts-about") }, stored, look);
  if (same) return;
  showNumbers(byId("numbers"), stored);
  const figures = {
    reliability: [showReliability, stored],
    information: [showInformation, stored.mutual_information],
    risk: [showRisk, stored.risk_coverage],
  };
  for (const [name, [render, found]] of Object.entries(figures)) keepingFocus(byId(name), () => render(byId(name), found));
}

// A question.

function question(chosen) {
  const method = byId("method").value;
  const body = { inputs: byId("text").value, adapter: chosen.name, method };
  let choices = chosen.choices.length;
  if (chosen.task === "multiple_choice") {
    body.choices = byId("choices").value.split("\n").map((each) => each.trim()).filter((each) => each !== "");
    choices = body.choices.length;
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
  const mine = questions;
  const place = byId("answer");
  byId("ask").disabled = true;
  byId("announce").textContent = "";
  showWaiting(place);
  try {
    const started = performance.now();
    const response = await ask("predict", question(chosen));
    if (mine !== questions) return;
    showAnswer(place, response, chosen, performance.now() - started, look);
    byId("announce").textContent = spoken(response);
    look();
  } catch (problem) {
    if (mine === questions) showFailure(place, problem);
    if (!(problem instanceof Problem)) throw problem;
  } finally {
    byId("ask").disabled = false;
  }
}

// The key.

function askForKey(wrong) {
  const dialog = byId("key");
  const input = byId("key-text");
  byId("key-error").textContent = wrong ? "The server does not know the key that was sent." : "";
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
  else byId("key-error").textContent = "A key is one or more printable ASCII characters.";
});
byId("key-cancel").addEventListener("click", () => byId("key").close());
byId("forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});

byId("adapter").addEventListener("change", () => {
  history.replaceState(null, "", `?adapter=${encodeURIComponent(byId("adapter").value)}`);
  questions += 1; // an answer that is on its way is not this adapter's
  showNoAnswer(byId("answer"));
  byId("doubtful").replaceChildren();
  byId("stored").hidden = true;
  byId("doubts").hidden = true;
  byId("state").replaceChildren();
  showTask();
  look();
});
byId("method").addEventListener("change", () => {
  byId("samples").disabled = byId("method").value === "linearized";
});
byId("query").addEventListener("submit", put);
byId("query").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("query").requestSubmit();
});
byId("refresh").addEventListener("click", look);
setInterval(() => {
  if (watching && !document.hidden && !byId("key").open) look();
}, AGAIN_MS);

onKeyNeeded(askForKey);
showNoAnswer(byId("answer"));
start();
