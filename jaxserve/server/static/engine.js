// The live view of the engine: /stats, asked every second while somebody looks.

import { duration, element, page, percent, whole } from "./page.js";
import { HeatMap, Plot } from "./plots.js";
import { Fault, NoAnswer, request } from "./server.js";

const EVERY = 1000; // milliseconds
const PATIENCE = 3000;

const LATENCIES = ["time_to_first_token", "inter_token", "end_to_end"];

const plots = {
  throughput: new Plot(page("throughput"), ["generated", "prompt"]),
  batch: new Plot(page("batch"), ["running", "waiting"]),
  cache: new Plot(page("cache"), ["used"], { ceiling: 1, format: percent }),
  first: new Plot(page("first"), ["p50", "p99"], { ceiling: 0.1, format: duration }),
};
const heatMap = new HeatMap(page("experts"));

let before = null; // the last answer, with when it came
let unanswered = null; // when the first request was sent that had no answer since
let fault = null;

/** Keeps the view up to date; `back` is called whenever the server answers after it did not. */
export function watch(back) {
  let asking = false;
  const look = async () => {
    if (document.hidden) return;
    unanswered ??= performance.now();
    showSilence();
    if (asking) return;
    asking = true;
    const away = fault !== null;
    await update();
    asking = false;
    if (away && fault === null) back();
  };
  setInterval(look, EVERY);
  document.addEventListener("visibilitychange", look);
  look();
}

async function update() {
  let stats;
  try {
    const response = await request("/stats", { signal: AbortSignal.timeout(PATIENCE) });
    stats = await response.json();
    unanswered = fault = null;
  } catch (error) {
    fault = error;
  }
  showSilence();
  if (stats) show(stats, performance.now() / 1000);
}

/** Says what is wrong if the server does, and that it is silent once that lasts. */
function showSilence() {
  const silence = unanswered === null ? 0 : performance.now() - unanswered;
  const refused = fault instanceof Fault && !(fault instanceof NoAnswer);
  const away = refused || silence > PATIENCE;
  page("engine").classList.toggle("away", away);
  page("away").hidden = !away;
  if (!away) return;
  showState("away", refused ? "not ready" : `no answer since ${Math.round(silence / 1000)} s`);
  const said = `${refused ? fault.message : "The server does not answer."} This page asks on.`;
  if (page("away").textContent !== said) page("away").textContent = said; // it is read aloud once
}

function showState(state, text) {
  page("status").dataset.state = state;
  page("status").textContent = text;
}

function show(stats, time) {
  const { requests, cache, latency } = stats;
  showState(stats.state, stats.state);
  plots.throughput.add(time, rates(stats, time));
  plots.batch.ceiling = requests.slots;
  plots.batch.add(time, { running: requests.running, waiting: requests.waiting });
  plots.cache.add(time, { used: cache.used / cache.pages });
  const { p50 = null, p99 = null } = latency.time_to_first_token ?? {};
  plots.first.add(time, { p50, p99 });
  for (const name of LATENCIES) showLatency(page(name), latency[name]);
  showExperts(stats.experts);
  showDrafts(stats.drafts);
  showSums(stats);
  before = { time, ...stats };
}

/** Tokens per second since the answer before; null if there was none, or the server has started anew. */
function rates({ tokens, uptime }, time) {
  if (before === null || uptime < before.uptime) return { generated: null, prompt: null };
  const rate = (name) => (tokens[name] - before.tokens[name]) / (time - before.time);
  return { generated: rate("generated"), prompt: rate("prompt") };
}

function showLatency(row, percentiles) {
  const cells = ["p50", "p90", "p99"].map((p) => element("td", "", percentiles ? duration(percentiles[p]) : "–"));
  row.replaceChildren(row.firstElementChild, ...cells);
}

/** Layers whose experts have had tokens; those without experts never have. */
function showExperts(experts) {
  const rows = (experts?.layers ?? []).map((layer, i) => ({ layer, tokens: experts.tokens[i] }));
  const used = rows.filter(({ tokens }) => tokens.some(Boolean));
  page("experts").hidden = used.length === 0;
  if (used.length === 0) return;
  const [first, last] = [used[0], used.at(-1)];
  const shape = `layers ${first.layer} to ${last.layer} ↓ experts 0 to ${first.tokens.length - 1} →`;
  page("experts").querySelector(".shape").textContent = shape;
  heatMap.show(used);
}

function showDrafts({ rows, accepted }) {
  page("drafts").hidden = accepted.length === 0;
  const shares = accepted.map((count) => (rows ? count / rows : 0));
  const bars = shares.map((share, i) => {
    const bar = element("li", "", `guess ${i + 1}: ${percent(share)}`);
    bar.style.setProperty("--share", share);
    return bar;
  });
  page("drafts").querySelector("ol").replaceChildren(...bars);
}

function showSums({ requests, tokens, cache, steps, preemptions, compilations, uptime }) {
  const sums = {
    "up for": age(uptime),
    "answers finished": whole(requests.finished),
    "prompts cached": tokens.prompt ? percent(tokens.cached / tokens.prompt) : "–",
    "pages in use": `${whole(cache.used)} of ${whole(cache.pages)}`,
    steps: whole(steps),
    preemptions: whole(preemptions),
    "late compilations": whole(compilations.late),
  };
  const pairs = Object.entries(sums).map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  });
  page("sums").replaceChildren(...pairs);
}

function age(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
