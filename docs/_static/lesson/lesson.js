// Draws the widgets of the lesson into <div class="lesson" data-widget="NAME">. The cell itself is in model.js.
"use strict";

{
  const SVG = "http://www.w3.org/2000/svg";
  const GATE_NAMES = { i: "input gate", f: "forget gate", o: "output gate" };
  const Z_RANGE = 8; // of the sliders for pre-activations
  const STEPS_PER_SECOND = 12;

  /** Makes an element; an attribute that is a function listens to the event of that name. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    setAttributes(element, attributes);
    element.append(...children);
    return element;
  }

  function makeSvg(tag, attributes, ...children) {
    const element = document.createElementNS(SVG, tag);
    setAttributes(element, attributes);
    element.append(...children);
    return element;
  }

  function setAttributes(element, attributes) {
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else element.setAttribute(name, value);
    }
  }

  const MINUS = "\u2212";
  const GATE_DIGITS = 3; // a gate of 0.998 must not be shown as 1: it loses a tenth in 50 steps
  const format = (value, digits = 2) => {
    const text = value.toFixed(digits);
    return Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", MINUS);
  };

  /** Formats a number as 0.53 or 7.12×10⁻¹⁴. */
  function formatSmall(value) {
    if (value >= 0.01 && value < 1000) return value.toPrecision(3);
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${mantissa}×${powerOfTen(exponent)}`;
  }

  const powerOfTen = (exponent) =>
    "10" + [...String(Number(exponent))].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("");

  /** Makes a labelled slider with the text `show(value)`. Returns {element, set}; `set` returns the value after it. */
  function makeSlider(name, options, show, onInput) {
    const { min, max, step, value, kind = "" } = options;
    const input = make("input", { type: "range", min, max, step, value, "aria-label": name });
    const output = make("span", { class: "shown", "aria-hidden": "true" });
    const refresh = () => {
      output.textContent = show(Number(input.value));
      input.setAttribute("aria-valuetext", output.textContent);
    };
    const set = (attributes) => {
      setAttributes(input, attributes);
      if ("value" in attributes) input.value = attributes.value;
      refresh();
      return Number(input.value);
    };
    input.addEventListener("input", () => {
      refresh();
      onInput(Number(input.value));
    });
    refresh();
    const element = make("label", { class: `slider ${kind}` }, make("span", { class: "name" }, name), output, input);
    return { element, set };
  }

  /** Makes an equation of text and terms. A term is [kind, symbol]; `update(values)` fills in the values in order. */
  function makeEquation(...parts) {
    const values = [];
    const element = make("p", { class: "equation" });
    for (const part of parts) {
      if (typeof part === "string") {
        element.append(make("span", { class: "operator" }, part));
        continue;
      }
      const [kind, symbol] = part;
      const value = make("span", { class: "value" });
      const [base, subscript] = symbol.split("_");
      const name = make("span", { class: "symbol" }, base);
      if (subscript) name.append(make("sub", {}, subscript));
      element.append(make("span", { class: `term ${kind}` }, name, " ", value), " ");
      values.push(value);
    }
    const update = (numbers, digits = 2) =>
      values.forEach((value, n) => {
        const text = format(numbers[n], digits);
        const term = value.parentElement;
        term.style.setProperty("--level", Math.min(1, Math.abs(numbers[n])));
        if (value.textContent && value.textContent !== text) {
          term.classList.remove("lit");
          void term.offsetWidth; // restarts the animation
          term.classList.add("lit");
        }
        value.textContent = text;
      });
    return { element, update };
  }

  /** Returns ticks between two numbers: about five, at multiples of 1, 2 or 5 times a power of ten. */
  function ticksBetween(low, high) {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const count = Math.floor(high / step) - Math.ceil(low / step) + 1;
    return Array.from({ length: count }, (_, n) => (Math.ceil(low / step) + n) * step);
  }

  /**
   * Makes a chart of lines over steps. `draw` takes lines {kind, values}, from `low` to `high`, and options: the step
   * under the `cursor`, whether later steps are drawn `faint`, `marks`, and functions that label ticks. `onPick(n)` is
   * called with a step that is touched.
   */
  function makeChart(onPick) {
    const height = 180;
    const margin = { left: 46, right: 10, top: 10, bottom: 26 };
    const picture = makeSvg("svg", { role: "img", height });
    const element = make("div", { class: "chart" }, picture);
    let last = null;
    let width = 0;
    let count = 2;
    const left = (n) => margin.left + (n / (count - 1)) * (width - margin.left - margin.right);

    function draw(chart) {
      last = chart;
      if (width === 0) return;
      const {
        lines,
        low,
        high,
        description,
        cursor,
        faint,
        marks = [],
        xTicks,
        yTicks = ticksBetween(low, high),
      } = chart;
      const { xLabel = String, yLabel = (y) => format(y, high - low < 3 ? 1 : 0) } = chart;
      count = Math.max(2, lines[0].values.length);
      const top = (y) => margin.top + ((high - y) / (high - low)) * (height - margin.top - margin.bottom);
      const points = (values) => values.map((y, n) => `${left(n).toFixed(1)},${top(y).toFixed(1)}`).join(" ");
      const parts = [];
      for (const y of yTicks) {
        parts.push(
          makeSvg("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: top(y), y2: top(y) }),
        );
        parts.push(makeSvg("text", { class: "end", x: margin.left - 6, y: top(y) + 4 }, yLabel(y)));
      }
      for (const n of xTicks) {
        parts.push(makeSvg("text", { class: "middle", x: left(n), y: height - 7 }, xLabel(n)));
      }
      marks.forEach((mark, n) => {
        if (mark)
          parts.push(
            makeSvg("line", { class: "event", x1: left(n), x2: left(n), y1: margin.top, y2: height - margin.bottom }),
          );
      });
      for (const { kind, values } of lines) {
        if (faint) parts.push(makeSvg("polyline", { class: `line ${kind} faint`, points: points(values) }));
        const shown = faint && kind !== "target" ? values.slice(0, cursor + 1) : values;
        parts.push(makeSvg("polyline", { class: `line ${kind}`, points: points(shown) }));
        if (cursor !== undefined && kind !== "target") {
          parts.push(makeSvg("circle", { class: `dot ${kind}`, cx: left(cursor), cy: top(values[cursor]), r: 5 }));
        }
      }
      picture.replaceChildren(...parts);
      setAttributes(picture, { width, viewBox: `0 0 ${width} ${height}`, "aria-label": description });
    }

    const pick = (event) => {
      if (event.type === "pointermove" && event.buttons === 0) return;
      const share = (event.clientX - picture.getBoundingClientRect().left - left(0)) / (left(count - 1) - left(0));
      onPick(Math.min(count - 1, Math.max(0, Math.round(share * (count - 1)))));
    };
    if (onPick) setAttributes(picture, { pointerdown: pick, pointermove: pick });
    new ResizeObserver(() => {
      if (element.clientWidth === width) return;
      width = element.clientWidth;
      if (last) draw(last);
    }).observe(element);
    return { element, draw };
  }

  /** Makes a slider that sets `values[key]` and calls `refresh`; it shows as many digits as its step has. */
  function makeValueSlider(name, range, values, key, refresh) {
    const digits = String(range.step).length - 2;
    const set = (value) => {
      values[key] = value;
      refresh();
    };
    return makeSlider(name, { ...range, value: values[key], kind: key }, (value) => format(value, digits), set).element;
  }

  function makeLegend(entries) {
    const items = Object.entries(entries).map(([kind, text]) =>
      make("li", {}, make("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), text),
    );
    return make("ul", { class: "legend" }, ...items);
  }

  const everyTen = (length) => Array.from({ length: Math.floor((length - 1) / 10) + 1 }, (_, n) => 10 * n);

  // Widgets

  /** A vanilla unit and the cell state of an LSTM after one impulse. */
  function drawBoth(host) {
    const values = { w: 0.9, f: 1 };
    const chart = makeChart();
    const vanilla = makeEquation(["h", "h_10"], "= tanh(", ["w", "w"], "·", ["h", "h_9"], "+", ["g", "x_10"], ")");
    const lstm = makeEquation(["c", "c_10"], "=", ["f", "f"], "·", ["c", "c_9"], "+", ["g", "x_10"]);
    function refresh() {
      const steps = simulateBoth(values.w, values.f);
      vanilla.update([steps[10].h, values.w, steps[9].h, 0]);
      lstm.update([steps[10].c, values.f, steps[9].c, 0]);
      const end = steps[NUM_STEPS - 1];
      chart.draw({
        lines: [
          { kind: "h", values: steps.map((step) => step.h) },
          { kind: "c", values: steps.map((step) => step.c) },
        ],
        low: 0,
        high: 1.1,
        marks: STREAMS.value.marks,
        xTicks: everyTen(NUM_STEPS),
        description: `After an impulse at step ${WRITTEN}, at the last step: h = ${format(end.h)}, c = ${format(end.c)}`,
      });
    }
    const slider = (name, key, max) => makeValueSlider(name, { min: 0, max, step: 0.01 }, values, key, refresh);
    host.append(
      make(
        "div",
        { class: "controls" },
        slider("recurrent weight w of the RNN", "w", 1.5),
        slider("forget gate f of the LSTM", "f", 1),
      ),
      make("div", { class: "equations" }, vanilla.element, lstm.element),
      chart.element,
      makeLegend({ h: "h of the RNN", c: "c of the LSTM", event: "the impulse" }),
    );
    refresh();
  }

  /** The sigmoid of w x + b. */
  function drawSigmoid(host) {
    const values = { w: 2, x: 0.5, b: 0 };
    const resolution = 10; // points of the curve per unit of z
    const curve = Array.from({ length: 2 * Z_RANGE * resolution + 1 }, (_, n) => sigmoid(n / resolution - Z_RANGE));
    const chart = makeChart();
    const sum = makeEquation(["z", "z"], "=", ["w", "w"], "·", ["g", "x"], "+", ["b", "b"]);
    const gate = makeEquation(["f", "gate"], "= σ(", ["z", "z"], ")");
    function refresh() {
      const z = values.w * values.x + values.b;
      sum.update([z, values.w, values.x, values.b]);
      gate.update([sigmoid(z), z], 3);
      chart.draw({
        lines: [{ kind: "f", values: curve }],
        low: 0,
        high: 1,
        cursor: Math.round((Math.min(Z_RANGE, Math.max(-Z_RANGE, z)) + Z_RANGE) * resolution),
        xTicks: [-8, -4, 0, 4, 8].map((z) => (z + Z_RANGE) * resolution),
        yTicks: [0, 0.5, 1],
        xLabel: (n) => format(n / resolution - Z_RANGE, 0),
        description: `The sigmoid curve; at z = ${format(z)} it is ${format(sigmoid(z), 3)}`,
      });
    }
    const slider = (name, key, range) =>
      makeValueSlider(name, { min: -range, max: range, step: 0.1 }, values, key, refresh);
    host.append(
      make(
        "div",
        { class: "controls" },
        slider("weight w", "w", 4),
        slider("input x", "x", 2),
        slider("bias b", "b", 6),
      ),
      make("div", { class: "equations" }, sum.element, gate.element),
      chart.element,
      makeLegend({ f: "σ(z), over z" }),
    );
    refresh();
  }

  /**
   * A cell over a stream. Each knob is the name of a gate and the steps at which it sets it: "all", "ordinary" or
   * "marked". `task` is the name of a task with its `title`.
   */
  function drawCell(host, { stream, knobs, start, legend, task, title, withDrawing }) {
    const values = { ...start };
    const inputs = STREAMS[stream];
    let cursor = NUM_STEPS - 1;
    let setsGates = true;
    let timer = null;

    const update = makeEquation(["c", "c_t"], "=", ["f", "f"], "·", ["c", "c_t−1"], "+", ["i", "i"], "·", ["g", "g"]);
    const output = makeEquation(["h", "h_t"], "=", ["o", "o"], "· tanh(", ["c", "c_t"], ")");
    const time = make("p", { class: "time" });
    const goTo = (step) => {
      cursor = step;
      stepSlider.set({ value: step });
      refresh();
    };
    const chart = makeChart((step) => {
      stop();
      goTo(step);
    });

    const keysOf = ({ gate, steps }) => ({ all: [0, 1], ordinary: [0], marked: [1] })[steps].map((n) => gate + n);
    const zOf = (value) => Math.max(-Z_RANGE, Math.min(Z_RANGE, logit(value)));
    const sliders = knobs.map((knob) => {
      const name = `${GATE_NAMES[knob.gate]} ${knob.gate}${knob.steps === "all" ? "" : `, ${knob.steps} steps`}`;
      const options = { min: 0, max: 1, step: 0.001, value: values[keysOf(knob)[0]], kind: knob.gate };
      const show = (value) =>
        setsGates ? format(value, GATE_DIGITS) : `z = ${format(value, 1)}, ${knob.gate} = ${format(sigmoid(value), 4)}`;
      return makeSlider(name, options, show, (value) => {
        for (const key of keysOf(knob)) values[key] = setsGates ? value : sigmoid(value);
        refresh();
      });
    });
    const setMode = (gates) => {
      setsGates = gates;
      knobs.forEach((knob, n) => {
        const value = values[keysOf(knob)[0]];
        const shown = gates
          ? sliders[n].set({ min: 0, max: 1, step: 0.001, value })
          : sigmoid(sliders[n].set({ min: -Z_RANGE, max: Z_RANGE, step: 0.1, value: zOf(value) }));
        for (const key of keysOf(knob)) values[key] = shown;
      });
      refresh();
    };
    const modeButton = (text, gates) => {
      const input = make("input", { type: "radio", name: `mode-${host.dataset.widget}`, change: () => setMode(gates) });
      input.checked = gates;
      return make("label", {}, input, text);
    };
    const modes = make(
      "fieldset",
      { class: "modes" },
      make("legend", {}, "The sliders set"),
      modeButton("gates", true),
      modeButton("pre-activations", false),
    );

    const stepSlider = makeSlider("step t", { min: 0, max: NUM_STEPS - 1, step: 1, value: cursor }, String, (step) => {
      stop();
      cursor = step;
      refresh();
    });
    const play = make("button", { type: "button", click: () => (timer ? stop() : run()) }, "Play");
    function stop() {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    }
    function run() {
      play.textContent = "Pause";
      if (cursor === NUM_STEPS - 1) goTo(0);
      timer = setInterval(() => {
        goTo(cursor + 1);
        if (cursor === NUM_STEPS - 1) stop();
      }, 1000 / STEPS_PER_SECOND);
    }

    const verdict = make("p", { class: "verdict", role: "status" });
    const reason = make("p", { class: "reason" });
    const taskBox = task && make("div", { class: "task" }, make("p", { class: "title" }, title), verdict, " ", reason);
    const drawing = withDrawing && document.querySelector("svg.lstm-cell").cloneNode(true);

    function refreshTask(steps) {
      const { solved, step, c, target } = checkTask(TASKS[task], steps);
      const text = solved ? "Solved." : "Not yet.";
      if (verdict.textContent !== text) verdict.textContent = text; // read aloud only when it changes
      taskBox.classList.toggle("solved", solved);
      const tolerance = TASKS[task].tolerance;
      reason.textContent = solved
        ? `c is within ${tolerance} of its target at every step; its largest error, ${format(Math.abs(c - target))}, is at step ${step}.`
        : `The largest error is at step ${step}: c is ${format(c)} and should be ${format(target)}, give or take ${tolerance}.`;
    }

    function refresh() {
      const steps = simulate(values, inputs);
      const now = steps[cursor];
      time.textContent = `At step t = ${cursor}${inputs.marks[cursor] ? ", a marked step" : ""}:`;
      update.update([now.c, now.f, now.cBefore, now.i, now.g], GATE_DIGITS);
      output.update([now.h, now.o, now.c], GATE_DIGITS);
      if (drawing) for (const gate of GATES) drawing.style.setProperty(`--level-${gate}`, Math.abs(now[gate]));
      const lines = ["h", "c"].map((kind) => ({ kind, values: steps.map((step) => step[kind]) }));
      if (task) {
        lines.unshift({ kind: "target", values: TASKS[task].target });
        refreshTask(steps);
      }
      const all = lines.flatMap((line) => line.values);
      chart.draw({
        lines,
        low: Math.min(0, ...all) - 0.1,
        high: Math.max(1, ...all) + 0.1,
        marks: inputs.marks,
        cursor,
        faint: true,
        xTicks: everyTen(NUM_STEPS),
        description: `Cell state and output over time; at step ${cursor}: c = ${format(now.c)}, h = ${format(now.h)}`,
      });
    }

    const kinds = task ? { target: "the target of the task" } : {};
    host.append(
      ...(task ? [taskBox] : []),
      make("div", { class: "controls" }, modes, ...sliders.map(({ element }) => element)),
      make("div", { class: "equations" }, time, update.element, output.element, ...(drawing ? [drawing] : [])),
      chart.element,
      makeLegend({ c: "c, cell state", h: "h, output", ...kinds, event: legend }),
      make("div", { class: "player" }, play, stepSlider.element),
    );
    refresh();
  }

  /** Gradient descent on the parameters of the gates, for the third task. */
  function drawTraining(host) {
    const [numUpdates, updatesPerFrame, learningRate] = [400, 4, 0.1];
    const task = TASKS.restart;
    let timer = null;
    let [params, optimizer, count] = [];
    const chart = makeChart();
    const forget = makeEquation(["f", "z_f"], "=", ["f", "b_f"], "+", ["f", "w_f"], "· mark");
    const input = makeEquation(["i", "z_i"], "=", ["i", "b_i"], "+", ["i", "w_i"], "· mark");
    const progress = make("p", { class: "reason" });
    const verdict = make("p", { class: "verdict", role: "status" });
    const bias = makeSlider(
      "initial forget bias",
      { min: -3, max: 3, step: 0.1, value: 1, kind: "f" },
      (value) => format(value, 1),
      restart,
    );
    const train = make("button", { type: "button", click: () => (timer ? stop() : run()) });

    function stop() {
      clearInterval(timer);
      timer = null;
      refresh();
    }

    function restart(forgetBias) {
      params = [forgetBias, 0, 0, 0];
      optimizer = makeOptimizer(params, learningRate);
      count = 0;
      stop();
    }

    function update(updates) {
      for (let n = 0; n < updates; n++)
        params = optimizer(lossAndGradient(params, STREAMS.restart, task.target).gradient);
      count += updates;
      if (count === numUpdates) stop();
      else refresh();
    }

    function run() {
      if (count === numUpdates) restart(bias.set({}));
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) update(numUpdates - count);
      else timer = setInterval(() => update(updatesPerFrame), 1000 / STEPS_PER_SECOND);
      refresh();
    }

    function refresh() {
      const steps = simulate(gateValues(params), STREAMS.restart);
      const { loss } = lossAndGradient(params, STREAMS.restart, task.target);
      const { solved } = checkTask(task, steps);
      const [bf, wf, bi, wi] = params;
      forget.update([bf + wf, bf, wf]);
      input.update([bi + wi, bi, wi]);
      progress.textContent = `Loss ${formatSmall(loss)} after ${count} of ${numUpdates} updates.`;
      const text = solved ? "Task 3 is solved." : "";
      if (verdict.textContent !== text) verdict.textContent = text;
      train.textContent = timer ? "Pause" : count === numUpdates ? "Again" : "Train";
      chart.draw({
        lines: [
          { kind: "target", values: task.target },
          { kind: "c", values: steps.map(({ c }) => c) },
        ],
        low: -0.1,
        high: Math.max(1.5, ...steps.map(({ c }) => c)) + 0.1,
        marks: STREAMS.restart.marks,
        xTicks: everyTen(NUM_STEPS),
        description: `Cell state c and its target after ${count} updates, with loss ${formatSmall(loss)}`,
      });
    }
    host.append(
      make(
        "div",
        { class: "controls" },
        bias.element,
        make("div", { class: "player" }, train, make("div", {}, progress, " ", verdict)),
      ),
      make("div", { class: "equations" }, make("p", {}, "At a mark:"), forget.element, input.element),
      chart.element,
      makeLegend({ c: "c, cell state", target: "the target of task 3", event: "marked steps" }),
    );
    restart(1);
  }

  /** Jacobians through time of recorded networks. */
  async function drawGradient(host) {
    let recordings;
    try {
      const response = await fetch(host.dataset.recordings);
      if (!response.ok) throw new Error(`status ${response.status}`);
      recordings = await response.json();
    } catch (error) {
      const remedy = "serve the site, for example by python -m http.server, instead of opening the file";
      host.append(make("p", {}, `The recorded networks could not be loaded (${error.message}): ${remedy}.`));
      return;
    }
    const biases = Object.keys(recordings).flatMap((name) => (name.startsWith("lstm ") ? [name.split(" ")[1]] : []));
    const state = { kind: "lstm", bias: "1", length: NUM_STEPS, step: 0 };
    const select = (name, options, key) => {
      const change = (event) => {
        state[key] = event.target.value;
        refresh();
      };
      const input = make(
        "select",
        { change },
        ...Object.entries(options).map(([value, text]) => make("option", { value }, text)),
      );
      input.value = state[key];
      return { element: make("label", { class: "choice" }, name, input), input };
    };
    const kinds = select("cell", { rnn: "RNN", lstm: "LSTM", gru: "GRU" }, "kind");
    const bias = select("forget bias", Object.fromEntries(biases.map((value) => [value, value])), "bias");
    const maxLength = recordings.rnn.steps.h.length;
    state.length = maxLength;
    const length = makeSlider(
      "T, number of steps",
      { min: 1, max: maxLength, step: 1, value: maxLength },
      String,
      (value) => {
        state.length = value;
        state.step = Math.min(state.step, value - 1);
        step.set({ max: value - 1, value: state.step });
        refresh();
      },
    );
    const pick = (value) => {
      state.step = value;
      refresh();
    };
    const step = makeSlider("step t", { min: 0, max: maxLength - 1, step: 1, value: 0 }, String, pick);
    const chart = makeChart((value) => {
      step.set({ value });
      pick(value);
    });
    const shown = (kind) => make("output", { class: `number ${kind}` });
    const [full, along, best] = [shown("full"), shown("along"), shown("along")];
    const gateName = make("span");
    const rows = make(
      "dl",
      { class: "numbers" },
      make("dt", {}, "norm of the full Jacobian"),
      make("dd", {}, full),
      make("dt", {}, "norm of the product of the ", gateName),
      make("dd", {}, along),
      make("dt", {}, "largest product in one unit"),
      make("dd", {}, best),
    );

    function refresh() {
      const { kind } = state;
      const recording = recordings[kind === "lstm" ? `lstm ${state.bias}` : kind];
      bias.input.disabled = kind !== "lstm";
      const norms = jacobianNorms(kind, recording, state.length);
      const gate = { lstm: "f", gru: "u" }[kind];
      const products = gate && gateProducts(gate, recording, state.length);
      const alongNorms = products && products.map((product) => norm([product]));
      gateName.textContent = kind === "gru" ? "update gates" : "forget gates";
      full.textContent = formatSmall(norms[state.step]);
      along.textContent = products ? formatSmall(alongNorms[state.step]) : "no such gate";
      best.textContent = products ? formatSmall(Math.max(...products[state.step])) : "no such gate";
      const log = (values) => values.map(Math.log10);
      const lines = [{ kind: "full", values: log(norms) }];
      if (products) lines.push({ kind: "along", values: log(alongNorms) });
      const all = lines.flatMap((line) => line.values);
      const low = Math.min(-2, Math.floor(Math.min(...all)));
      const high = Math.max(1, Math.ceil(Math.max(...all)));
      const yTicks = ticksBetween(low, high).filter(Number.isInteger);
      chart.draw({
        lines,
        low,
        high,
        yTicks,
        cursor: state.step,
        xTicks: everyTen(state.length),
        yLabel: powerOfTen,
        description: `Norms of Jacobians on a logarithmic scale; at step ${state.step}: ${full.textContent}`,
      });
    }
    host.append(
      make(
        "div",
        { class: "controls" },
        make("div", { class: "choices" }, kinds.element, bias.element),
        length.element,
        step.element,
      ),
      rows,
      chart.element,
      makeLegend({ full: "full Jacobian", along: "gates alone" }),
    );
    refresh();
  }

  const open = { i0: 0, i1: 1, f0: 1, f1: 1, o0: 1, o1: 1 };
  const knob = (gate, steps = "all") => ({ gate, steps });
  const WIDGETS = {
    both: drawBoth,
    sigmoid: drawSigmoid,
    training: drawTraining,
    gradient: drawGradient,
    forget: (host) =>
      drawCell(host, {
        stream: "value",
        knobs: [knob("f")],
        start: { ...open, f0: 0.9, f1: 0.9 },
        legend: "the step that writes 1",
        task: "remember",
        title: "Task 1: make it remember the value for 50 steps.",
      }),
    input: (host) =>
      drawCell(host, {
        stream: "count",
        knobs: [knob("i", "ordinary"), knob("i", "marked"), knob("f")],
        start: { ...open, i0: 0.5, i1: 0.5, f0: 0.95, f1: 0.95 },
        legend: "marked steps, where x is 1",
        task: "count",
        title: "Task 2: make it count the marked steps.",
      }),
    output: (host) =>
      drawCell(host, {
        stream: "ask",
        knobs: [knob("o", "ordinary"), knob("o", "marked")],
        start: { ...open, i1: 0, o0: 0.5, o1: 0.5 }, // nothing is written: c starts at 0.8
        legend: "marked steps, which ask for the value",
      }),
    cell: (host) =>
      drawCell(host, {
        stream: "restart",
        knobs: [knob("f", "ordinary"), knob("f", "marked"), knob("i", "ordinary"), knob("i", "marked"), knob("o")],
        start: { ...open, f0: 0.9, f1: 0.9, i0: 0.5, i1: 0.5 },
        legend: "marked steps, where x is 0.9",
        task: "restart",
        title: "Task 3: make it add up x, and forget the sum at each mark.",
        withDrawing: true,
      }),
  };

  for (const host of document.querySelectorAll(".lesson[data-widget]")) WIDGETS[host.dataset.widget](host);
}
