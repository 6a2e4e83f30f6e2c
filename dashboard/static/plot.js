// One line plot: drawn when it comes into view, redrawn in the theme's colours, read out by keyboard, and a table besides.
import uPlot from "/static/vendor/uPlot.js";
import { h, say, short } from "/static/dom.js";

const DASHES = { solid: [], dashed: [7, 4], dotted: [2, 3] };
const TABLE_ROWS = 40;
const plots = new Set();

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const seen = new IntersectionObserver(
  (entries) => entries.forEach((entry) => entry.target.plot.show(entry.isIntersecting)),
  { rootMargin: "200px" },
);
const sized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.plot.resize()));

/** Draws every plot anew: the theme has changed. */
export const redrawAll = () => plots.forEach((plot) => plot.rebuild());

export class Plot {
  /**
   * series: [{key, label, colour, dash, points, band: [lowKey, highKey]}]; keys name columns of the data.
   * limits: [{value, label, colour}]; range: [low, high] fixed, else by the data and the limits.
   */
  constructor(parent, { title, unit = "", xLabel, series, range = null, height = 190, xValues = short, values = short }) {
    Object.assign(this, { title, unit, xLabel, series, range, height, xValues, values });
    this.data = { x: [] };
    this.limits = [];
    this.spans = [];
    this.visible = false;
    this.area = h("div", {
      class: "plot-area", tabindex: 0, role: "img",
      onkeydown: (event) => this.walk(event), onblur: () => this.read(null),
    });
    this.area.plot = this;
    this.out = h("p", { class: "readout", "aria-live": "polite" });
    this.legend = h("ul", { class: "legend" });
    this.table = h("details", { class: "numbers", ontoggle: () => this.fillTable() }, h("summary", {}, "Numbers"));
    parent.append(h("figure", { class: "plot" },
      h("figcaption", {}, h("strong", {}, title), unit ? h("span", { class: "unit" }, ` ${unit}`) : null),
      this.legend, this.area, h("div", { class: "under" }, this.out, this.table)));
    plots.add(this);
    seen.observe(this.area);
    sized.observe(this.area);
    this.drawLegend();
  }

  show(visible) {
    this.visible = visible;
    if (visible && this.stale !== false) this.draw();
  }

  /** data: {x: [...], key: [...]}, columns as the server thinned them. */
  update(data, { limits = [], spans = [] } = {}) {
    Object.assign(this, { data, limits, spans, stale: true });
    this.read(null);
    if (this.visible) this.draw();
    if (this.table.open) this.fillTable();
  }

  present() {
    return this.series.filter((one) => this.data[one.key]);
  }

  drawLegend() {
    const named = this.present().filter((one) => one.label);
    const items = (named.length > 1 || named.some((one) => one.band) ? named : []).map((one) =>
      h("li", {}, h("span", { class: `stroke ${one.dash ?? "solid"} ${one.colour}` }), one.label));
    for (const limit of this.limits) items.push(h("li", {}, h("span", { class: `stroke dotted ${limit.colour}` }), limit.label));
    if (this.legend.childElementCount !== items.length || this.legend.textContent !== items.map((i) => i.textContent).join(""))
      this.legend.replaceChildren(...items);
  }

  describe() {
    const parts = this.present().map((one) => {
      const column = this.data[one.key];
      const last = column.findLast((value) => value !== null);
      return `${one.label || this.title} ${this.values(last)}`;
    });
    const where = this.data.x.length ? `latest at ${this.xLabel} ${this.xValues(this.data.x.at(-1))}: ${parts.join(", ")}` : "nothing recorded";
    return `${this.title}${this.unit ? `, ${this.unit}` : ""}; ${where}. Left and right arrows read values.`;
  }

  columns() {
    const columns = [this.data.x];
    for (const one of this.present()) {
      columns.push(this.data[one.key]);
      if (one.band) columns.push(this.data[one.band[0]], this.data[one.band[1]]);
    }
    return columns;
  }

  draw() {
    this.stale = false;
    this.drawLegend();
    this.area.setAttribute("aria-label", this.describe());
    const shape = this.present().map((one) => one.key).join();
    const empty = !shape || !this.data.x.length;
    this.area.classList.toggle("empty", empty);
    if (empty) return this.clear();
    if (this.plot && this.shape === shape) this.plot.setData(this.columns());
    else this.build(shape);
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.area.replaceChildren(h("p", {}, "Nothing recorded"));
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    this.stale = true;
    if (this.visible) this.draw();
  }

  resize() {
    const width = Math.floor(this.area.clientWidth);
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
  }

  build(shape) {
    this.clear();
    this.area.replaceChildren();
    this.shape = shape;
    const series = [{}];
    const bands = [];
    for (const one of this.present()) {
      const stroke = colour(one.colour);
      const pointed = one.points || this.data.x.length < 25;
      series.push({ stroke, width: 1.75, dash: DASHES[one.dash ?? "solid"], spanGaps: true,
        points: { show: pointed, size: one.points ? 7 : 4, fill: one.dash ? colour("card") : stroke } });
      if (!one.band) continue;
      const at = series.length;
      series.push({ stroke: "transparent", points: { show: false }, spanGaps: true }, { stroke: "transparent", points: { show: false }, spanGaps: true });
      bands.push({ series: [at + 1, at], fill: `${stroke}2b` });
    }
    const axis = { stroke: colour("soft"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    this.plot = new uPlot({
      width: Math.floor(this.area.clientWidth) || 300, height: this.height, series, bands, padding: [8, 10, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 8 }, y: false },
      scales: { x: { time: false, range: (_, low, high) => (low === high ? [low - 0.5, high + 0.5] : [low, high]) }, y: { range: (_, low, high) => this.span(low, high) } },
      axes: [
        { ...axis, grid: { show: false }, label: this.xLabel, labelSize: 16, labelFont: "11px system-ui, sans-serif", size: 24, values: (_, ticks) => ticks.map(this.xValues) },
        { ...axis, size: 46, values: (_, ticks) => ticks.map(this.values) },
      ],
      hooks: { drawAxes: [(plot) => this.backdrop(plot)], setCursor: [(plot) => this.read(plot.cursor.idx)] },
    }, this.columns(), this.area);
    // uPlot's own elements say nothing to a screen reader that the label and the table do not say better.
    this.plot.root.setAttribute("aria-hidden", "true");
  }

  span(low, high) {
    if (this.range) return this.range;
    for (const { value, far } of this.limits) if (!far) [low, high] = [Math.min(low ?? value, value), Math.max(high ?? value, value)];
    const margin = 0.08 * (high - low) || Math.abs(high) * 0.1 || 0.5;
    return [low === 0 ? 0 : low - margin, high + margin];
  }

  /** Rounds that were refused, where rounds begin, and the limits: below the lines. */
  backdrop(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    for (const { from, to, fate } of this.spans) {
      const [left, right] = [from, to].map((x) => plot.valToPos(x, "x", true));
      if (right < bbox.left) continue;
      if (["tripped", "rolled_back", "refused"].includes(fate)) {
        ctx.fillStyle = `${colour("bad")}26`;
        ctx.fillRect(left, bbox.top, right - left, bbox.height);
        ctx.fillStyle = colour("bad");
        ctx.fillText(fate === "tripped" ? "▲" : "▼", (left + right) / 2 - 4, bbox.top + 12 * devicePixelRatio);
      }
      if (this.spans.length <= 60 && left > bbox.left) this.line(ctx, [left, bbox.top, left, bbox.top + bbox.height], colour("line"), [4, 4]);
    }
    for (const { value, colour: name } of this.limits) {
      const y = plot.valToPos(value, "y", true);
      this.line(ctx, [bbox.left, y, bbox.left + bbox.width, y], colour(name), [2, 3]);
    }
    ctx.restore();
  }

  line(ctx, [x0, y0, x1, y1], stroke, dash) {
    ctx.strokeStyle = stroke;
    ctx.lineWidth = 1.25 * devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.beginPath();
    ctx.moveTo(x0, y0);
    ctx.lineTo(x1, y1);
    ctx.stroke();
  }

  walk(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.plot) return;
    event.preventDefault();
    const last = this.data.x.length - 1;
    const at = Math.min(Math.max((this.at ?? last + (step < 0 ? 1 : 0)) + step, 0), last);
    this.plot.setCursor({ left: this.plot.valToPos(this.data.x[at], "x"), top: 10 });
    this.read(at);
  }

  read(index) {
    this.at = index ?? null;
    if (index === null || index === undefined || index >= this.data.x.length) return say(this.out, "");
    const values = this.present().map((one) => `${one.label || this.title} ${this.values(this.data[one.key][index])}`);
    say(this.out, `${this.xLabel} ${this.xValues(this.data.x[index])}: ${values.join(", ")}`);
  }

  fillTable() {
    this.table.querySelector("div")?.remove();
    if (!this.table.open) return;
    const shown = this.present();
    const rows = this.data.x.map((x, index) => [x, index]).slice(-TABLE_ROWS).reverse();
    this.table.append(h("div", { class: "scroll" }, h("table", {},
      h("caption", { class: "hidden" }, this.title),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, this.xLabel), shown.map((one) => h("th", { scope: "col" }, one.label || this.title)))),
      h("tbody", {}, rows.map(([x, index]) => h("tr", {}, h("td", {}, this.xValues(x)), shown.map((one) => h("td", {}, this.values(this.data[one.key][index])))))),
    )));
  }
}
