// Requests to this server, with the API key if one is needed. Addresses are relative, so that a proxy may add a path.

const KEY = "scalabl-api-key";
const SECONDS = 90;

let prompt = null;
let asking = null;

/** An error from the server. `status` 0 means that there was no answer. */
export class Problem extends Error {
  constructor(status, detail, kind = "") {
    super(detail);
    this.status = status;
    this.kind = kind;
  }
}

/** Set the function that asks the user for a key: `ask(wrong)` resolves to a key or null. Waiting requests share one call. */
export function onKeyNeeded(ask) {
  prompt = ask;
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** The JSON of a GET request, or of a POST request if there is a body. Throws a Problem. */
export async function ask(path, body) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, body, key);
    if (response.status === 401) {
      // If another request has got a key meanwhile, try again with that key.
      if (key === sessionStorage.getItem(KEY) && !(await newKey(key !== null))) {
        throw new Problem(401, "An API key is needed.", "unauthorized");
      }
      continue;
    }
    const json = await parsed(response);
    if (!response.ok) {
      const kind = String(json?.type ?? "").split(":").at(-1);
      throw new Problem(response.status, json?.detail ?? `The server answered with status ${response.status}.`, kind);
    }
    return json;
  }
}

async function send(path, body, key) {
  const headers = { accept: "application/json" };
  if (key !== null) headers.authorization = `Bearer ${key}`;
  const options = { headers, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(1000 * SECONDS) };
  if (body !== undefined) {
    headers["content-type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    const late = error.name === "TimeoutError";
    throw new Problem(0, late ? `No answer within ${SECONDS} s.` : "The server cannot be reached.", "unreachable");
  }
}

async function parsed(response) {
  try {
    return await response.json();
  } catch {
    if (response.ok) throw new Problem(0, "The server’s answer is incomplete.", "unreachable");
    return null;
  }
}

async function newKey(wrong) {
  asking ??= prompt(wrong).finally(() => {
    asking = null;
  });
  const key = await asking;
  if (key !== null) sessionStorage.setItem(KEY, key);
  return key !== null;
}
