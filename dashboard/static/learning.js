// Pairs by round, the learner's curves, and the fleet's speed.
import { byId, count, h, short } from "/static/dom.js";
import { Plot } from "/static/plot.js";

const STEP = "optimizer step";
const line = (key, label, colour, dash) => ({ key, label, colour, dash });
const into = byId("learning-body");
const plots = {
  logratios: new Plot(into, { title: "Log-ratios", unit: "nats per token, policy over reference", xLabel: STEP, series: [
    line("chosen_logratio", "chosen", "first"), line("success_logratio", "successes", "third", "dotted"), line("rejected_logratio", "rejected", "second", "dashed")] }),
  margin: new Plot(into, { title: "Margin", unit: "chosen − rejected reward, ± its spread", xLabel: STEP, series: [
    { ...line("margin", "margin", "first"), band: ["margin_low", "margin_high"] }] }),
  rewards: new Plot(into, { title: "Implicit rewards", unit: "beta × nats", xLabel: STEP, series: [
    line("chosen_reward", "chosen", "first"), line("rejected_reward", "rejected", "second", "dashed")] }),
  kl: new Plot(into, { title: "KL to the reference", unit: "nats per token, estimated", xLabel: STEP, series: [line("kl", "", "first")] }),
  accuracy: new Plot(into, { title: "Accuracy", unit: "share of pairs ranked rightly; of rejected at the floor", xLabel: STEP, range: [0, 1], series: [
    line("accuracy", "accuracy", "first"), line("held", "at the floor", "second", "dashed")] }),
  loss: new Plot(into, { title: "Loss", unit: "preference updates", xLabel: STEP, series: [line("loss", "", "first")] }),
  grad_norm: new Plot(into, { title: "Gradient norm", unit: "preference updates", xLabel: STEP, series: [line("grad_norm", "", "first")] }),
  supervised: new Plot(into, { title: "Supervised start", unit: "loss", xLabel: "step", series: [line("loss", "", "third")] }),
};

export function drawLearning(data) {
  const spans = data.rounds;
  const limits = { logratios: [
    { value: data.limits.chosen_drop, label: `tripwire for chosen (${data.limits.chosen_drop})`, colour: "ink" },
    { value: data.limits.rejected_floor, label: `floor for rejected (${data.limits.rejected_floor})`, colour: "second", far: true }] };
  for (const [name, columns] of Object.entries(data.plots)) {
    if (name === "margin" && columns.margin) {
      const spread = columns.margin_std ?? [];
      columns.margin_low = columns.margin.map((value, i) => (value === null ? null : value - (spread[i] ?? 0)));
      columns.margin_high = columns.margin.map((value, i) => (value === null ? null : value + (spread[i] ?? 0)));
    }
    plots[name].update(columns, { spans, limits: columns.x.length ? limits[name] : [] });
  }
  plots.supervised.update(data.supervised);
}

const over = byId("speed-body");
const minutes = (title, unit, key, colour = "first") => new Plot(over, {
  title, unit, xLabel: "minutes", height: 150, series: [line(key, "", colour)],
});
const speeds = {
  env_steps_per_s: minutes("Simulator", "env steps per second", "env_steps_per_s"),
  act_ms: minutes("Decision latency", "ms a batch", "act_ms"),
  batch_fill: minutes("Batch fill", "decisions a batch", "batch_fill"),
  staleness: minutes("Staleness", "versions behind", "staleness", "second"),
};

export function drawSpeed(data) {
  for (const [key, plot] of Object.entries(speeds)) plot.update({ ...data[key], x: data[key].x.map((x) => x / 60) });
}

const KINDS = [
  ["mixed", "both outcomes: can pair"], ["states_all_success", "only successes"],
  ["states_all_failure", "only failures"], ["states_unpairable_other", "only faults"],
];
const ROUNDS = 24;

export function drawPairs({ rounds }) {
  const body = byId("pairs-body");
  if (!rounds.length) return body.replaceChildren(h("p", { class: "none" }, "No round has mined pairs yet"));
  const shown = rounds.slice(-ROUNDS).reverse();
  const most = Math.max(...shown.map((round) => round.states ?? 0), 1);
  const used = KINDS.filter(([key]) => shown.some((round) => parts(round)[key]));
  body.replaceChildren(
    h("ul", { class: "legend" }, used.map(([key, text]) => h("li", {}, h("span", { class: `swatch ${key}` }), text))),
    h("table", { class: "bars" },
      h("thead", { class: "hidden" }, h("tr", {}, ["round", "initial states", "pairs"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, shown.map((round) => {
        const each = parts(round);
        const words = used.map(([key, text]) => `${each[key]} ${text}`).join(", ");
        const bar = h("div", { class: "bar", role: "img", "aria-label": words, title: words }, used.map(([key]) => {
          const part = h("span", { class: key }, each[key] >= most * 0.08 ? String(each[key]) : "");
          part.style.width = `${(100 * each[key]) / most}%`;
          return part;
        }));
        return h("tr", {}, h("th", { scope: "row" }, `round ${round.round}`), h("td", {}, bar),
          h("td", { class: "figures" }, count(round.pairs ?? 0, "pair"), h("small", {}, besides(round))));
      }))));
  if (rounds.length > shown.length) body.append(h("p", { class: "note" }, `The latest ${shown.length} of ${rounds.length} rounds.`));
}

function parts(round) {
  const alike = (round.states_all_success ?? 0) + (round.states_all_failure ?? 0) + (round.states_unpairable_other ?? 0);
  return { ...round, mixed: Math.max((round.states ?? 0) - alike, 0) };
}

const besides = (round) => [["stale", round.stale], ["faulty", round.faults], ["not finite", round.non_finite]]
  .filter(([, number]) => number).map(([word, number]) => ` ${short(number)} ${word}`).join(",");
