// One turn of a conversation: what was said, and the model's answer as it comes.

import { duration, page, whole } from "./page.js";
import { TokenText, tokensOf } from "./tokens.js";

const ENDS = { stop: "ended", length: "reached max tokens", stopped: "stopped" };

export class Turn {
  #frame = null;
  #part;
  #numbers;
  #finish = null;

  constructor(mode, said) {
    this.mode = mode;
    this.said = said;
    this.element = page("turn").content.firstElementChild.cloneNode(true);
    this.element.dataset.mode = mode;
    this.#part = (name) => this.element.querySelector(`.${name}`);
    this.#part("said").textContent = said;
    this.thoughts = new TokenText(this.#part("thoughts"));
    this.answer = new TokenText(this.#part("answer"));
  }

  /** Calls back when the reader wants the answer anew, or more of it. */
  whenAsked(retry, further) {
    this.#part("retry").addEventListener("click", () => retry(this));
    this.#part("further").addEventListener("click", () => further(this));
  }

  begin() {
    this.#numbers = { began: performance.now(), first: null, count: 0, usage: null };
    this.#finish = null;
    this.#part("answer").ariaBusy = "true";
    this.#part("facts").textContent = "";
    for (const name of ["fault", "retry", "further"]) this.#part(name).hidden = true;
  }

  /** Takes an event of the stream; what it brings is shown with the next frame. */
  take({ choices: [choice], usage }) {
    this.#numbers.usage = usage ?? this.#numbers.usage;
    if (!choice) return;
    const tokens = tokensOf(choice);
    const { content, reasoning_content: thought } = choice.delta ?? { content: choice.text };
    if (content || thought) this.#numbers.first ??= performance.now();
    this.#numbers.count += tokens.length;
    this.#finish = choice.finish_reason ?? this.#finish;
    if (thought) this.thoughts.add(thought, content ? [] : tokens);
    if (content || !thought) this.answer.add(content ?? "", tokens);
    this.#frame ??= requestAnimationFrame(() => this.#show());
  }

  #show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    this.thoughts.show();
    this.answer.show();
  }

  clear() {
    this.thoughts.clear();
    this.answer.clear();
  }

  stop() {
    this.#finish = "stopped";
  }

  fail(message) {
    this.#part("fault").textContent = message;
    this.#part("fault").hidden = false;
  }

  end() {
    this.#show();
    this.#part("answer").ariaBusy = "false";
    this.#part("facts").textContent = this.#facts().join(" · ");
    this.#part("retry").hidden = false;
    this.#part("further").hidden = this.answer.text === "" || this.#finish === "stop";
  }

  #facts() {
    const { began, first, count, usage } = this.#numbers;
    if (first === null) return this.#finish ? [ENDS[this.#finish]] : [];
    const tokens = usage?.completion_tokens ?? count;
    const seconds = (performance.now() - began) / 1000;
    const wait = (first - began) / 1000;
    const facts = [`${whole(tokens)} tokens in ${duration(seconds)}`, `first after ${duration(wait)}`];
    if (usage) facts.push(`${whole(usage.prompt_tokens)} prompt tokens, ${whole(cached(usage))} cached`);
    return this.#finish ? [...facts, ENDS[this.#finish] ?? this.#finish] : facts;
  }
}

function cached(usage) {
  return usage.prompt_tokens_details?.cached_tokens ?? 0;
}
