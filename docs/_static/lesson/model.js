// The cell of one unit that the lesson simulates, its tasks, and Jacobians from recordings. Nothing here draws.
"use strict";

const NUM_STEPS = 60;
const GATES = ["i", "f", "g", "o"];

const sigmoid = (z) => 1 / (1 + Math.exp(-z));
const logit = (p) => Math.log(p / (1 - p));

/** Returns a sequence: `inputAt(t)` gives the input x, `marks` lists the marked steps, c starts at `initial`. */
function makeStream(inputAt, marks, initial = 0) {
  const steps = Array.from({ length: NUM_STEPS }, (_, t) => t);
  return { xs: steps.map(inputAt), marks: steps.map((t) => marks.includes(t)), initial };
}

/** Returns a number between -1 and 1 that looks random; the same for every reader. */
const noise = (t) => Math.round(100 * Math.sin(12.9898 * (t + 1) ** 1.5)) / 100;

const WRITTEN = 5; // the step of the value to remember
const COUNTED = [4, 11, 15, 23, 30, 38, 45, 55];
const STREAMS = {
  value: makeStream((t) => (t === WRITTEN ? 1 : noise(t)), [WRITTEN]),
  count: makeStream((t) => (COUNTED.includes(t) ? 1 : noise(t)), COUNTED),
  ask: makeStream(noise, [15, 30, 45], 0.8),
  restart: makeStream((t) => ([19, 39].includes(t) ? 0.9 : t % 3 === 1 ? 0.2 : 0), [19, 39]),
};

/**
 * Runs one unit. A gate has two values, `f0` at ordinary steps and `f1` at marked ones, and the candidate g is x.
 * Returns a list of {i, f, g, o, c, h}, and before it in `cBefore` the cell state that the step read.
 */
function simulate(values, stream) {
  let c = stream.initial;
  return stream.xs.map((x, t) => {
    const at = (gate) => values[gate + (stream.marks[t] ? 1 : 0)];
    const step = { i: at("i"), f: at("f"), g: x, o: at("o"), cBefore: c };
    c = step.f * c + step.i * step.g;
    return { ...step, c, h: step.o * Math.tanh(c) };
  });
}

/** Returns h of h = tanh(w h + x) for an impulse at step WRITTEN, and c of c = f c + x, for every step. */
function simulateBoth(w, f) {
  let h = 0;
  let c = 0;
  return STREAMS.value.marks.map((mark) => {
    const x = mark ? 1 : 0;
    h = Math.tanh(w * h + x);
    c = f * c + x;
    return { h, c };
  });
}

/** Returns the sum of the numbers up to every step; it restarts at 0 where `restarts` is true. */
function runningSum(numbers, restarts = []) {
  let sum = 0;
  return numbers.map((number, t) => (sum = restarts[t] ? 0 : sum + number));
}

const remembered = STREAMS.value.marks.map((_, t) => (t < WRITTEN ? 0 : 1));

/** The tasks of the reader: c must stay within `tolerance` of `target` at the steps from `first` to `last`. */
const TASKS = {
  remember: { target: remembered, tolerance: 0.1, first: WRITTEN, last: WRITTEN + 50 },
  count: { target: runningSum(STREAMS.count.marks.map(Number)), tolerance: 0.25, first: 0, last: NUM_STEPS - 1 },
  restart: {
    target: runningSum(STREAMS.restart.xs, STREAMS.restart.marks),
    tolerance: 0.1,
    first: 0,
    last: NUM_STEPS - 1,
  },
};

/** Returns {solved, step, c, target}: whether a run solves a task, and the step with the largest error. */
function checkTask(task, steps) {
  const error = (t) => Math.abs(steps[t].c - task.target[t]);
  let worst = task.first;
  for (let t = task.first; t <= task.last; t++) if (error(t) > error(worst)) worst = t;
  return { solved: error(worst) <= task.tolerance, step: worst, c: steps[worst].c, target: task.target[worst] };
}

// Training. Two gates have a bias and a weight of the mark: z_f = b_f + w_f mark, z_i = b_i + w_i mark.

/** Returns the values of the gates at ordinary and marked steps, for parameters [b_f, w_f, b_i, w_i]. */
function gateValues([bf, wf, bi, wi]) {
  return { f0: sigmoid(bf), f1: sigmoid(bf + wf), i0: sigmoid(bi), i1: sigmoid(bi + wi), o0: 1, o1: 1 };
}

/** Returns {loss, gradient} of the mean squared error of c; the derivatives of c are carried along with it. */
function lossAndGradient(params, stream, target) {
  let dc = [0, 0, 0, 0];
  let loss = 0;
  const gradient = [0, 0, 0, 0];
  simulate(gateValues(params), stream).forEach(({ f, i, g, c, cBefore }, t) => {
    const mark = Number(stream.marks[t]);
    const df = cBefore * f * (1 - f);
    const di = g * i * (1 - i);
    const direct = [df, df * mark, di, di * mark];
    dc = dc.map((d, k) => f * d + direct[k]);
    const error = c - target[t];
    loss += error ** 2 / NUM_STEPS;
    dc.forEach((d, k) => (gradient[k] += (2 * error * d) / NUM_STEPS));
  });
  return { loss, gradient };
}

/** Returns an optimizer, Adam, that starts at `params`: each call of it takes a gradient and returns the new ones. */
function makeOptimizer(params, learningRate) {
  const [decay, squareDecay] = [0.9, 0.999];
  const mean = params.map(() => 0);
  const square = params.map(() => 0);
  let count = 0;
  return (gradient) => {
    count++;
    params = params.map((value, k) => {
      mean[k] += (1 - decay) * (gradient[k] - mean[k]);
      square[k] += (1 - squareDecay) * (gradient[k] ** 2 - square[k]);
      const step = mean[k] / (1 - decay ** count);
      return value - (learningRate * step) / (Math.sqrt(square[k] / (1 - squareDecay ** count)) + 1e-8);
    });
    return params;
  };
}

// Jacobians. A matrix is a list of rows.

const identity = (size) => Array.from({ length: size }, (_, j) => Array.from({ length: size }, (_, k) => +(j === k)));

function multiply(a, b) {
  return a.map((row) => {
    const result = new Array(b[0].length).fill(0);
    row.forEach((value, k) => b[k].forEach((other, j) => (result[j] += value * other)));
    return result;
  });
}

const norm = (matrix) => Math.sqrt(matrix.flat().reduce((sum, value) => sum + value * value, 0));

/** Returns the Jacobian of the state after step t, at least 1, with respect to the state before it; by kind of cell. */
const STEP_JACOBIANS = {
  rnn({ weights, steps }, t) {
    return weights.y.map((row, j) => row.map((w) => (1 - steps.h[t][j] ** 2) * w));
  },

  gru({ weights, steps }, t) {
    return weights.u.map((_, j) => {
      const [r, u, nX, nH] = ["r", "u", "n_x", "n_h"].map((name) => steps[name][t][j]);
      const n = Math.tanh(nX + r * nH);
      const dn = (1 - u) * (1 - n * n);
      const du = (steps.h[t - 1][j] - n) * u * (1 - u);
      const dr = dn * nH * r * (1 - r);
      return weights.u[j].map((w, k) => (j === k ? u : 0) + du * w + dn * r * weights.n_h[j][k] + dr * weights.r[j][k]);
    });
  },

  // The state is (h, c): the rows of the new h, then the rows of the new c; the columns of the old h and c.
  lstm({ weights, steps }, t) {
    const rowsOfC = [];
    const rowsOfH = [];
    weights.i.forEach((_, j) => {
      const [i, f, g, o, c] = ["i", "f", "g", "o", "c"].map((name) => steps[name][t][j]);
      const di = g * i * (1 - i);
      const df = steps.c[t - 1][j] * f * (1 - f);
      const dg = i * (1 - g * g);
      const dcdh = weights.i[j].map((w, k) => di * w + df * weights.f[j][k] + dg * weights.g[j][k]);
      const rowOfC = [...dcdh, ...dcdh.map((_, k) => (j === k ? f : 0))];
      const dtanh = o * (1 - Math.tanh(c) ** 2);
      const dOut = Math.tanh(c) * o * (1 - o);
      rowsOfC.push(rowOfC);
      rowsOfH.push(rowOfC.map((d, k) => dtanh * d + (k < dcdh.length ? dOut * weights.o[j][k] : 0)));
    });
    return [...rowsOfH, ...rowsOfC];
  },
};

/**
 * Multiplies the Jacobians of the steps of a recording, from the last of `length` steps back.
 * Returns for every step the Frobenius norm of d(last state) / d(state after the step), as
 * jaxlstm.diagnostics.gradient_flow does.
 */
function jacobianNorms(kind, recording, length) {
  const size = Object.values(recording.weights)[0].length * (kind === "lstm" ? 2 : 1);
  const norms = new Array(length);
  let jacobian = identity(size);
  for (let t = length - 1; t >= 0; t--) {
    norms[t] = norm(jacobian);
    if (t > 0) jacobian = multiply(jacobian, STEP_JACOBIANS[kind](recording, t));
  }
  return norms;
}

/** Returns for every step, by unit, the product of the later gates named `gate`: the factor along the memory alone. */
function gateProducts(gate, recording, length) {
  const products = new Array(length);
  products[length - 1] = recording.steps[gate][0].map(() => 1);
  for (let t = length - 1; t > 0; t--) {
    products[t - 1] = products[t].map((product, j) => product * recording.steps[gate][t][j]);
  }
  return products;
}
