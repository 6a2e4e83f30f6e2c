// Success by version and by task, and the map of tasks and initial states.
import { band, byId, choices, h, percent, s, say, taskName } from "/static/dom.js";
import { Plot } from "/static/plot.js";

const plot = new Plot(byId("success-plot"), {
  title: "By policy version", xLabel: "version", range: [0, 1], height: 260,
  xValues: (x) => (Number.isInteger(x) ? String(x) : ""), values: (y) => (y === null || y === undefined ? "–" : percent(y, 0)),
  series: [
    { key: "held", label: "held-out states", colour: "first", points: true, band: ["held_low", "held_high"] },
    { key: "train", label: "training states", colour: "second", dash: "dashed", points: true, band: ["train_low", "train_high"] },
  ],
});
let success = null;
const pick = byId("success-task");
pick.addEventListener("change", drawVersions);

export function drawSuccess(data) {
  success = data;
  choices(pick, [["", "all"], ...data.tasks.map((row) => [`${row.suite} ${row.task}`, taskName(row)])]);
  drawVersions();
  drawTasks();
}

function drawVersions() {
  const chosen = success.tasks.find((row) => `${row.suite} ${row.task}` === pick.value) ?? success.all;
  const versions = [...new Set([...chosen.held_out, ...chosen.training].map((row) => row.version))].sort((a, b) => a - b);
  const columns = { x: versions };
  for (const [key, rows] of [["held", chosen.held_out], ["train", chosen.training]]) {
    if (!rows.length) continue;
    const by = new Map(rows.map((row) => [row.version, row]));
    columns[key] = versions.map((version) => by.get(version)?.rate ?? null);
    columns[`${key}_low`] = versions.map((version) => by.get(version)?.low ?? null);
    columns[`${key}_high`] = versions.map((version) => by.get(version)?.high ?? null);
  }
  plot.update(columns);
}

function drawTasks() {
  const rows = success.tasks.map((row) => [row, row.held_out.length ? row.held_out : row.training]).filter(([, rates]) => rates.length);
  byId("success-tasks").replaceChildren(h("table", { class: "tasks" },
    h("caption", {}, "By task: ", mark("start"), " first and ", mark("now"), " latest version evaluated"),
    h("thead", { class: "hidden" }, h("tr", {}, ["task", "0 to 100 %", "latest"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, rows.map(([row, rates]) => {
      const [first, last] = [rates[0], rates.at(-1)];
      const both = first === last ? [last] : [first, last];
      const words = both.map((one) => `version ${one.version}: ${one.successes} of ${one.episodes}, ${band(one)}`).join("; ");
      return h("tr", {}, h("th", { scope: "row" }, taskName(row)), h("td", { title: words }, track(both, words)),
        h("td", { class: "figures" }, `${percent(last.rate, 0)} of ${last.episodes}`));
    }))));
}

/** Rates on a line from 0 to 100 %, each with its interval as a bar; the last is the filled diamond. */
export function track(rates, words) {
  const x = (share) => `${2 + 96 * share}%`;
  const drawn = rates.flatMap((one, index) => {
    const last = index === rates.length - 1;
    const y = rates.length === 1 ? 12 : last ? 16 : 8;
    const kind = last ? "now" : "start";
    return [
      s("rect", { class: `interval ${kind}`, x: x(one.low), width: `${96 * (one.high - one.low)}%`, y: y - 2.5, height: 5, rx: 2.5 }),
      s("svg", { class: "at", x: x(one.rate), y, overflow: "visible", width: 1, height: 1 }, shape(kind)),
    ];
  });
  return s("svg", { class: "track", role: "img", "aria-label": words },
    s("line", { x1: x(0), x2: x(1), y1: 12, y2: 12 }), [0, 0.5, 1].map((share) => s("line", { x1: x(share), x2: x(share), y1: 4, y2: 20 })), drawn);
}

const shape = (kind) => (kind === "now" ? s("path", { class: "now", d: "M0 -6 L6 0 L0 6 L-6 0 Z" }) : s("circle", { class: "start", r: 4.5 }));
const mark = (kind) => s("svg", { class: "mark", viewBox: "-8 -8 16 16", "aria-hidden": "true" }, shape(kind));

let at = [0, 0];
let cells = [];
const map = byId("heat");
// One listener for thousands of cells.
for (const kind of ["focusin", "mouseover"]) map.addEventListener(kind, (event) => {
  const cell = event.target.closest("td");
  if (!cell) return;
  if (kind === "focusin") move(...cell.dataset.at.split(" ").map(Number));
  say(byId("heat-says"), cell.getAttribute("aria-label"));
});
map.addEventListener("keydown", walk);

export function drawHeat(data) {
  const states = [...new Set(data.tasks.flatMap((row) => row.cells.map((cell) => cell[0])))].sort((a, b) => a - b);
  const focused = map.contains(document.activeElement) && document.activeElement.tagName === "TD";
  const rows = data.tasks.map((row) => [row, new Map(row.cells.map((cell) => [cell[0], cell]))]);
  at = [Math.min(at[0], Math.max(rows.length - 1, 0)), Math.min(at[1], Math.max(states.length - 1, 0))];
  cells = rows.map(([row, by], r) => states.map((state, c) => cellOf(row, state, by.get(state), r, c)));
  map.replaceChildren(rows.length ? h("table", { class: "heat", role: "grid", "aria-label": "Success rate by task and initial state" },
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "task")), states.map((state) => h("th", { scope: "col", class: state % 5 ? "off" : "" }, h("span", {}, String(state)))))),
    h("tbody", {}, rows.map(([row], r) => h("tr", {}, h("th", { scope: "row" }, taskName(row)), cells[r]))),
  ) : h("p", { class: "none" }, "No episode driven by the policy yet"));
  if (focused) cells[at[0]]?.[at[1]]?.focus();
}

function cellOf(row, state, cell, r, c) {
  const words = `${taskName(row)}, state ${state}: ${cell ? inWords(cell) : "not driven"}`;
  const td = h("td", { tabindex: r === at[0] && c === at[1] ? 0 : -1, "aria-label": words, class: kindOf(cell), "data-at": `${r} ${c}` });
  if (cell?.[2]) td.style.setProperty("--share", String(cell[1] / cell[2]));
  return td;
}

function kindOf(cell) {
  if (!cell) return "never";
  if (!cell[2]) return "faults";
  return cell[1] === cell[2] ? "all" : cell[1] === 0 ? "none-of" : "some";
}

function inWords([, successes, episodes, faults, oldest, newest]) {
  const versions = oldest === newest ? `version ${newest}` : `versions ${oldest} to ${newest}`;
  const rate = episodes ? `${successes} of ${episodes} (${percent(successes / episodes, 0)})` : "no clean episode";
  return `${rate}, ${versions}${faults ? `; ${faults} ended in a fault` : ""}`;
}

function move(r, c) {
  cells[at[0]]?.[at[1]]?.setAttribute("tabindex", "-1");
  at = [r, c];
  cells[r][c].setAttribute("tabindex", "0");
}

function walk(event) {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
  if (!down && !right) return;
  event.preventDefault();
  cells[at[0] + down]?.[at[1] + right]?.focus();
}
