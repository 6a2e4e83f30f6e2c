// Loads the state once, then follows the server's events; each section of the page draws itself.
import { byId, say } from "/static/dom.js";
import { redrawAll } from "/static/plot.js";
import { drawRun, tick } from "/static/run.js";
import { drawHeat, drawSuccess } from "/static/success.js";
import { drawContrast } from "/static/contrast.js";
import { drawLearning, drawPairs, drawSpeed } from "/static/learning.js";
import { drawActors, drawCluster, drawCompare, drawIncidents } from "/static/fleet.js";

const SECTIONS = {
  run: drawRun, success: drawSuccess, heat: drawHeat, contrast: drawContrast, pairs: drawPairs, learning: drawLearning,
  speed: drawSpeed, actors: drawActors, cluster: drawCluster, incidents: drawIncidents, compare: drawCompare,
};
const RETRY_MS = 3000;

function draw(sections) {
  for (const [name, data] of Object.entries(sections)) SECTIONS[name]?.(data);
  document.documentElement.dataset.updates = Number(document.documentElement.dataset.updates ?? 0) + 1;
}

function linked(up) {
  byId("lost").hidden = up;
  byId("link").classList.toggle("up", up);
  say(byId("link"), up ? "live" : "not connected");
}

async function begin() {
  try {
    const answer = await fetch("/api/state");
    if (!answer.ok) throw new Error(await answer.text());
    const { since, sections } = await answer.json();
    draw(sections);
    performance.mark("drawn");
    follow(since);
  } catch {
    linked(false);
    setTimeout(begin, RETRY_MS);
  }
}

function follow(since) {
  const events = new EventSource(`/api/events?since=${since}`);
  events.onopen = () => linked(true);
  events.onmessage = (event) => draw(JSON.parse(event.data));
  events.onerror = () => {
    linked(false);
    // The browser tries again by itself, unless the server refused: then from the start.
    if (events.readyState === EventSource.CLOSED) setTimeout(begin, RETRY_MS);
  };
}

const THEMES = { "": ["◐ Auto", "as the system"], light: ["☀ Light", "light"], dark: ["☾ Dark", "dark"] };

function themed() {
  const [text, words] = THEMES[document.documentElement.dataset.theme ?? ""];
  say(byId("theme"), text);
  byId("theme").setAttribute("aria-label", `Colours: ${words}; press to change`);
}

byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  if (next) document.documentElement.dataset.theme = next;
  else delete document.documentElement.dataset.theme;
  localStorage.setItem("theme", next);
  themed();
  redrawAll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
themed();
setInterval(tick, 1000);
begin();
