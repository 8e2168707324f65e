// What the page asks of the server, and what it says when something is wrong.

import { page } from "./page.js";

/** What went wrong, as a sentence for people. */
export class Fault extends Error {}

export class NoAnswer extends Fault {}

/** The server wants a key, and was given none or a wrong one. */
class Locked extends Fault {}

/** The answer to GET, or to POST if there is a body. Without a key that the server takes, asks for one. */
export async function ask(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    try {
      return await request(path, { body, signal });
    } catch (fault) {
      if (!(fault instanceof Locked)) throw fault;
      const changed = sessionStorage.getItem("key") !== key;
      if (!changed && !(await enterKey(key))) throw fault;
    }
  }
}

/** As `ask`, but never asks for a key. */
export async function request(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new NoAnswer("The server does not answer.");
  }
  if (response.status === 401) throw new Locked("The server wants a key.");
  if (!response.ok) throw new Fault(await complaint(response));
  return response;
}

/** The values of a stream of server-sent events. Faults that it tells, and a stream that breaks off, are thrown. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await read(reader);
    if (done) throw new Fault("The connection broke off.");
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data:")) continue;
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Fault(sentence(event.error.message));
      yield event;
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { done: true };
  }
}

async function complaint(response) {
  const after = Number(response.headers.get("Retry-After"));
  const { error } = await response.json().catch(() => ({}));
  const said = sentence(error?.message ?? `The server answered ${response.status} ${response.statusText}`);
  return after ? `${said} Try again in ${after} s.` : said;
}

function sentence(text) {
  return text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
}

const door = page("door");
let entering = null;

/** Asks for a key, once however many want one; whether there is a new one then. */
function enterKey(refused) {
  entering ??= new Promise((resolve) => {
    page("door-fault").hidden = !refused;
    door.returnValue = "";
    door.addEventListener("close", () => resolve(takeKey()), { once: true });
    door.showModal();
  }).finally(() => (entering = null));
  return entering;
}

function takeKey() {
  const field = page("key");
  const entered = door.returnValue === "enter" && field.value !== "";
  if (entered) sessionStorage.setItem("key", field.value);
  field.value = "";
  return entered;
}

page("leave").addEventListener("click", () => door.close(""));
