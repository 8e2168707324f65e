// Tokens with their probabilities: spans in a text, and a card that tells of the one under the pointer or in focus.

import { element, page } from "./page.js";

/** The tokens of a choice, of either protocol, as `{text, logprob, others: [{text, logprob}]}`; none if not told. */
export function tokensOf(choice) {
  const told = choice.logprobs;
  if (told?.content) {
    const plain = ({ token, logprob }) => ({ text: token, logprob });
    return told.content.map((entry) => ({ ...plain(entry), others: entry.top_logprobs.map(plain) }));
  }
  return (told?.tokens ?? []).map((text, i) => ({
    text,
    logprob: told.token_logprobs[i],
    others: Object.entries(told.top_logprobs?.[i] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));
}

/**
 * A text that grows, in spans of one token each.
 *
 * The text is what counts. A token may come before its text does (which could still begin a stop text), be a part of a
 * character, or have been cut off by a stop: text that is no token's own goes to the one that came just before.
 */
export class TokenText {
  text = "";
  #element;
  #fresh = new DocumentFragment();
  #waiting = [];

  constructor(element) {
    this.#element = element;
  }

  add(text, tokens) {
    this.text += text;
    const without = [];
    for (const token of [...this.#waiting, ...tokens]) {
      const at = token.text ? text.indexOf(token.text) : -1;
      if (at < 0) {
        without.push(token);
        continue;
      }
      if (at > 0) this.#append(text.slice(0, at), without.pop());
      this.#append(token.text, token);
      text = text.slice(at + token.text.length);
      without.length = 0;
    }
    if (text) this.#append(text, without.pop());
    this.#waiting = text ? [] : without;
  }

  #append(text, token) {
    this.#fresh.append(token ? spanOf(token, text) : text);
  }

  /** Puts all that was added on the page. */
  show() {
    this.#element.append(this.#fresh);
    this.#element.firstElementChild?.setAttribute("tabindex", "0");
  }

  clear() {
    this.text = "";
    this.#waiting = [];
    this.#fresh.replaceChildren();
    this.#element.replaceChildren();
  }
}

const tokens = new WeakMap();

function spanOf(token, text) {
  const span = element("span", "token", text);
  span.tabIndex = -1;
  span.style.setProperty("--doubt", 1 - Math.exp(token.logprob));
  tokens.set(span, token);
  return span;
}

const card = page("card");
let shown = null; // the span that the card tells of

/** Lets the tokens below an element be read: by pointer, touch, and keys that go from one to the next. */
export function readable(element) {
  for (const type of ["pointerover", "focusin"]) element.addEventListener(type, ({ target }) => showCard(target));
  for (const type of ["pointerleave", "focusout"]) element.addEventListener(type, hideCard);
  element.addEventListener("keydown", moveFocus);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && hideCard());
  document.addEventListener("scroll", () => shown && placeCard(), { capture: true });
}

function showCard(span) {
  const token = tokens.get(span);
  if (!token) return hideCard();
  const rows = token.others.filter(({ text }) => text !== token.text).concat(token);
  rows.sort((a, b) => b.logprob - a.logprob);
  card.replaceChildren(...rows.map((row) => rowOf(row, row.text === token.text)));
  card.hidden = false;
  shown?.removeAttribute("aria-describedby");
  shown = span;
  span.setAttribute("aria-describedby", "card");
  placeCard();
}

/** Below its token, or above where there is no room. */
function placeCard() {
  const { left, top, bottom } = shown.getBoundingClientRect();
  const below = bottom + card.offsetHeight + 8 < innerHeight;
  card.style.left = `${Math.max(8, Math.min(left, innerWidth - card.offsetWidth - 8))}px`;
  card.style.top = `${below ? bottom + 4 : top - card.offsetHeight - 4}px`;
}

function hideCard() {
  card.hidden = true;
}

function rowOf({ text, logprob }, chosen) {
  const row = element("p", chosen ? "chosen" : "");
  row.style.setProperty("--share", Math.exp(logprob));
  row.append(element("code", "", visible(text)), percent(Math.exp(logprob)));
  return row;
}

function visible(text) {
  const shown = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  return shown.length > 24 ? `${shown.slice(0, 24)}…` : shown || "nothing";
}

function percent(share) {
  return `${share < 0.001 ? "< 0.1" : (100 * share).toFixed(1)} %`;
}

const STEPS = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };

function moveFocus(event) {
  const span = event.target;
  if (!tokens.has(span)) return;
  const ends = { Home: span.parentElement.firstElementChild, End: span.parentElement.lastElementChild };
  const next = ends[event.key] ?? span[STEPS[event.key]];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
