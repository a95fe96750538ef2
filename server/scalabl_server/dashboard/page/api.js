// Requests to this server, with the API key where one is wanted. Addresses are relative, so that a proxy may add a path.

const KEY = "scalabl-api-key";
const SECONDS = 90;

let prompt = null;
let asking = null;

/** An answer that is an error; `status` 0: there was no answer. */
export class Problem extends Error {
  constructor(status, detail, kind = "") {
    super(detail);
    this.status = status;
    this.kind = kind;
  }
}

/** `ask(wrong)` is called when a key is needed, once for all requests that wait; it resolves to a key, or to null. */
export function onKeyNeeded(ask) {
  prompt = ask;
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** The JSON of a GET, or of a POST when there is a body. Throws a Problem. */
export async function ask(path, body) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await send(path, body, key);
    if (response.status === 401) {
      // Another request may have got a key meanwhile.
      if (key === sessionStorage.getItem(KEY) && !(await newKey(key !== null))) {
        throw new Problem(401, "An API key is needed.", "unauthorized");
      }
      continue;
    }
    const found = await parsed(response);
    if (!response.ok) {
      const kind = String(found?.type ?? "").split(":").at(-1);
      throw new Problem(response.status, found?.detail ?? `The server answered with status ${response.status}.`, kind);
    }
    return found;
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
    if (response.ok) throw new Problem(0, "The server’s answer broke off.", "unreachable");
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
