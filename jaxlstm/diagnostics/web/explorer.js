// The heat map is an image of one pixel per unit and step; charts are drawn by uPlot (MIT License), which is in the page.
"use strict";

// Color maps as 17 colors: cividis (Nuñez, Anderton & Renslow 2018) for values from 0, PuOr (ColorBrewer) on a light
// page and berlin (Crameri 2018) on a dark one for values of either sign. Their zero has the color of the page.
const MAPS = {
  cividis: "00224e002e6a1a386f32436d434e6c535a6d61656f6f70737d7c788c88789b9476aba072bcae6ccdbb63dec958f0d846fee838",
  puor: "2d004b4518715f3a917b6aa89990bfb7b1d5cfcfe5e4e5f0f7f7f6fce8cdfed59ffdbc6bee9b39d97b12bd61099e4c077f3b08",
  berlin: "9eb0ff79abed519fd33685ad2868861d4b6114303e111a20190c092b0e014112015b1d087d341e9e513fbe6f63df8f89ffadad",
};
const BYTES = { uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, float32: Float32Array, float16: Uint16Array };
const MARGIN = { left: 60, right: 4 }; // of the heat map and the strips below it
const DECADES = 4; // of gradients that are drawn
const MAX_MATCHES = 20, MAX_UNITS = 40; // in the lists
const $ = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const dark = matchMedia("(prefers-color-scheme: dark)");

let head, data, numSteps, numUnits, hasWords; // hasWords: labels of more than one character
const view = {
  values: "", order: "index", span: 200, first: 0, shade: "values", threshold: 0.3,
  pinned: { step: 0, unit: 0 }, hovered: null, range: null,
};
let order = [], rank = [], active = [], matches = [], tints = {}, image = null, imageKey = "", strips = [];

// ---- Data

async function load() {
  head = JSON.parse($("header").textContent);
  const packed = Uint8Array.from(atob($("arrays").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  data = {};
  let offset = 0;
  for (const [name, [type, shape]] of Object.entries(head.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1) * BYTES[type].BYTES_PER_ELEMENT;
    const raw = new BYTES[type](buffer.slice(offset, offset + size));
    data[name] = type === "float16" ? Float32Array.from(raw, halfToNumber) : raw;
    offset += size;
  }
  numSteps = head.labels.length;
  hasWords = head.labels.some((label) => [...label].length > 1);
  numUnits = head.arrays[Object.keys(head.values)[0]][1][0];
}

function halfToNumber(bits) {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24;
}

const isSigned = (name) => "scale " + name in data;

// In units of the scale: 0 to 1 for a gate, -1 to 1 for other values.
function relative(name, step, unit) {
  const part = data[name][unit * numSteps + step] / head.levels;
  return isSigned(name) ? 2 * part - 1 : part;
}

const scaleOf = (name, unit) => (isSigned(name) ? data["scale " + name][unit] : 1);
const value = (name, step, unit) => relative(name, step, unit) * scaleOf(name, unit);

// A value with the digits that its rounding to levels leaves.
function formatValue(name, step, unit) {
  const spacing = ((isSigned(name) ? 2 : 1) * scaleOf(name, unit)) / head.levels, x = value(name, step, unit);
  if (spacing < 1e-4) return format(x);
  return decimals(x, Math.abs(x) >= 100 ? 0 : clamp(Math.round(-Math.log10(spacing / 2)), 0, 2));
}

// Number of steps before each loss at which its gradient is computed.
function gradientReach() {
  return head.arrays.gradients[1][1];
}

// Norm of the gradient of the loss at `step` with respect to the state after step `before`.
function gradient(step, before) {
  const back = step - 1 - before;
  return back >= 0 && back < gradientReach() ? data.gradients[step * gradientReach() + back] * data.gradientScale[step] : 0;
}

const gradients = (step) => Array.from({ length: numSteps }, (_, before) => gradient(step, before));

// From 0 at 10^-DECADES times the largest gradient of the step, to 1 at the largest.
function gradientShades(step) {
  const norms = gradients(step), largest = Math.max(...norms);
  return norms.map((g) => (g > 0 ? clamp(1 + Math.log10(g / largest) / DECADES, 0, 1) : 0));
}

// ---- Order of the units

function correlations(name, signal) {
  const meanSignal = signal.reduce((a, b) => a + b, 0) / numSteps;
  const signalSquares = signal.reduce((a, b) => a + (b - meanSignal) ** 2, 0);
  return Array.from({ length: numUnits }, (_, unit) => {
    let sum = 0, squares = 0, products = 0;
    for (let t = 0; t < numSteps; t++) {
      const x = data[name][unit * numSteps + t];
      sum += x;
      squares += x * x;
      products += x * (signal[t] - meanSignal);
    }
    const scale = Math.sqrt((squares - (sum * sum) / numSteps) * signalSquares);
    return scale > 1e-9 ? products / scale : 0;
  });
}

function sortUnits() {
  const indices = Array.from({ length: numUnits }, (_, u) => u);
  const descending = (key) => indices.sort((a, b) => key[b] - key[a] || a - b);
  let note = "";
  if (view.order === "index") order = indices;
  else if (view.order === "clusters") order = Array.from(data.clusters);
  else if (view.order === "time constant") {
    order = descending(data.timeConstants);
    note = `time constant from ${format(data.timeConstants[order.at(-1)])} (bottom) to ${format(data.timeConstants[order[0]])} steps (top)`;
  } else {
    const found = correlations(view.values, data[view.order]);
    order = descending(found.map(Math.abs));
    note = `unit ${order[0]} on top: correlation ${decimals(found[order[0]], 2)}`;
  }
  rank = [];
  order.forEach((unit, row) => (rank[unit] = row));
  $("order-note").textContent = note;
  imageKey = "";
}

// ---- Search: the units that are active at every selected step, and the ranges of the same length where most are again

// +1 or -1 if a unit is at least `threshold` of its scale, else 0. The sign matters: a unit may count with either.
function activity(step, unit) {
  const x = relative(view.values, step, unit);
  return Math.abs(x) >= view.threshold - 1e-9 ? Math.sign(x) : 0;
}

function search() {
  active = [];
  matches = [];
  if (!view.range) return;
  const [from, to] = view.range, length = to - from + 1;
  for (let u = 0; u < numUnits; u++) {
    const sign = activity(from, u);
    let same = sign !== 0;
    for (let t = from + 1; t <= to && same; t++) same = activity(t, u) === sign;
    if ($("before").checked && from > 0) same &&= activity(from - 1, u) !== sign;
    if ($("after").checked && to < numSteps - 1) same &&= activity(to + 1, u) !== sign;
    if (same) active.push([u, sign]);
  }
  if (!active.length) return;
  const share = Array.from({ length: numSteps }, (_, t) => active.filter(([u, sign]) => activity(t, u) === sign).length / active.length);
  const candidates = [];
  let sum = 0;
  for (let t = 0; t < numSteps; t++) {
    sum += share[t] - (t >= length ? share[t - length] : 0);
    if (t >= length - 1) candidates.push({ from: t - length + 1, to: t, share: sum / length });
  }
  candidates.sort((a, b) => b.share - a.share || a.from - b.from);
  const taken = [view.range];
  for (const place of candidates) {
    if (matches.length === MAX_MATCHES || place.share < 1e-9) break;
    if (taken.some(([a, b]) => place.from <= b && a <= place.to)) continue;
    taken.push([place.from, place.to]);
    matches.push(place);
  }
}

// ---- Colors

function buildTints() {
  const colors = (hex) => {
    const stops = hex.match(/../g).map((part) => parseInt(part, 16));
    return Array.from({ length: 256 }, (_, n) => {
      const at = (n / 255) * 16, low = Math.min(Math.floor(at), 15);
      return [0, 1, 2].map((c) => Math.round(stops[3 * low + c] + (at - low) * (stops[3 * low + 3 + c] - stops[3 * low + c])));
    });
  };
  const signed = colors(dark.matches ? MAPS.berlin : MAPS.puor);
  tints = { signed, gate: colors(MAPS.cividis), strength: Array.from({ length: 256 }, (_, n) => signed[128 + Math.floor(n / 2)]) };
  imageKey = "";
}

const tint = (map, part) => tints[map][Math.round(clamp(part, 0, 1) * 255)];
const mapOf = (name) => (isSigned(name) ? "signed" : "gate");
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawLegend(id, map) {
  const context = $(id).getContext("2d");
  for (let x = 0; x < 160; x++) {
    context.fillStyle = `rgb(${tint(map, x / 159)})`;
    context.fillRect(x, 0, 1, 1);
  }
}

// ---- Heat map and strips

function buildImage() {
  const key = [view.values, view.order, dark.matches].join();
  if (key === imageKey) return;
  imageKey = key;
  image = new OffscreenCanvas(numSteps, numUnits);
  const context = image.getContext("2d"), pixels = context.createImageData(numSteps, numUnits);
  const map = mapOf(view.values), source = data[view.values];
  const colors = Array.from({ length: head.levels + 1 }, (_, n) => tint(map, n / head.levels));
  for (let row = 0; row < numUnits; row++)
    for (let t = 0; t < numSteps; t++) {
      const color = colors[source[order[row] * numSteps + t]], at = 4 * (row * numSteps + t);
      pixels.data[at] = color[0];
      pixels.data[at + 1] = color[1];
      pixels.data[at + 2] = color[2];
      pixels.data[at + 3] = 255;
    }
  context.putImageData(pixels, 0, 0);
}

// Places of everything on the canvas of the heat map, in CSS pixels.
function layout() {
  const width = $("map").clientWidth, steps = Math.min(view.span, numSteps), top = 12;
  const heat = clamp(numUnits * 14, 140, Math.min(512, 0.6 * Math.max(innerHeight, 400)));
  return { width, steps, heat, top, height: top + heat + 20, cell: (width - MARGIN.left - MARGIN.right) / steps, row: heat / numUnits };
}

const SYMBOLS = { "\n": "↵", " ": "␣", "\t": "⇥", "": "∅" };
const hasNoWidth = (label) => /^[\p{M}\p{Cc}\p{Cf}\p{Z}]*$/u.test(label) && !/^[ \t]+$/.test(label);

// A label as it is seen alone: characters without width of their own by their numbers, marks on a circle.
function shownLabel(label) {
  if (Object.hasOwn(SYMBOLS, label)) return SYMBOLS[label];
  if (/^\p{M}+$/u.test(label)) return "◌" + label;
  return hasNoWidth(label) ? [...label].map((c) => "U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")).join(" ") : label;
}

// In quotation marks, apart from the direction of writing around it.
const quoted = (text) => `“\u2068${text}\u2069”`;
const joinLabels = (from, to) => head.labels.slice(Math.max(from, 0), to).map(shownLabel).join(hasWords ? " " : "");
const current = () => view.hovered ?? view.pinned;

function drawMap() {
  const parts = layout(), canvas = $("map"), ratio = devicePixelRatio || 1;
  canvas.style.height = parts.height + "px";
  canvas.width = Math.round(parts.width * ratio);
  canvas.height = Math.round(parts.height * ratio);
  const context = canvas.getContext("2d"), { step, unit } = current();
  context.scale(ratio, ratio);
  buildImage();
  const x = (t) => MARGIN.left + (t - view.first) * parts.cell;
  const inView = (t) => t >= view.first && t < view.first + parts.steps;
  const ink = css("--ink"), faint = css("--faint"), accent = css("--accent");
  context.imageSmoothingEnabled = parts.row < 1 || parts.cell < 1;
  context.drawImage(image, view.first, 0, parts.steps, numUnits, MARGIN.left, parts.top, parts.cell * parts.steps, parts.heat);

  context.save();
  context.beginPath();
  context.rect(MARGIN.left, 0, parts.cell * parts.steps, parts.height);
  context.clip();
  for (const place of matches) {
    context.fillStyle = accent;
    context.fillRect(x(place.from), 4, Math.max(2, (place.to - place.from + 1) * parts.cell), 5);
  }
  if (view.range) {
    const [from, to] = view.range, width = (to - from + 1) * parts.cell;
    context.fillStyle = css("--select");
    context.fillRect(x(from), 0, width, parts.height);
    context.strokeStyle = accent;
    context.lineWidth = 2;
    context.strokeRect(x(from), 1, width, parts.height - 2);
  }
  context.font = "13px ui-monospace, 'DejaVu Sans Mono', monospace";
  context.textAlign = "center";
  context.fillStyle = ink;
  if (parts.cell >= 8)
    for (let t = view.first; t < view.first + parts.steps; t++) {
      const label = shownLabel(head.labels[t]);
      if (context.measureText(label).width <= parts.cell + 2) context.fillText(label, x(t) + parts.cell / 2, parts.top + parts.heat + 15);
    }
  context.restore();

  if (inView(step)) {
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    context.strokeRect(x(step), parts.top, Math.max(2, parts.cell), parts.height - parts.top - 2);
  }
  context.strokeStyle = ink;
  context.strokeRect(MARGIN.left, parts.top + rank[unit] * parts.row, parts.cell * parts.steps, Math.max(2, parts.row));
  context.font = "12px system-ui, sans-serif";
  context.textAlign = "right";
  context.fillStyle = faint;
  context.fillText(String(unit), MARGIN.left - 5, clamp(parts.top + (rank[unit] + 0.5) * parts.row + 4, parts.top + 9, parts.top + parts.heat));
  const shown = `steps ${view.first} to ${view.first + parts.steps - 1} in view`;
  canvas.setAttribute("aria-label", `Heat map of ${head.values[view.values]}, ${plural(numUnits, "unit")} by ${plural(numSteps, "step")}, ${shown}`);
}

// ---- Charts

const powerOfTen = (exponent) => "10" + [...String(exponent)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("");

// Indices of the values without neighbors, which no line shows.
const isolated = (plot, n) => plot.data[n].flatMap((x, at, all) => (x !== null && (all[at - 1] ?? all[at + 1] ?? null) === null ? [at] : []));
const STEP_INTERVALS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].flatMap((n) => [n, 2 * n, 5 * n]); // between ticks

// Adds a chart to an element and returns how to show data in it: `show({ title, data, range, ticks })` with `data` as
// uPlot takes it, the range of the values, and their ticks as pairs of value and text.
function addChart(parent, { height, right, xRange, xTicks = true, log = false, series, bands = [], draw = () => {}, pick = null }) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  let shown = null;
  const axis = (options) => ({
    stroke: () => css("--faint"), font: "11px system-ui, sans-serif", grid: { show: false },
    ticks: { stroke: () => css("--line"), size: 4, width: 1 }, border: { show: true, stroke: () => css("--line"), width: 1 }, ...options,
  });
  // A label of the x axis that would be cut at the right is left out.
  const fits = (plot, x) => plot.valToPos(x, "x") + 3.5 * x.toLocaleString("en").length <= plot.bbox.width / devicePixelRatio + right;
  const make = () => new uPlot({
    width: figure.clientWidth, height, padding: [8, right, xTicks ? 0 : 8, 0], cursor: { show: false }, legend: { show: false },
    scales: { x: { time: false, range: xRange }, y: { distr: log ? 3 : 1, range: () => shown.range } },
    axes: [
      axis({ show: xTicks, size: 24, gap: 3, space: 60, incrs: STEP_INTERVALS, filter: (plot, steps) => steps.map((x) => (fits(plot, x) ? x : null)) }),
      axis({ size: MARGIN.left, gap: 3, splits: () => shown.ticks.map(([x]) => x), filter: (_, x) => x, values: () => shown.ticks.map(([, text]) => text) }),
    ],
    series: [{}, ...series.map((options) => ({ points: { show: Boolean(options.stroke), size: 5, fill: options.stroke, filter: isolated }, ...options }))],
    bands, hooks: { draw: [draw] },
  }, shown.data, figure);
  let plot = null;
  figure.append(caption);
  parent.append(figure);
  new ResizeObserver(() => plot?.setSize({ width: figure.clientWidth, height })).observe(figure);
  dark.addEventListener("change", () => plot?.redraw());
  return (content) => {
    shown = content;
    caption.textContent = content.title;
    if (plot) return plot.setData(content.data);
    plot = make();
    if (pick) plot.over.addEventListener("click", (event) => pick(plot.posToVal(event.offsetX, "x")));
  };
}

// What the strips below the heat map show: a bar for each step in view.
const STRIPS = {
  unit() {
    const { unit } = current(), name = view.values;
    const values = stepsInView().map((t) => value(name, t, unit));
    const high = isSigned(name) ? values.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-9) : 1, low = isSigned(name) ? -high : 0;
    return { title: `unit ${unit}: ${head.values[name]}`, values, range: [low, high], ticks: [low, (low + high) / 2, high] };
  },
  surprise() {
    const high = data.surprise.reduce((a, b) => Math.max(a, b), 1e-9);
    return { title: "surprise of each prediction, nats", values: stepsInView().map((t) => data.surprise[t]), range: [0, high], ticks: [0, high / 2, high] };
  },
  gradients() {
    const { step } = current(), norms = gradients(step);
    const high = norms.reduce((a, b) => Math.max(a, b), 0) || 1, low = high * 10 ** -DECADES;
    const title = `gradient of step ${step}’s loss, ${gradientReach()} steps back`;
    return { title, values: stepsInView().map((t) => norms[t] || null), range: [low, high], ticks: [low, Math.sqrt(low * high), high] };
  },
};
const stepsInView = () => Array.from({ length: layout().steps }, (_, n) => view.first + n);

const hasBars = () => layout().cell >= 4; // else the values are drawn as one area

function startStrips() {
  const names = Object.keys(STRIPS).filter((name) => name === "unit" || name in data);
  const separate = uPlot.paths.bars({ size: [1, Infinity, 1], gap: 1 }), joined = uPlot.paths.stepped({ align: 1 });
  const bars = { fill: () => css("--ink"), width: 0, paths: (...options) => (hasBars() ? separate : joined)(...options) };
  const xRange = () => [view.first - 0.5, view.first + layout().steps - 0.5];
  strips = names.map((name, n) => {
    const isLast = n === names.length - 1;
    const options = { height: isLast ? 84 : 64, right: MARGIN.right, xRange, xTicks: isLast, log: name === "gradients", series: [bars], draw: drawMarks };
    return { name, show: addChart($("strips"), options) };
  });
}

function drawStrips() {
  const titles = strips.map(({ name, show }) => {
    const { title, values, range, ticks } = STRIPS[name]();
    const area = [[...stepsInView(), view.first + values.length].map((t) => t - 0.5), [...values, values.at(-1)]];
    show({ title, data: hasBars() ? [stepsInView(), values] : area, range, ticks: ticks.map((x) => [x, format(x)]) });
    return title;
  });
  $("strips").setAttribute("aria-label", `Charts by step: ${titles.join("; ")}`);
}

// Draws the selected and the current step over a strip.
function drawMarks({ ctx, bbox, valToPos, scales }) {
  const x = (t) => valToPos(t - 0.5, "x", true), { step } = current();
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  if (scales.y.min < 0) {
    ctx.fillStyle = css("--faint");
    ctx.fillRect(bbox.left, valToPos(0, "y", true), bbox.width, devicePixelRatio);
  }
  const outline = (from, to, color) => {
    Object.assign(ctx, { strokeStyle: color, lineWidth: 1.5 * devicePixelRatio });
    ctx.strokeRect(x(from), bbox.top, Math.max(2, x(to + 1) - x(from)), bbox.height);
  };
  if (view.range) {
    const [from, to] = view.range;
    ctx.fillStyle = css("--select");
    ctx.fillRect(x(from), bbox.top, x(to + 1) - x(from), bbox.height);
    outline(from, to, css("--accent"));
  }
  if (hasBars()) outline(step, step, css("--ink"));
  else {
    ctx.fillStyle = css("--accent");
    ctx.fillRect((x(step) + x(step + 1)) / 2 - devicePixelRatio, bbox.top, 2 * devicePixelRatio, bbox.height);
  }
  ctx.restore();
}

// ---- Text

function buildText() {
  const text = $("text");
  text.classList.toggle("words", hasWords);
  head.labels.forEach((label, t) => {
    const span = document.createElement("span");
    span.dataset.step = t;
    if (hasNoWidth(label)) {
      const mark = document.createElement("i");
      mark.className = "mark";
      mark.textContent = shownLabel(label);
      span.append(mark);
      text.append(span, label === "\n" ? "\n" : hasWords ? " " : "");
    } else {
      span.textContent = label;
      text.append(span, hasWords ? " " : "");
    }
  });
}

// Black or white, whichever contrasts more with a color (relative luminance of WCAG 2).
function readableOn(color) {
  const [r, g, b] = Array.from(color, (part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function shadeText() {
  const { step, unit } = current(), spans = $("text").querySelectorAll("span[data-step]");
  const isMatch = new Uint8Array(numSteps);
  for (const place of matches) isMatch.fill(1, place.from, place.to + 1);
  let map = "strength", part, low = "0", high;
  if (view.shade === "surprise") {
    const largest = data.surprise.reduce((a, b) => Math.max(a, b), 1e-9);
    part = (t) => data.surprise[t] / largest;
    high = `${format(largest)} nats, surprise of the prediction at the step`;
  } else if (view.shade === "gradients") {
    const shades = gradientShades(step);
    part = (t) => (t < step - gradientReach() ? null : shades[t]);
    low = `at most 10⁻⁴`;
    high = `largest gradient of the loss at step ${step}; not computed further than ${gradientReach()} steps back`;
  } else {
    map = mapOf(view.values);
    const half = isSigned(view.values);
    part = (t) => (half ? (relative(view.values, t, unit) + 1) / 2 : relative(view.values, t, unit));
    low = half ? "−" + format(scaleOf(view.values, unit)) : "0";
    high = `${format(scaleOf(view.values, unit))}, ${head.values[view.values]} of unit ${unit}`;
  }
  spans.forEach((span, t) => {
    const value = part(t);
    const color = value === null ? null : tint(map, value);
    span.style.background = color && `rgb(${color})`;
    span.style.color = color && readableOn(color);
    const isSelected = view.range && t >= view.range[0] && t <= view.range[1];
    span.className = [value === null && "unknown", t === step && "now", isMatch[t] && "match", isSelected && "range"].filter(Boolean).join(" ");
  });
  drawLegend("text-scale", map);
  $("text-low").textContent = low;
  $("text-high").textContent = high;
}

// ---- Details

function format(x) {
  if (x === Infinity) return "∞";
  const size = Math.abs(x);
  const isFixed = size === 0 || (size >= 0.01 && size < 10000);
  return isFixed ? decimals(x, size >= 100 ? 0 : 2) : x.toExponential(1).replaceAll("-", "−");
}

function decimals(x, digits) {
  const text = x.toFixed(digits);
  return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
}

function describe() {
  const { step, unit } = current();
  let text = `Step ${step} of ${numSteps}, ${quoted(shownLabel(head.labels[step]))}. Unit ${unit}: ${head.values[view.values]} ${formatValue(view.values, step, unit)}`;
  if ("timeConstants" in data) text += `, time constant ${format(data.timeConstants[unit])} steps`;
  if ("surprise" in data) {
    const [first, target] = [data.topClasses[step * topSize()], data.targets[step]].map((n) => shownLabel(head.classes[n]));
    text += `. Most probable next: ${quoted(first)} ${percent(data.topProbabilities[step * topSize()])}; actual: ${quoted(target)}, surprise ${format(data.surprise[step])} nats`;
  }
  return text + ".";
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const topSize = () => head.arrays.topClasses[1][1];
const percent = (p) => (p === 0 ? "0" : p < 0.0005 ? "< 0.1" : (100 * p).toFixed(p < 0.0995 ? 1 : 0)) + "%";

function showDetails() {
  const { step, unit } = current();
  $("readout").textContent = describe();
  fillTable($("values"), `unit ${unit} at step ${step}`, Object.entries(head.values).map(([name, label]) => ({ cells: [label, formatValue(name, step, unit)] })));
  if (!("surprise" in data)) return;
  const rows = Array.from({ length: topSize() }, (_, n) => {
    const index = data.topClasses[step * topSize() + n], p = data.topProbabilities[step * topSize() + n];
    return { cells: [shownLabel(head.classes[index]), percent(p)], bar: p, target: index === data.targets[step] };
  });
  if (!rows.some((row) => row.target)) { // in place of the last one: another row would move the text under the pointer
    const p = Math.exp(-data.surprise[step]);
    rows[rows.length - 1] = { cells: [shownLabel(head.classes[data.targets[step]]), percent(p)], bar: p, target: true };
  }
  fillTable($("predictions"), "next; the actual one in bold", rows);
}

function fillTable(table, title, rows, columns = []) {
  const caption = document.createElement("caption");
  caption.textContent = title;
  const lines = rows.map(({ cells, bar, target }) => {
    const line = document.createElement("tr");
    line.className = target ? "target" : "";
    const [name, ...numbers] = cells;
    line.append(tableCell("th", name, "row"), ...numbers.map((text) => tableCell("td", text)));
    if (bar !== undefined) {
      const cell = document.createElement("td"), box = document.createElement("span");
      cell.className = "bar";
      box.style.width = 100 * bar + "%";
      cell.append(box);
      line.append(cell);
    }
    return line;
  });
  if (columns.length) {
    const line = document.createElement("tr");
    line.append(document.createElement("td"), ...columns.map((text) => tableCell("th", text, "col")));
    lines.unshift(line);
  }
  table.replaceChildren(caption, ...lines);
}

function tableCell(type, text, scope) {
  const cell = document.createElement(type);
  cell.textContent = text;
  if (scope) cell.scope = scope;
  return cell;
}

function showMatches() {
  const button = (content, action) => {
    const element = document.createElement("button");
    element.type = "button";
    element.append(...content);
    element.addEventListener("click", action);
    return element;
  };
  $("threshold-value").textContent = `${Math.round(100 * view.threshold)} %`;
  if (!view.range) $("found").textContent = "Select steps: drag over the text or the heat map, or hold Shift and press ← or →.";
  else {
    const [from, to] = view.range, text = joinLabels(from, to + 1);
    let result = `${active.length} of ${plural(numUnits, "unit")} active throughout`;
    if (!active.length) result += ". Lower the threshold, select fewer steps, or uncheck “not just before” and “not just after”.";
    else {
      if (active.length > MAX_UNITS) result += ` (the first ${MAX_UNITS} below)`;
      result += `, and again at ${plural(matches.length, "place")}${matches.length === MAX_MATCHES ? " or more" : ""}.`;
    }
    const characters = [...text];
    $("found").textContent = `Steps ${from} to ${to}, ${quoted(characters.length > 60 ? characters.slice(0, 60).join("") + "…" : text)}: ${result}`;
  }
  $("active").replaceChildren(...active.slice(0, MAX_UNITS).map(([u, sign]) => button([`${sign < 0 ? "−" : ""}${u}`], () => pin({ step: current().step, unit: u }))));
  $("active").setAttribute("aria-label", "Active units");
  $("matches").replaceChildren(
    ...matches.map((place) => {
      const mark = document.createElement("mark"), note = document.createElement("small"), line = document.createElement("li");
      const { from, to, share } = place, around = hasWords ? 4 : 16, gap = hasWords ? " " : "";
      mark.textContent = joinLabels(from, to + 1);
      note.textContent = `  step ${from}, ${percent(share)}`;
      const content = [joinLabels(from - around, from) + gap, mark, gap + joinLabels(to + 1, to + 1 + around), note];
      line.append(button(content, () => pin({ step: from, unit: current().unit })));
      return line;
    })
  );
}

// ---- Playback of the training

const training = { row: 0, side: "forward", timer: null, show: [] };
const sideOf = (row) => row.layer[training.side];
// Quantiles of the time constants: null in a row is infinite, or no number like those of the gates.
const timeConstants = (side) => {
  const isMissing = Object.values(side.gates).some((gate) => gate.quantiles.includes(null));
  return side.time_constants.map((x) => x ?? (isMissing ? null : Infinity));
};

// Charts of the playback: bands of quantiles over training, and the gradient at the chosen moment over the sample.
function panels() {
  const { rows } = head.training, now = sideOf(rows[training.row]), trained = rows.map((row) => row.step), result = [];
  const columns = (quantiles) => quantiles[0].map((_, n) => quantiles.map((values) => values[n]));
  for (const name of Object.keys(now.gates)) {
    const quantiles = rows.map((row) => sideOf(row).gates[name].quantiles);
    result.push({ title: head.values[name] ?? name, data: [trained, ...columns(quantiles)], range: [0, 1], ticks: [0, 0.5, 1].map((x) => [x, String(x)]) });
  }
  if (now.time_constants) {
    const quantiles = rows.map((row) => timeConstants(sideOf(row))), decades = wholeDecades(quantiles.flat().filter(isFinite));
    const drawn = quantiles.map((values) => values.map((x) => (x === Infinity ? 10 * decades.range[1] : x))); // above the chart
    result.push({ title: "time constants, steps", data: [trained, ...columns(drawn)], log: true, ...decades });
  }
  const curves = [...rows.map((row) => sideOf(row).gradient), now.gradient, now.elementwise];
  const norms = [head.training.steps, ...curves.map((curve) => curve.map((x) => x || null))]; // a logarithm has no zero
  const decades = wholeDecades(rows.flatMap((row) => [sideOf(row).gradient, sideOf(row).elementwise]).flat(), 12);
  result.push({ title: "gradient by step; dashed: without W_h", data: norms, log: true, ...decades });
  return result;
}

// Range of the positive numbers, in whole powers of ten and at most so many of them, and its ticks.
function wholeDecades(numbers, most = Infinity) {
  const found = numbers.filter((x) => x > 0).map(Math.log10);
  let low = 0, high = 1;
  if (found.length) {
    high = Math.ceil(found.reduce((a, b) => Math.max(a, b)));
    low = Math.max(Math.floor(found.reduce((a, b) => Math.min(a, b))), high - most);
    if (low === high) high += 1;
  }
  const middle = Math.round((low + high) / 2), exponents = [...new Set([low, middle, high])];
  return { range: [10 ** low, 10 ** high], ticks: exponents.map((n) => [10 ** n, powerOfTen(n)]) };
}

function drawTraining() {
  panels().forEach((panel, n) => training.show[n](panel));
  const label = `Gates, time constants and gradients at ${head.training.rows.length} moments of the training; the table has those of the chosen one`;
  $("history").setAttribute("aria-label", label);
  showMoment();
}

function startPanels() {
  const { rows, steps } = head.training, all = panels(), accent = () => css("--accent"), ink = () => css("--ink");
  const between = (numbers) => () => [numbers[0], Math.max(numbers.at(-1), numbers[0] + 1)];
  const fill = () => css("--accent") + "4d";
  const quantiles = [0, 0, 2, 0, 0].map((width) => ({ width, stroke: accent }));
  const curves = [
    ...rows.map(() => ({ width: 1, stroke: () => css("--line") })), { width: 2.5, stroke: accent }, { width: 2, stroke: ink, dash: [5, 4] },
  ];
  const drawMoment = ({ ctx, bbox, valToPos }) => {
    ctx.fillStyle = ink();
    ctx.fillRect(valToPos(rows[training.row].step, "x", true) - devicePixelRatio, bbox.top, 2 * devicePixelRatio, bbox.height);
  };
  const pick = (step) => {
    const distances = rows.map((row) => Math.abs(row.step - step));
    pause();
    showRow(distances.indexOf(Math.min(...distances)));
  };
  const bands = [{ series: [5, 1], fill }, { series: [4, 2], fill }], trained = rows.map((row) => row.step);
  const overTraining = { xRange: between(trained), series: quantiles, bands, draw: drawMoment, pick };
  const overSample = { xRange: between(steps), series: curves };
  training.show = all.map(({ log }, n) => addChart($("history"), { height: 140, right: 28, log, ...(n < all.length - 1 ? overTraining : overSample) }));
}

function showMoment() {
  const row = head.training.rows[training.row], now = sideOf(row), share = (x) => (x === null ? "–" : percent(x));
  const number = (x) => (x === null ? "–" : format(x));
  $("moment-step").textContent = row.step.toLocaleString("en");
  $("moment").setAttribute("aria-valuetext", `after ${row.step} training steps`);
  const lines = Object.entries(now.gates).map(([name, { quantiles, shut, open }]) => [
    name, ...[0, 2, 4].map((n) => number(quantiles[n])), share(shut), share(open),
  ]);
  if (now.time_constants) lines.push(["time constant", ...[0, 2, 4].map((n) => number(timeConstants(now)[n]))]);
  lines.push(["dead units", share(now.dead)]);
  const title = `after ${row.step.toLocaleString("en")} training steps`;
  fillTable($("moment-values"), title, lines.map((cells) => ({ cells })), ["10 %", "50 %", "90 %", "shut", "open"]);
}

function showRow(row) {
  training.row = clamp(row, 0, head.training.rows.length - 1);
  $("moment").value = training.row;
  drawTraining();
}

function pause() {
  clearInterval(training.timer);
  training.timer = null;
  $("play").textContent = "Play";
}

function play() {
  const last = head.training.rows.length - 1;
  if (training.timer !== null) return pause();
  $("play").textContent = "Pause";
  if (training.row === last) showRow(0);
  training.timer = setInterval(() => {
    showRow(training.row + 1);
    if (training.row === last) pause();
  }, clamp(6000 / (last + 1), 50, 500));
}

function startTraining() {
  const { rows } = head.training, sides = Object.keys(rows[0].layer);
  $("training").hidden = false;
  $("moment").max = rows.length - 1;
  $("sides").hidden = sides.length === 1;
  addOptions($("side"), sides.map((name) => [name, name]), training.side, (name) => {
    training.side = name;
    drawTraining();
  });
  $("moment").addEventListener("input", () => {
    pause();
    showRow(Number($("moment").value));
  });
  $("play").addEventListener("click", play);
  training.row = rows.length - 1;
  startPanels();
  showRow(training.row);
}

// ---- Changes of the view

let isScheduled = false;

function refresh() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    drawMap();
    drawStrips();
    shadeText();
    showDetails();
  });
}

function hover(place) {
  view.hovered = place;
  refresh();
}

function scrollSteps(first) {
  const last = numSteps - Math.min(view.span, numSteps), bar = $("first");
  view.first = clamp(first, 0, last);
  bar.max = last;
  bar.value = view.first;
  $("scroll").hidden = last === 0;
  refresh();
}

function pin({ step, unit }) {
  view.hovered = null;
  view.pinned = { step: clamp(step, 0, numSteps - 1), unit: clamp(unit, 0, numUnits - 1) };
  const span = Math.min(view.span, numSteps);
  const isOutside = view.pinned.step < view.first || view.pinned.step >= view.first + span;
  scrollSteps(isOutside ? Math.round(view.pinned.step - span / 2) : view.first);
  $("unit").value = view.pinned.unit;
  $("live").textContent = describe();
  const box = $("text"), top = box.querySelector(`[data-step="${view.pinned.step}"]`).offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + 24 > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  refresh();
}

function select(range) {
  view.range = range;
  search();
  showMatches();
  refresh();
}

function changeValues() {
  sortUnits();
  drawLegend("scale", mapOf(view.values));
  $("low").textContent = isSigned(view.values) ? "− scale of the unit" : "0";
  $("high").textContent = isSigned(view.values) ? "+ scale (largest magnitude)" : "1";
  select(view.range);
}

// ---- Input

function onKey(event) {
  const { step, unit } = view.pinned, row = rank[unit];
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-numSteps, 0], End: [numSteps, 0] }[event.key];
  if (event.key === "Escape") select(null);
  else if (move && !event.ctrlKey && !event.metaKey && !event.altKey) {
    pin({ step: step + move[0], unit: order[clamp(row + move[1], 0, numUnits - 1)] });
    if (event.shiftKey && move[0]) {
      view.anchor ??= step;
      select([Math.min(view.anchor, view.pinned.step), Math.max(view.anchor, view.pinned.step)]);
    } else view.anchor = null;
  } else return;
  event.preventDefault();
}

// A horizontal wheel, or Shift and a vertical one, scrolls the steps.
function onWheel(event) {
  const distance = event.deltaX || (event.shiftKey ? event.deltaY : 0);
  if (!distance || view.span >= numSteps) return;
  event.preventDefault();
  scrollSteps(view.first + Math.sign(distance) * Math.max(1, Math.round(Math.abs(distance) / layout().cell)));
}

// Hover, click and drag on an element; `place` returns the step and unit under the pointer, or null.
function followPointer(element, place) {
  let start = null, moved = false;
  element.addEventListener("pointerdown", (event) => {
    start = event.button === 0 ? place(event) : null;
    moved = false;
  });
  element.addEventListener("pointermove", (event) => {
    const here = place(event);
    if (!event.buttons) start = null; // released outside of the window
    if (start && here && here.step !== start.step) moved = true;
    if (start && here && moved) {
      element.setPointerCapture(event.pointerId);
      view.hovered = here;
      select([Math.min(start.step, here.step), Math.max(start.step, here.step)]);
    } else if (event.pointerType !== "touch") hover(here);
  });
  const end = (event) => {
    const here = place(event);
    if (start && event.type === "pointerup") pin(moved ? { ...start, unit: view.pinned.unit } : (here ?? start));
    start = null;
  };
  element.addEventListener("pointerup", end);
  element.addEventListener("pointercancel", end);
  element.addEventListener("pointerleave", () => hover(null));
}

function placeOnMap(event) {
  const parts = layout(), box = $("map").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - MARGIN.left) / parts.cell), row = Math.floor((event.clientY - box.top - parts.top) / parts.row);
  if (column < 0 || column >= parts.steps) return null;
  return { step: view.first + column, unit: row >= 0 && row < numUnits ? order[row] : view.pinned.unit };
}

function placeInText(event) {
  const span = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-step]");
  return span ? { step: Number(span.dataset.step), unit: view.pinned.unit } : null;
}

function addOptions(select, options, chosen, action) {
  select.append(...options.map(([name, label]) => new Option(label, name, false, name === chosen)));
  select.addEventListener("change", () => action(select.value));
}

function start() {
  const names = Object.keys(head.values);
  view.values = names.includes("c") ? "c" : names.at(-1);
  for (const name of names) {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "shown", value: name, checked: name === view.values });
    input.setAttribute("aria-label", head.values[name]);
    input.addEventListener("change", () => {
      view.values = name;
      changeValues();
    });
    label.title = head.values[name];
    label.append(input, name);
    $("shown").append(label);
  }
  const orders = [["index", "index"], ["clusters", "clusters by correlation"]];
  if ("timeConstants" in data) orders.push(["time constant", "time constant"]);
  if ("surprise" in data) orders.push(["surprise", "correlation with the prediction’s surprise"]);
  for (const name of Object.keys(data)) if (name.startsWith("property ")) orders.push([name, `correlation with ${name.slice(9)}`]);
  addOptions($("order"), orders, view.order, (name) => {
    view.order = name;
    sortUnits();
    pin({ step: view.pinned.step, unit: order[0] });
  });
  const spans = [50, 100, 200, 400, 1000].filter((n) => n < numSteps).map((n) => [String(n), String(n)]);
  view.span = numSteps > 200 ? (innerWidth < 700 ? 50 : 100) : numSteps;
  addOptions($("span"), [...spans, [String(numSteps), `all ${numSteps}`]], String(view.span), (n) => {
    view.span = Number(n);
    view.first = Math.round(view.pinned.step - view.span / 2);
    pin(view.pinned);
  });
  const shades = [["values", "the unit’s value"]];
  if ("surprise" in data) shades.push(["surprise", "surprise"]);
  if ("gradients" in data) shades.push(["gradients", "gradient of the step’s loss"]);
  addOptions($("shade"), shades, view.shade, (name) => {
    view.shade = name;
    refresh();
  });
  $("first").addEventListener("input", () => scrollSteps(Number($("first").value)));
  $("map").addEventListener("wheel", onWheel, { passive: false });
  $("unit").max = numUnits - 1;
  $("unit").addEventListener("input", () => $("unit").value !== "" && pin({ step: view.pinned.step, unit: Math.round(Number($("unit").value)) }));
  $("threshold").addEventListener("input", () => {
    view.threshold = Number($("threshold").value) / 100;
    select(view.range);
  });
  for (const id of ["before", "after"]) $(id).addEventListener("change", () => select(view.range));
  $("clear").addEventListener("click", () => select(null));
  for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
  for (const [id, place] of [["map", placeOnMap], ["strips", placeOnMap], ["text", placeInText]]) {
    followPointer($(id), place);
    $(id).addEventListener("keydown", onKey);
  }
  $("predictions").hidden = !("surprise" in data);
  $("summary").textContent = `${plural(numSteps, "step")}, ${plural(numUnits, "unit")} of layer ${head.layer}; values are rounded to ${head.levels + 1} levels`;
  new ResizeObserver(refresh).observe($("map"));
  dark.addEventListener("change", () => {
    buildTints();
    changeValues();
  });
  startStrips();
  buildTints();
  buildText();
  changeValues();
  if ("gradients" in data) view.pinned.step = Math.floor(Math.min(view.span, numSteps) / 2); // a gradient has steps before it
  pin(view.pinned);
  if (head.training) startTraining();
  document.documentElement.dataset.ready = "";
}

load().then(start).catch((error) => {
  $("failure").hidden = false;
  $("failure").textContent = `This page needs a current browser: ${error}`;
});
