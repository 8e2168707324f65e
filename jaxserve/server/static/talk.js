// The conversation: sends what is typed, shows what streams back, and stops it.

import { page } from "./page.js";
import { keep, sampling } from "./sampling.js";
import { ask, events } from "./server.js";
import { readable } from "./tokens.js";
import { Turn } from "./turn.js";

const ALTERNATIVES = 5; // of each token

let findModel; // an asynchronous function
let turns = [];
let running = null; // what aborts the answer that streams

/** Lets the page talk to the model that `find` finds. */
export function talk(find) {
  findModel = find;
  page("composer").addEventListener("submit", sendForm);
  page("prompt").addEventListener("keydown", sendOnEnter);
  page("stop").addEventListener("click", stop);
  page("new").addEventListener("click", startAnew);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !page("door").open) stop();
  });
  readable(page("turns"));
}

function sendForm(event) {
  event.preventDefault();
  send();
}

function sendOnEnter(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) sendForm(event);
}

function send() {
  const said = page("prompt").value;
  if (running || said.trim() === "") return;
  const turn = new Turn(mode(), said);
  turn.whenAsked(retry, further);
  turns.push(turn);
  page("turns").append(turn.element);
  page("prompt").value = "";
  keep("prompt");
  answer(turn);
}

function retry(turn) {
  turn.clear();
  further(turn);
}

function further(turn) {
  answer(turn);
  page("stop").focus(); // the button that was pressed is gone
}

function mode() {
  return page("mode").querySelector(":checked").value;
}

/** Streams an answer into the turn, after what is there of it. */
async function answer(turn) {
  running = new AbortController();
  show(true);
  turn.begin();
  try {
    const model = await findModel();
    const path = turn.mode === "chat" ? "/v1/chat/completions" : "/v1/completions";
    const response = await ask(path, { model: model.id, ...body(turn), ...sampling() }, running.signal);
    for await (const event of events(response)) turn.take(event);
  } catch (error) {
    if (error.name === "AbortError") turn.stop();
    else turn.fail(error.message);
  }
  running = null;
  turn.end();
  show(false);
}

function body(turn) {
  const stream = { stream: true, stream_options: { include_usage: true } };
  const { said, answer } = turn;
  if (turn.mode === "complete") return { ...stream, prompt: said + answer.text, logprobs: ALTERNATIVES };
  const further = answer.text && { continue_final_message: true, add_generation_prompt: false };
  return { ...stream, ...further, messages: messages(turn), logprobs: true, top_logprobs: ALTERNATIVES };
}

/** The chat up to this turn. Turns that have no answer but an error are left out. */
function messages(last) {
  const chat = turns.slice(0, turns.indexOf(last) + 1).filter((turn) => turn.mode === "chat");
  return chat.flatMap((turn) => {
    const question = { role: "user", content: turn.said };
    if (turn.answer.text) return [question, { role: "assistant", content: turn.answer.text }];
    return turn === last ? [question] : [];
  });
}

function stop() {
  running?.abort();
}

function startAnew() {
  stop();
  turns = [];
  page("turns").replaceChildren();
  page("prompt").focus();
}

function show(busy) {
  const focused = document.activeElement === page("stop");
  page("send").hidden = busy;
  page("stop").hidden = !busy;
  if (focused && !busy) page("prompt").focus();
}
