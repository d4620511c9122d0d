// Line charts as SVG: a faint line of what was measured, a strong one that smooths it, and the extent of each point.

import { decades, number, tick, ticks } from "./format.js";

const NAMES = ["", "second", "third", "fourth"];
const MARGIN = { left: 46, right: 10, top: 8, bottom: 20 };
/** Of a line with many points, so many of them are smoothed over. */
const SMOOTHED_SHARE = 25;

function svg(tag, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function html(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

/** The mean of each value and its neighbours, `over` of them in all; at an end of those that there are. */
export function smooth(values, over) {
  const reach = Math.ceil(over / 2);
  return values.map((value, at) => {
    if (value === null || value === undefined) return null;
    let sum = 0;
    let known = 0;
    for (let near = Math.max(0, at - reach); near <= Math.min(values.length - 1, at + reach); near += 1) {
      if (values[near] === null || values[near] === undefined) continue;
      sum += values[near];
      known += 1;
    }
    return sum / known;
  });
}

/**
 * Points of about equally many steps, at most `most`: the newest come one by one, and would stand denser than the others.
 * A mean weighs a point by its steps; extents stay.
 */
export function even({ first, last, series }, most) {
  const size = last.length;
  if (size <= most) return { first, last, series };
  const span = last[size - 1] - first[0] + 1;
  const groups = [];
  let before = -1;
  for (let at = 0; at < size; at += 1) {
    const place = Math.floor(((last[at] - first[0]) * most) / span);
    if (place === before) groups[groups.length - 1].end = at + 1;
    else groups.push({ start: at, end: at + 1 });
    before = place;
  }
  const mean = (values) => groups.map(({ start, end }) => {
    let sum = 0;
    let weight = 0;
    for (let at = start; at < end; at += 1) {
      if (values[at] === null || values[at] === undefined) continue;
      sum += values[at] * (last[at] - first[at] + 1);
      weight += last[at] - first[at] + 1;
    }
    return weight ? sum / weight : null;
  });
  const bestOf = (values, better) => groups.map(({ start, end }) => {
    const known = values.slice(start, end).filter((value) => value !== null && value !== undefined);
    return known.length ? known.reduce((one, other) => (better(other, one) ? other : one)) : null;
  });
  const columns = Object.entries(series).map(([name, column]) => {
    const min = bestOf(column.min ?? column.mean, (one, other) => one < other);
    const max = bestOf(column.max ?? column.mean, (one, other) => one > other);
    return [name, { mean: mean(column.mean), min, max }];
  });
  const ends = { first: groups.map(({ start }) => first[start]), last: groups.map(({ end }) => last[end - 1]) };
  return { ...ends, series: Object.fromEntries(columns) };
}

/** The least and greatest of what is drawn, with some air; `null` if there is nothing. */
function extent(lines, log) {
  let low = Infinity;
  let high = -Infinity;
  for (const line of lines) {
    for (const values of [line.mean, line.min ?? [], line.max ?? []]) {
      for (const value of values) {
        if (value === null || value === undefined || (log && value <= 0)) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
  }
  if (low > high) return null;
  if (log) return [low / 1.1, high * 1.1];
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low - air < 0 ? 0 : low - air, high + air];
}

/** The place of the value in `sorted` that is nearest to `wanted`. */
export function nearest(sorted, wanted) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}

/**
 * One chart. `options`: title, unit, smoothed (a strong line over the measured one), logs (it follows the log switch), dots
 * (its points are few, and each is seen). `pointed(step | null)` is told where a person looks.
 */
export class Chart {
  constructor(options, pointed) {
    this.options = options;
    this.pointed = pointed;
    this.root = html("figure", "chart");
    const caption = html("figcaption");
    this.value = html("output");
    this.value.setAttribute("aria-live", "off");
    caption.append(html("b", "", options.title), html("small", "", options.unit ?? ""), this.value);
    this.drawing = svg("svg", { role: "img", tabindex: "0" });
    this.nothing = html("p", "empty", options.nothing ?? "No step yet");
    this.legend = html("div", "legend");
    this.root.append(caption, this.nothing, this.drawing, this.legend);
    this.steps = [];
    this.lines = [];
    this.drawing.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.addEventListener("pointerleave", () => this.pointed(null));
    this.drawing.addEventListener("blur", () => this.pointed(null));
    this.drawing.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  /** `lines`: [{name, mean, min?, max?}], a value a step of `steps`. `marks`: steps where an epoch ends. */
  set(steps, lines, { log = false, marks = [] } = {}) {
    Object.assign(this, { steps, lines, log: log && this.options.logs, marks });
    this.draw();
  }

  point(event) {
    if (!this.scale || !this.steps.length) return;
    const box = this.drawing.getBoundingClientRect();
    this.pointed(this.steps[nearest(this.steps, this.scale.step(event.clientX - box.left))]);
  }

  key(event) {
    const stride = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.pointed(null);
    if (stride === undefined || !this.steps.length) return;
    event.preventDefault();
    const last = this.steps.length - 1;
    const at = this.looked === null || this.looked === undefined ? last : nearest(this.steps, this.looked);
    this.pointed(this.steps[Math.max(0, Math.min(last, at + stride))]);
  }

  /** Shows the value at a step, or the last one. */
  look(step) {
    this.looked = step;
    this.cross?.replaceChildren();
    if (!this.steps.length) {
      this.value.textContent = "";
      return;
    }
    const at = step === null || step === undefined ? this.steps.length - 1 : nearest(this.steps, step);
    const shown = this.lines.map((line) => number(line.mean[at]));
    this.value.textContent = this.lines.length === 1 ? shown[0] : "";
    this.legend.querySelectorAll("span").forEach((entry, place) => {
      if (this.lines.length > 1) entry.textContent = `${this.lines[place].name} ${shown[place]}`;
    });
    if (step === null || step === undefined || !this.scale || !this.cross) return;
    const x = this.scale.x(this.steps[at]);
    this.cross.append(svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.scale.bottom }));
    this.lines.forEach((line, place) => {
      const value = line.mean[at];
      if (value === null || value === undefined || (this.log && value <= 0)) return;
      this.cross.append(svg("circle", { class: `dot ${NAMES[place]}`, cx: x, cy: this.scale.y(value), r: 3.5 }));
    });
  }

  draw() {
    const range = this.steps.length ? extent(this.lines, this.log) : null;
    this.nothing.hidden = range !== null;
    this.drawing.toggleAttribute("hidden", range === null);
    this.drawing.style.display = range === null ? "none" : "";
    const several = this.lines.length > 1;
    this.legend.replaceChildren(
      ...(several ? this.lines : []).map((line, place) => {
        const entry = html("div");
        entry.append(html("i", NAMES[place]), html("span", "", line.name));
        return entry;
      }),
    );
    if (range === null) return this.look(null);
    const { clientWidth: width, clientHeight: height } = this.drawing;
    if (!width || !height) return;
    const [low, high] = range;
    const first = this.steps[0];
    const last = Math.max(this.steps[this.steps.length - 1], first + 1);
    const bottom = height - MARGIN.bottom;
    const across = width - MARGIN.left - MARGIN.right;
    const high01 = this.log
      ? (value) => (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low))
      : (value) => (value - low) / (high - low);
    const x = (step) => MARGIN.left + ((step - first) / (last - first)) * across;
    const y = (value) => bottom - high01(value) * (bottom - MARGIN.top);
    this.scale = { x, y, bottom, step: (left) => first + ((left - MARGIN.left) / across) * (last - first) };

    const parts = [];
    for (const value of this.log ? decades(low, high, 3) : ticks(low, high, 3)) {
      parts.push(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      const label = svg("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" });
      label.textContent = tick(value);
      parts.push(label);
    }
    for (const mark of this.marks.filter((mark) => mark > first && mark < last)) {
      parts.push(svg("line", { class: "epoch", x1: x(mark), x2: x(mark), y1: MARGIN.top, y2: bottom }));
    }
    const below = ticks(first, last, Math.max(2, Math.floor(across / 90))).filter(Number.isInteger);
    for (const step of below) {
      const label = svg("text", { x: Math.min(x(step), width - 14), y: height - 5, "text-anchor": "middle" });
      label.textContent = tick(step);
      parts.push(label);
    }
    this.lines.forEach((line, place) => parts.push(...this.path(line, place)));
    this.cross = svg("g");
    this.drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.drawing.replaceChildren(...parts, this.cross);
    const told = this.lines.map((line) => `${line.name} ${number(line.mean[this.steps.length - 1])}`).join(", ");
    this.drawing.setAttribute("aria-label", `${this.options.title}, steps ${first} to ${last}; at the end: ${told}. Arrow keys read single points.`);
    this.look(this.looked);
  }

  path(line, place) {
    const { x, y } = this.scale;
    const visible = (value) => value !== null && value !== undefined && (!this.log || value > 0);
    const through = (values) => {
      let text = "";
      let pen = false;
      values.forEach((value, at) => {
        if (visible(value)) text += `${pen ? "L" : "M"}${x(this.steps[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = visible(value);
      });
      return text;
    };
    const parts = [];
    if (line.min && line.max) {
      const above = this.steps.map((step, at) => [step, line.max[at]]).filter(([, value]) => visible(value));
      const under = this.steps.map((step, at) => [step, line.min[at]]).filter(([, value]) => visible(value));
      const corners = [...above, ...under.reverse()].map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
      if (corners.length > 2) parts.push(svg("path", { class: "band", d: `M${corners.join("L")}Z` }));
    }
    const over = Math.floor(this.steps.length / SMOOTHED_SHARE);
    if (this.options.smoothed && over > 1) {
      parts.push(svg("path", { class: "raw", d: through(line.mean) }));
      parts.push(svg("path", { class: `line ${NAMES[place]}`, d: through(smooth(line.mean, over)) }));
    } else {
      parts.push(svg("path", { class: `line ${NAMES[place]}`, d: through(line.mean) }));
    }
    if (this.options.dots || this.steps.length === 1) {
      this.steps.forEach((step, at) => {
        if (visible(line.mean[at])) parts.push(svg("circle", { class: `dot ${NAMES[place]}`, cx: x(step), cy: y(line.mean[at]), r: 3 }));
      });
    }
    return parts;
  }
}
