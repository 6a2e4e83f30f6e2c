// The head of the page and the figures in short.
import { band, byId, count, h, lasted, percent, pValue, say, short, suiteOf } from "/static/dom.js";

const SIGNS = { running: "●", finished: "■", "ended early": "▲" };
let run = {};

export function drawRun(data) {
  run = data;
  document.title = `${data.name} · Pairloom`;
  say(byId("name"), data.folder);
  byId("standing").className = `status ${data.status.replace(" ", "-")}`;
  say(byId("status"), standing(data));
  const warning = byId("warning");
  warning.hidden = !data.warning && !data.unreadable;
  const unreadable = data.unreadable ? `${count(data.unreadable, "line")} of the journals could not be read and ${data.unreadable === 1 ? "is" : "are"} left out.` : "";
  say(warning, [data.warning, unreadable].filter(Boolean).join(" "));
  byId("tiles").replaceChildren(...tiles(data).map(([name, value, more, kind]) =>
    h("div", { class: `tile ${kind ?? ""}` }, h("dt", {}, name), h("dd", {}, h("span", { class: "value" }, value), h("span", { class: "more" }, more)))));
  say(byId("foot"), `${suiteOf(data.suite)}, task${data.tasks.length === 1 ? "" : "s"} ${listed(data.tasks)} · ${data.paradigm} policy · ${data.adapter} · ${data.schedule} schedule${data.assets ? ` · ${data.assets} assets` : ""}`);
  tick();
}

function standing(data) {
  const parts = [`${SIGNS[data.status]} ${data.status}`];
  if (data.status === "running" && data.doing?.what) {
    const { what, round, step, steps, version } = data.doing;
    parts.push([what, round >= 0 ? `round ${round}` : "", step ? `step ${step}${steps ? ` of ${steps}` : ""}` : "", version >= 0 ? `version ${version}` : ""].filter(Boolean).join(", "));
  }
  if (data.status === "ended early") parts.push("no process holds it, and it left no result");
  return parts.join(" · ");
}

/** Once a second, and to nobody's ears: how long it has been going, and how long it has been silent. */
export function tick() {
  if (!run.started || !run.latest) return;
  const now = Date.now() / 1000;
  const running = run.status === "running";
  const whole = lasted(run.result.wall_s ?? (running ? Math.max(now, run.latest) : run.latest) - run.started);
  say(byId("since"), ` · ${whole}${running ? ` · last line ${lasted(Math.max(now - run.latest, 0))} ago` : ""}`);
}

function tiles(data) {
  const { result, ends, counts } = data;
  const rows = result.success_before !== undefined
    ? [[result.success_before, result.wilson_before], [result.success_after, result.wilson_after]].map(([rate, [low, high]]) => ({ rate, low, high }))
    : ends;
  const [before, after] = rows;
  const promoted = counts.promoted ?? 0;
  const refused = (counts.rolled_back ?? 0) + (counts.tripped ?? 0) + (counts.refused ?? 0);
  const faults = counts.faults ?? 0;
  const restarts = counts.actor_restarted ?? 0;
  return [
    ["Held-out, start", before ? percent(before.rate) : "–", before ? band(before) : "not evaluated yet"],
    ["Held-out, after", after ? percent(after.rate) : "–", after ? band(after) : "not evaluated yet", after ? (after.rate >= before.rate ? "good" : "poor") : ""],
    ["Version in force", data.version === null ? "–" : String(data.version), data.hash ? data.hash.slice(0, 8) : "none published"],
    ["New versions", `${promoted} promoted`, `${refused} refused${counts.tripped ? `, ${counts.tripped} by the tripwire` : ""}`],
    ["Episodes", short(counts.episodes ?? 0), `${count(faults, "fault")}, ${count(restarts, "restart")}`],
    result.mcnemar_p !== undefined
      ? ["Before against after", pValue(result.mcnemar_p), `exact McNemar, ${result.held_out_episodes} cells`]
      : ["Rounds", `${data.doing?.round >= 0 ? data.doing.round + 1 : 0} of ${data.rounds}`, "of collect, learn, trial"],
  ];
}

const listed = (ids) => (ids.length > 8 ? `${ids.slice(0, 3).join(", ")} … ${ids.at(-1)} (${ids.length})` : ids.join(", "));
