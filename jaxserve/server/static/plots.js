// Small plots, drawn by hand: the last two minutes of some numbers, and a map of expert load.

const SPAN = 120; // seconds
const GAP = 3; // seconds without an answer that break a line
const [WIDTH, HEIGHT] = [240, 48];

/** The lines of the last two minutes below a figure's title; `names` of the series also name their colours in style.css. */
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

/** The tokens each expert got, as colours: a row a layer, a column an expert. A cell that is pointed at tells its number. */
export class HeatMap {
  #canvas;
  #cell;
  #load;
  #at = [0, 0];

  constructor(figure) {
    this.#canvas = figure.querySelector("canvas");
    this.#cell = figure.querySelector(".cell");
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    for (const type of ["focus", "blur"]) this.#canvas.addEventListener(type, () => this.#tell());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  show(load) {
    this.#load = load;
    this.#draw();
    if (this.#cell.textContent) this.#tell();
  }

  #draw() {
    if (!this.#load) return;
    const { tokens } = this.#load;
    const canvas = this.#canvas;
    const palette = shades(getComputedStyle(canvas));
    canvas.width = canvas.clientWidth * devicePixelRatio;
    const width = canvas.width / tokens[0].length;
    const height = Math.max(1, Math.round(Math.min(width, TALLEST * devicePixelRatio)));
    const gap = height > 8 ? devicePixelRatio : 0;
    canvas.height = height * tokens.length;
    const context = canvas.getContext("2d");
    tokens.forEach((row, y) =>
      row.forEach((count, x) => {
        context.fillStyle = palette[SHADES + Math.round(SHADES * warmth(relative(row, count)))];
        context.fillRect(x * width, y * height, width - gap, height - gap);
      }),
    );
  }

  #point({ offsetX, offsetY }) {
    if (!this.#load) return;
    const { tokens } = this.#load;
    const place = (offset, extent, count) => Math.min(count - 1, Math.floor((offset / extent) * count));
    this.#at = [
      place(offsetY, this.#canvas.clientHeight, tokens.length),
      place(offsetX, this.#canvas.clientWidth, tokens[0].length),
    ];
    this.#tell();
  }

  #step(event) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (down === undefined || !this.#load) return;
    event.preventDefault();
    const { tokens } = this.#load;
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.#at = [within(this.#at[0] + down, tokens.length), within(this.#at[1] + right, tokens[0].length)];
    this.#tell();
  }

  #tell() {
    if (!this.#load) return;
    const { layers, tokens } = this.#load;
    const [y, x] = this.#at;
    const times = relative(tokens[y], tokens[y][x]).toFixed(2);
    this.#cell.textContent = `Layer ${layers[y]}, expert ${x}: ${whole(tokens[y][x])} tokens, ${times} times the mean`;
  }
}

function relative(row, count) {
  const sum = row.reduce((a, b) => a + b, 0);
  return sum ? (count * row.length) / sum : 1;
}

/** From -1 (a quarter of the mean, or less) to 1 (four times, or more). */
function warmth(times) {
  return Math.max(-1, Math.min(1, Math.log2(times) / 2));
}

function shades(style) {
  const [cold, mean, hot] = ["--cold", "--mean", "--hot"].map((name) => style.getPropertyValue(name));
  const shade = (i) => `color-mix(in oklab, ${i < 0 ? cold : hot} ${(100 * Math.abs(i)) / SHADES}%, ${mean})`;
  return Array.from({ length: 2 * SHADES + 1 }, (_, i) => shade(i - SHADES));
}

/** Numbers as people read them. */
export function whole(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function duration(seconds) {
  const [value, unit] = seconds < 1 ? [1000 * seconds, "ms"] : [seconds, "s"];
  return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
