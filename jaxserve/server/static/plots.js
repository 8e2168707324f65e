// Small plots, drawn by hand: the last two minutes of some numbers, and a map of expert load.

import { element, whole } from "./page.js";

const SPAN = 120; // seconds
const GAP = 3; // seconds without an answer that break a line
const [WIDTH, HEIGHT] = [240, 48];

/** Lines below a figure's title. The names of the series are also those of their colours, in style.css. */
export class Plot {
  #lines = {};
  #figure;
  #names;
  #format;
  #top;
  #samples = [];

  /** `ceiling` is what the upper edge stands for, unless a value is greater; `format` turns values into text. */
  constructor(figure, names, { ceiling = 1, format = whole } = {}) {
    this.#figure = figure;
    this.#names = names;
    this.#format = format;
    this.ceiling = ceiling;
    this.#build();
  }

  #build() {
    const legend = element("p", "legend");
    for (const name of this.#names) legend.append(element("span", name, name), element("output", name, "–"));
    legend.append((this.#top = element("span", "top")));
    const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": true });
    for (const name of this.#names) chart.append((this.#lines[name] = svg("path", { class: name })));
    const axis = element("p", "axis");
    axis.append(element("span", "", "−2 min"), element("span", "", "now"));
    this.#figure.append(legend, chart, axis);
  }

  /** `values` by name, null where there is none; `time` in seconds. */
  add(time, values) {
    this.#samples.push({ time, values });
    this.#samples = this.#samples.filter((sample) => sample.time >= time - SPAN);
    const all = this.#samples.flatMap((sample) => Object.values(sample.values));
    const most = Math.max(...all);
    const top = most > this.ceiling ? roundUp(most) : this.ceiling;
    this.#top.textContent = this.#format(top);
    for (const name of this.#names) {
      this.#lines[name].setAttribute("d", this.#path(name, time, top));
      const value = values[name];
      this.#figure.querySelector(`output.${name}`).textContent = value === null ? "–" : this.#format(value);
    }
  }

  #path(name, now, top) {
    let before = -Infinity;
    const points = this.#samples.filter((sample) => sample.values[name] !== null);
    return points
      .map(({ time, values }) => {
        const verb = time - before > GAP ? "M" : "L";
        before = time;
        const x = WIDTH * (1 - (now - time) / SPAN);
        return `${verb}${x.toFixed(1)} ${(HEIGHT * (1 - values[name] / top)).toFixed(1)}`;
      })
      .join("");
  }
}

/** The next of 1, 2, 5, 10, 20, … */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((digit) => digit * power >= value) * power;
}

const SHADES = 16; // either side of the mean
const TALLEST = 24; // pixels of a row
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** The tokens that experts got as colours, a row a layer; tells the numbers of a cell that is pointed at. */
export class HeatMap {
  #canvas;
  #cell;
  #rows = [];
  #at = [0, 0];

  constructor(figure) {
    this.#canvas = figure.querySelector("canvas");
    this.#cell = figure.querySelector(".cell");
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    this.#canvas.addEventListener("focus", () => this.#tell());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** `rows` are `{layer, tokens}`, at least one. */
  show(rows) {
    this.#rows = rows.map((row) => ({ ...row, mean: row.tokens.reduce((a, b) => a + b) / row.tokens.length }));
    this.#draw();
  }

  #draw() {
    if (this.#rows.length === 0) return;
    const canvas = this.#canvas;
    const palette = shades(getComputedStyle(canvas));
    canvas.width = canvas.clientWidth * devicePixelRatio;
    const width = canvas.width / this.#columns;
    const height = Math.max(1, Math.round(Math.min(width, TALLEST * devicePixelRatio)));
    const gap = height > 8 ? devicePixelRatio : 0;
    canvas.height = height * this.#rows.length;
    const context = canvas.getContext("2d");
    this.#rows.forEach(({ tokens, mean }, y) =>
      tokens.forEach((count, x) => {
        context.fillStyle = palette[SHADES + Math.round(SHADES * warmth(count / mean))];
        context.fillRect(x * width, y * height, width - gap, height - gap);
      }),
    );
  }

  #point({ offsetX, offsetY }) {
    const { clientWidth, clientHeight } = this.#canvas;
    this.#tell((offsetY / clientHeight) * this.#rows.length, (offsetX / clientWidth) * this.#columns);
  }

  #step(event) {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    this.#tell(this.#at[0] + step[0], this.#at[1] + step[1]);
  }

  /** Tells of the cell at a place, or of the one nearest to it. */
  #tell(row = this.#at[0], column = this.#at[1]) {
    const within = (place, count) => Math.max(0, Math.min(count - 1, Math.floor(place)));
    const [y, x] = (this.#at = [within(row, this.#rows.length), within(column, this.#columns)]);
    const { layer, tokens, mean } = this.#rows[y];
    const times = (tokens[x] / mean).toFixed(2);
    this.#cell.textContent = `Layer ${layer}, expert ${x}: ${whole(tokens[x])} tokens, ${times} times the mean`;
  }

  get #columns() {
    return this.#rows[0].tokens.length;
  }
}

/** From -1 (half the mean, or less) to 1 (twice, or more). */
function warmth(times) {
  return Math.max(-1, Math.min(1, Math.log2(times)));
}

function shades(style) {
  const [cold, mean, hot] = ["--cold", "--mean", "--hot"].map((name) => style.getPropertyValue(name));
  const shade = (i) => `color-mix(in oklab, ${i < 0 ? cold : hot} ${(100 * Math.abs(i)) / SHADES}%, ${mean})`;
  return Array.from({ length: 2 * SHADES + 1 }, (_, i) => shade(i - SHADES));
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
