// How tokens are chosen, as the form says; all that was typed outlives a reload.

import { page } from "./page.js";

const FIELDS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const KEPT = [...FIELDS, "stops", "prompt"];

/** The parameters of a request. What is left empty is not sent: the server's default. */
export function sampling() {
  const filled = FIELDS.filter((name) => page(name).value !== "");
  const numbers = Object.fromEntries(filled.map((name) => [name, page(name).valueAsNumber]));
  const stop = page("stops").value.split("\n").filter(Boolean).map(unescaped);
  return stop.length ? { ...numbers, stop } : numbers;
}

function unescaped(text) {
  const characters = { n: "\n", t: "\t", "\\": "\\" };
  return text.replace(/\\([nt\\])/g, (_, letter) => characters[letter]);
}

/** Fills in what was kept, and keeps what is typed. */
export function keepFields() {
  for (const name of KEPT) {
    page(name).value = sessionStorage.getItem(name) ?? page(name).value;
    page(name).addEventListener("input", () => keep(name));
  }
  page("sampling").addEventListener("input", summarize);
  summarize();
}

export function keep(name) {
  sessionStorage.setItem(name, page(name).value);
}

function summarize() {
  const set = Object.entries(sampling()).map(([name, value]) => `${name.replace("_", " ")} ${JSON.stringify(value)}`);
  page("chosen").textContent = set.join(", ");
}
