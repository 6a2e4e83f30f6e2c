// Actors and what they serve, nodes, what went wrong, and the runs compared.
import { band, byId, clock, count, h, percent, pValue, short } from "/static/dom.js";
import { track } from "/static/success.js";

const head = (...names) => h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name))));

export function drawActors(data) {
  const kinds = Object.entries(data.restarts).map(([kind, number]) => `${number} × ${kind}`).join(", ");
  const rows = data.policy.map((actor) => h("tr", {},
    h("th", { scope: "row" }, actor.actor), h("td", {}, String(actor.version ?? "–"), " ", standing(actor.version, data.in_force)),
    h("td", {}, h("code", { title: actor.hash ?? "" }, (actor.hash ?? "–").slice(0, 8))),
    h("td", { class: "figures" }, short(actor.batch_fill)), h("td", { class: "figures" }, short(actor.act_ms)), h("td", { class: "figures" }, String(actor.restarts))));
  byId("actors-body").replaceChildren(
    h("h3", {}, "Policy actors"),
    rows.length
      ? h("div", { class: "scroll" }, h("table", { class: "plain" }, head("actor", "version", "hash", "fill", "ms", "restarts"), h("tbody", {}, rows)))
      : h("p", { class: "none" }, "This run has not said which actor serves what"),
    h("p", { class: "note" }, kinds ? `Restarted: ${kinds}.` : "No actor restarted."));
}

function standing(version, inForce) {
  if (version === undefined || inForce === null) return null;
  if (version === inForce) return h("span", { class: "tag good" }, "✓ in force");
  if (version > inForce) return h("span", { class: "tag" }, "◆ candidate");
  return h("span", { class: "tag poor" }, `▼ ${inForce - version} behind`);
}

const STATES = ["ready", "away", "draining", "quarantined"];

export function drawCluster(data) {
  const actors = data.rollout_actors;
  const body = byId("cluster-body");
  if (!actors && !data.nodes) return body.replaceChildren(h("h3", {}, "Cluster"), h("p", { class: "none" }, "This run has not said what the cluster looks like"));
  const pending = Object.entries(data.pending ?? {}).filter(([, number]) => number);
  const parts = [h("h3", {}, "Cluster")];
  if (actors) {
    const slots = STATES.flatMap((state) => Array.from({ length: Math.min(actors[state] ?? 0, 64) }, () => h("span", { class: `slot ${state}` })));
    const words = STATES.filter((state) => actors[state]).map((state) => `${actors[state]} ${state}`).join(", ");
    parts.push(h("p", {}, h("strong", {}, `${actors.ready ?? 0} of ${actors.wanted ?? "?"}`), " rollout actors ready", words ? ` (${words})` : ""), h("div", { class: "slots", "aria-hidden": "true" }, slots));
  }
  parts.push(h("p", {}, pending.length ? `Waiting for a node: ${pending.map(([what, number]) => count(number, what)).join(", ")}.` : "Nothing waits for a node."));
  parts.push(...scaling(data.autoscaler));
  if (data.nodes?.length) parts.push(h("div", { class: "scroll" }, h("table", { class: "plain" }, head("node", "CPUs", "GPUs", "state"), h("tbody", {}, data.nodes.map((node) => {
    const state = node.alive === false ? ["poor", "✕ gone"] : node.draining ? ["", "◆ draining"] : ["good", "✓ alive"];
    return h("tr", {}, h("th", { scope: "row" }, h("code", {}, String(node.node).slice(0, 8))), h("td", { class: "figures" }, short(node.cpus)), h("td", { class: "figures" }, short(node.gpus)), h("td", {}, h("span", { class: `tag ${state[0]}` }, state[1])));
  })))));
  body.replaceChildren(...parts);
}

function scaling(state) {
  if (!state) return [];
  const starting = Object.entries(state.starting ?? {}).filter(([, number]) => number);
  const lines = [starting.length ? `Autoscaler: starting ${starting.map(([kind, number]) => `${number} ${kind}`).join(", ")}.` : "Autoscaler: nothing is starting."];
  if (state.infeasible) lines.push(`${count(state.infeasible, "request")} fit no kind of node.`);
  return [
    h("p", {}, lines.join(" ")),
    ...(state.failed ?? []).map((one) => h("p", {}, h("span", { class: "tag poor" }, "✕ not started"), ` ${one.kind}: ${one.reason}`)),
  ];
}

const EVENTS = {
  promoted: ["good", "✓", (e) => `Version ${e.version} promoted${trial(e)}`],
  rolled_back: ["poor", "▼", (e) => `Version ${e.version} rolled back by the canary${trial(e)}`],
  tripped: ["poor", "▲", (e) => `Update of round ${e.round} undone by the tripwire: ${e.reason}`],
  refused: ["poor", "✕", (e) => `What round ${e.round} learned was refused: ${e.reason}`],
  skipped: ["", "–", (e) => `No update in round ${e.round}: ${e.reason}`],
  quarantined: ["poor", "✕", (e) => `Episode ${e.cell} quarantined: ${e.reason}`],
  actor_restarted: ["warn", "↻", (e) => `${e.kind ?? "rollout"} ${e.actor === undefined ? "" : `actor ${e.actor} `}restarted: ${e.reason}`],
  renderer_fell_back: ["warn", "◆", (e) => `Renderer fell back${e.reason ? `: ${e.reason}` : ""}`],
  renderer_quarantined: ["poor", "✕", (e) => `Renderer quarantined${e.reason ? `: ${e.reason}` : ""}`],
  node_joined: ["good", "+", (e) => `Node ${String(e.node ?? "").slice(0, 8)} joined`],
  node_lost: ["poor", "−", (e) => `Node ${String(e.node ?? "").slice(0, 8)} lost${e.reason ? `: ${e.reason}` : ""}`],
  node_draining: ["warn", "◆", (e) => `Node ${String(e.node ?? "").slice(0, 8)} is draining${e.reason ? `: ${e.reason}` : ""}`],
  resumed: ["", "►", (e) => `Run resumed${e.version === undefined ? "" : ` with version ${e.version}`}${e.next_round === undefined ? "" : `, round ${e.next_round} next`}`],
  checkpoint_skipped: ["warn", "◆", (e) => `Checkpoint of version ${e.version} skipped: ${e.reason}`],
  state_not_saved: ["warn", "◆", (e) => `The supervised start's state was not saved: ${e.reason}`],
  last_words: ["", "·", (e) => `rollout actor ${e.actor} said before it ended: ${e.reason}`],
  stack_differs: ["warn", "≠", (e) => `The stack is not that of ${e.start}: ${e.reason}`],
};
const trial = (e) => (e.cells ? `: ${e.after} of ${e.cells} canary cells against ${e.before} (p of being worse ${Number(e.p_worse).toPrecision(2)})` : "");
const FEW = 12;
let all = false;
let incidents = null;

export function drawIncidents(data) {
  incidents = data;
  const chips = Object.entries(data.counts).map(([event, number]) => h("li", {}, `${number} × ${event.replaceAll("_", " ")}`));
  const rows = (all ? data.latest : data.latest.slice(0, FEW)).map((event) => {
    const [kind, sign, words] = EVENTS[event.event] ?? ["", "·", (e) => Object.entries(e).filter(([key]) => key !== "time").map(([key, value]) => `${key} ${value}`).join(", ")];
    return h("li", { class: kind }, h("span", { class: "sign", "aria-hidden": "true" }, sign), h("span", {}, words(event)),
      event.time ? h("time", { datetime: new Date(1000 * event.time).toISOString() }, clock(event.time)) : null);
  });
  byId("incidents-body").replaceChildren(
    chips.length ? h("ul", { class: "chips", "aria-label": "How often" }, chips) : h("p", { class: "none" }, "Nothing has happened yet"),
    h("ol", { class: "events", "aria-label": "Latest first" }, rows));
  if (data.latest.length > FEW) byId("incidents-body").append(h("button", { type: "button", class: "quiet", "aria-expanded": String(all), onclick: toggle }, all ? "Fewer" : `All ${data.latest.length}`));
}

function toggle() {
  all = !all;
  drawIncidents(incidents);
  byId("incidents-body").querySelector("button").focus();
}

export function drawCompare({ runs }) {
  byId("compare").hidden = byId("to-compare").hidden = !runs.length;
  if (!runs.length) return;
  byId("compare-body").replaceChildren(h("table", { class: "plain compared" },
    head("run", "version", "held-out success, 0 to 100 %", "", "shared cells", "better", "worse", "exact McNemar"),
    h("tbody", {}, runs.map((run, index) => {
      const last = run.ends.at(-1);
      const words = last ? `${percent(last.rate)}, ${band(last)}` : "not evaluated";
      return h("tr", {}, h("th", { scope: "row" }, run.name), h("td", {}, run.version < 0 ? "–" : String(run.version)),
        h("td", {}, last ? track([last], words) : null), h("td", {}, words),
        ...(index ? [String(run.cells), String(run.gained), String(run.lost), run.p === null ? "no shared cell" : pValue(run.p)] : ["this run", "", "", ""]).map((text) => h("td", { class: "figures" }, text)));
    }))));
}
