// What all parts of the page use: its elements, and numbers as people read them.

export function page(id) {
  return document.getElementById(id);
}

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

export function whole(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
}

export function percent(share) {
  return `${whole(100 * share)} %`;
}

export function duration(seconds) {
  const [value, unit] = seconds < 1 ? [1000 * seconds, "ms"] : [seconds, "s"];
  return `${value.toFixed(value < 10 ? 1 : 0)} ${unit}`;
}
