// The page: a conversation with the model, and a live view of its engine.

import { watch } from "./engine.js";
import { element, page } from "./page.js";
import { keepFields } from "./sampling.js";
import { ask } from "./server.js";
import { talk } from "./talk.js";

const EXAMPLES = ["def quicksort(items):", "class Stack:", "for line in open(path):"];
const LABELS = {
  chat: { label: "Message", placeholder: "Ask something" },
  complete: { label: "Text to continue", placeholder: "def quicksort(items):" },
};

let model = null;

async function findModel() {
  if (model === null) {
    const response = await ask("/v1/models");
    [model] = (await response.json()).data;
    showModel();
  }
  return model;
}

/** Whatever is wrong is said where the engine is shown, and with the next message. */
function meet() {
  model = null;
  findModel().catch(() => {});
}

function showModel() {
  page("model").textContent = model.id;
  document.title = `${model.id} · jaxserve`;
  const chat = page("mode").querySelector("[value=chat]");
  chat.disabled = !model.chat;
  chat.parentElement.title = model.chat ? "" : "This model has no chat template.";
  const usual = model.roles === false ? "complete" : "chat"; // one that isn't ours doesn't say
  setMode(model.chat ? (sessionStorage.getItem("mode") ?? usual) : "complete");
}

function setMode(mode) {
  page("mode").querySelector(`[value=${mode}]`).checked = true;
  document.body.dataset.mode = mode;
  page("prompt").placeholder = LABELS[mode].placeholder;
  page("prompt").labels[0].textContent = LABELS[mode].label;
}

function offerExamples() {
  for (const text of EXAMPLES) {
    const button = element("button", "", text);
    button.addEventListener("click", () => fill(text));
    page("examples").append(button);
  }
}

function fill(text) {
  page("prompt").value = text;
  page("prompt").dispatchEvent(new Event("input"));
  page("prompt").focus();
}

keepFields();
setMode("chat");
offerExamples();
page("mode").addEventListener("change", ({ target }) => {
  setMode(target.value);
  sessionStorage.setItem("mode", target.value);
});
page("shade").addEventListener("change", ({ target }) => document.body.classList.toggle("shaded", target.checked));
talk(findModel);
watch(meet);
meet();
