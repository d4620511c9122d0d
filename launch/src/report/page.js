"use strict";
(() => {
  const { charts } = JSON.parse(document.getElementById("curves").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT] = [480, 250];
  const edge = { left: 52, right: 22, top: 8, bottom: 24 };
  const state = { axis: "step", log: false, smooth: true, hidden: new Set() };
  const colour = (run) => `var(--run-${run % 8})`;
  const dash = (run) => ["", "6 3", "2 3"][Math.floor(run / 8) % 3];

  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent?.append(element);
    return element;
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e");
    if (size >= 1000) return Math.round(value).toLocaleString("en-US");
    return String(Number(value.toPrecision(4)));
  };
  // an exponential mean, for eyes only: tables and tooltips without it have the values themselves
  const smoothed = (values) => {
    const weight = 2 / (1 + Math.max(1, values.length / 40));
    let mean = values[0];
    return values.map((value) => (mean += weight * (value - mean)));
  };
  const ticks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const width = [1, 2, 5, 10].map((factor) => factor * power).find((width) => width >= raw);
    const found = [];
    for (let tick = Math.ceil(low / width) * width; tick <= high + width * 1e-9; tick += width) found.push(tick);
    return found;
  };

  const draw = (figure, chart) => {
    figure.querySelector("svg")?.remove();
    const note = figure.querySelector("figcaption span");
    note.textContent = "";
    const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": chart.title });
    figure.append(svg);
    const shown = chart.series.filter((series) => !state.hidden.has(series.run)).map((series) => {
      const raw = series.value;
      const value = state.smooth && chart.noisy ? smoothed(raw) : raw;
      return { ...series, x: series[state.axis], value };
    });
    const positive = shown.every((series) => series.value.every((value) => value > 0));
    const log = state.log && positive && shown.length > 0;
    const scale = log ? Math.log10 : (value) => value;
    const xs = shown.flatMap((series) => [series.x[0], series.x.at(-1)]);
    const ys = shown.flatMap((series) => series.value.map(scale));
    if (ys.length === 0) return;
    let [left, right] = [Math.min(...xs), Math.max(...xs)];
    let low = ys.reduce((a, b) => Math.min(a, b)), high = ys.reduce((a, b) => Math.max(a, b));
    if (right <= left) [left, right] = [left - 0.5, right + 0.5];
    const room = high > low ? 0.05 * (high - low) : 0.5 * Math.abs(high) || 1;
    [low, high] = [low - room, high + room];
    const px = (x) => edge.left + ((x - left) / (right - left)) * (WIDTH - edge.left - edge.right);
    const py = (y) => HEIGHT - edge.bottom - ((scale(y) - low) / (high - low)) * (HEIGHT - edge.top - edge.bottom);
    for (const tick of ticks(low, high, 5)) {
      const value = log ? 10 ** tick : tick;
      const y = py(value);
      make("line", { class: "grid", x1: edge.left, x2: WIDTH - edge.right, y1: y, y2: y }, svg);
      make("text", { x: edge.left - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = short(value);
    }
    for (const tick of ticks(left, right, 5)) {
      make("text", { x: px(tick), y: HEIGHT - 8, "text-anchor": "middle" }, svg).textContent = short(tick);
    }
    for (const series of shown) {
      const points = series.x.map((x, at) => `${px(x).toFixed(1)},${py(series.value[at]).toFixed(1)}`).join(" ");
      const style = `stroke:${colour(series.run)};stroke-dasharray:${dash(series.run)}`;
      make("polyline", { class: "line", points, style }, svg);
      if (chart.marked || series.x.length === 1) {
        series.x.forEach((x, at) => {
          make("circle", { cx: px(x), cy: py(series.value[at]), r: 2.6, style: `fill:${colour(series.run)}` }, svg);
        });
      }
      for (const { at, text } of series.events) {
        const [x, y] = [px(series.x[at]), py(series.value[at])];
        const mark = make("path", { d: `M${x - 4},${y - 9} h8 l-4,7 z`, style: `fill:${colour(series.run)}` }, svg);
        make("title", {}, mark).textContent = text;
      }
    }
    const cross = make("line", { class: "cross", y1: edge.top, y2: HEIGHT - edge.bottom, visibility: "hidden" }, svg);
    const nearest = (xs, x) => {
      let [from, to] = [0, xs.length - 1];
      while (to - from > 1) {
        const middle = (from + to) >> 1;
        if (xs[middle] < x) from = middle; else to = middle;
      }
      return Math.abs(xs[from] - x) <= Math.abs(xs[to] - x) ? from : to;
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * WIDTH;
      const x = left + ((at - edge.left) / (WIDTH - edge.left - edge.right)) * (right - left);
      if (x < left || x > right) return;
      cross.setAttribute("x1", at);
      cross.setAttribute("x2", at);
      cross.setAttribute("visibility", "visible");
      note.replaceChildren(`${short(x)}: `);
      for (const series of shown) {
        const value = document.createElement("b");
        value.style.color = colour(series.run);
        value.textContent = ` ${short(series.value[nearest(series.x, x)])}`;
        note.append(value);
      }
    });
    svg.addEventListener("pointerleave", () => {
      cross.setAttribute("visibility", "hidden");
      note.textContent = "";
    });
  };

  const place = document.querySelector(".charts");
  const figures = charts.map((chart) => {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.append(chart.title, document.createElement("span"));
    figure.append(caption);
    place.append(figure);
    return figure;
  });
  const drawAll = () => charts.forEach((chart, at) => draw(figures[at], chart));
  const on = (selector, change) => {
    for (const input of document.querySelectorAll(selector)) {
      input.addEventListener("change", () => {
        change(input);
        drawAll();
      });
    }
  };
  on("input[name=axis]", (input) => (state.axis = input.value));
  on("#log", (input) => (state.log = input.checked));
  on("#smooth", (input) => (state.smooth = input.checked));
  on("input[data-run]", (input) => {
    const run = Number(input.dataset.run);
    if (input.checked) state.hidden.delete(run); else state.hidden.add(run);
  });
  drawAll();
})();
