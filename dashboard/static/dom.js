// Elements, and numbers as the page writes them.

export const byId = (id) => document.getElementById(id);

function make(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
export const s = (tag, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

/** Sets text only where it differs, so that a screen reader hears changes alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Replaces the options of a select and keeps the choice where it is still there. */
export function choices(select, options) {
  const now = JSON.stringify(options);
  if (select.dataset.options === now) return;
  const kept = select.value;
  select.dataset.options = now;
  select.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
  if (options.some(([value]) => value === kept)) select.value = kept;
}

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
export const band = (row) => `${(100 * row.low).toFixed(0)} to ${(100 * row.high).toFixed(0)} %`;
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
export const pValue = (p) => (p < 1e-4 ? "p < 0.0001" : `p = ${Number(p).toPrecision(2)}`);
export const suiteOf = (suite) => suite.replace(/^libero_/, "");
export const taskName = (row) => `${suiteOf(row.suite)} ${row.task}`;

export function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1000) return String(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return value.toFixed(0);
  if (size >= 10) return value.toFixed(1);
  if (size >= 0.01 || size === 0) return String(Number(value.toFixed(3)));
  return value.toExponential(1);
}

export function clock(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString("en-GB");
}

export function lasted(seconds) {
  if (!(seconds >= 0)) return "–";
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}
