// A success and a failure from one initial state, in step. Stills on a canvas: no codec, the same in every browser.
import { byId, choices, h, say, taskName } from "/static/dom.js";

const FRAME_MS = 180;
const HOLD_FRAMES = 6;
const picker = byId("contrast-pick");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let latest = [];
let shown = "";
let player = null;

picker.addEventListener("change", () => show(picker.value));

export function drawContrast(data) {
  latest = data.latest;
  choices(picker, latest.map((one) => [keyOf(one), `${taskName(one)}, state ${one.init_state}, v${one.version}`]));
  picker.parentElement.hidden = latest.length < 2;
  if (!latest.length) {
    byId("contrast-body").replaceChildren(h("p", { class: "none" }, "No task has both a success and a failure from one initial state yet"));
    return;
  }
  // While somebody looks at a pair it stays; one that was never chosen gives way to the latest.
  if (!player || !player.touched) picker.value = keyOf(latest[0]);
  show(picker.value);
}

const keyOf = (one) => `${one.success} ${one.failure}`;

async function show(key) {
  const one = latest.find((contrast) => keyOf(contrast) === key);
  if (!one || key === shown) return;
  shown = key;
  try {
    const sides = await Promise.all([load(one.success), load(one.failure)]);
    if (shown === key) start(one, sides);
  } catch (error) {
    shown = "";
    byId("contrast-body").replaceChildren(h("p", { class: "none" }, `The stored episodes cannot be shown: ${error.message}`));
  }
}

async function load(id) {
  const answer = await fetch(`/api/sheet/${id}`);
  if (!answer.ok) throw new Error((await answer.text()).trim());
  const picture = new Image();
  picture.src = `/api/sheet/${id}.jpg`;
  await picture.decode();
  return { ...(await answer.json()), picture };
}

function start(one, sides) {
  const playing = player ? player.playing : !calm.matches;
  const camera = player?.camera ?? 0;
  player?.stop();
  player = new Player(one, sides, { playing, camera });
}

class Player {
  constructor(one, sides, { playing, camera }) {
    Object.assign(this, { sides, camera, playing, at: 0, touched: false });
    this.length = Math.max(...sides.map((side) => side.steps.length)) + HOLD_FRAMES;
    this.canvases = sides.map((side) => h("canvas", { width: side.size, height: side.size, "aria-hidden": "true" }));
    this.captions = sides.map(() => h("span", {}));
    this.button = h("button", { type: "button", onclick: () => this.toggle() });
    this.lens = h("button", { type: "button", class: "quiet", onclick: () => this.swap() });
    this.slider = h("input", { type: "range", min: 0, max: this.length - 1, value: 0, "aria-label": "Moment of both episodes", oninput: () => this.seek() });
    const frames = ["good", "poor"].map((kind, index) => h("figure", { class: `side ${kind}` },
      h("figcaption", {}, h("strong", {}, kind === "good" ? "✓ success" : "✕ failure"), " ", this.captions[index]), this.canvases[index]));
    byId("contrast-body").replaceChildren(
      h("p", { class: "instruction" }, `“${sides[0].instruction}”`),
      h("div", { class: "sides" }, frames), h("div", { class: "controls" }, this.button, this.slider, this.lens),
      h("p", { class: "note" }, `${taskName(one)}, initial state ${one.init_state}, both under version ${one.version}: the sampling alone differs.`));
    this.label();
    this.draw();
    this.timer = setInterval(() => this.playing && !document.hidden && this.step(), FRAME_MS);
  }

  stop() { clearInterval(this.timer); }

  toggle() {
    this.playing = !this.playing;
    this.touched = true;
    this.label();
  }

  swap() {
    this.camera = 1 - this.camera;
    this.label();
    this.draw();
  }

  seek() {
    this.at = Number(this.slider.value);
    this.playing = false;
    this.touched = true;
    this.label();
    this.draw();
  }

  step() {
    this.at = (this.at + 1) % this.length;
    this.slider.value = this.at;
    this.draw();
  }

  label() {
    say(this.button, this.playing ? "❚❚ Pause" : "► Play");
    say(this.lens, this.camera ? "Wrist camera" : "Scene camera");
    this.lens.setAttribute("aria-label", `Showing the ${this.camera ? "wrist" : "scene"} camera; press for the other`);
  }

  draw() {
    this.sides.forEach((side, index) => {
      const still = Math.min(this.at, side.steps.length - 1);
      const rows = Math.ceil(side.steps.length / side.columns);
      const [x, y] = [still % side.columns, Math.floor(still / side.columns) + this.camera * rows];
      this.canvases[index].getContext("2d").drawImage(side.picture, x * side.size, y * side.size, side.size, side.size, 0, 0, side.size, side.size);
      const over = this.at >= side.steps.length;
      this.canvases[index].classList.toggle("over", over);
      say(this.captions[index], over ? `ended after ${side.env_steps} steps` : `step ${side.steps[still]} of ${side.env_steps}`);
    });
  }
}
