"""Writes one step of a network as a C99 file without dependencies."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import ArrayLike, Float

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.export.c_expressions import Block, literal
from jaxlstm.params import Params, Weights
from jaxlstm.recurrence.cpu_activations import DENOMINATOR, LIMIT, NUMERATOR
from jaxlstm.recurrence.gates import evaluate_cell
from jaxlstm.recurrence.step import EPSILON, sum_sources
from jaxlstm.rnn import RNN

Readout = tuple[Float[ArrayLike, "O P"], Float[ArrayLike, "O"] | None]

_LARGEST_INT8 = 127


def to_c(
    lstm: RNN, params: Params, *, name: str = "lstm", readout: Readout | None = None, quantize: str | None = None
) -> str:
    """Writes ``lstm.step`` for one sequence as a C99 file, for microcontrollers and other programs without Python.

    The file contains the weights as constants and needs no library, except math.h if the functions of a cell call one
    of its functions, as those of sLSTM and minLSTM do. It allocates no memory, and it is valid C++. It defines, with
    ``name`` as prefix::

        typedef struct { ... } lstm_state;
        void lstm_reset(lstm_state *s);                                 the initial state, or the learned one
        void lstm_step(lstm_state *s, const float *x, float *y);        x[LSTM_INPUT_SIZE], y[LSTM_OUTPUT_SIZE]

    A cell that reads static features gets them at the reset, which stores their product with the weights in the state:
    ``lstm_reset(lstm_state *s, const float *features)`` with ``features[LSTM_STATIC_SIZE]``.

    Every cell is translated from its own equations in `jaxlstm.cells`, by tracing. Numbers are float32 whatever the
    network's dtype, and tanh is the quotient of polynomials of `jaxlstm.recurrence.cpu_activations`, so outputs agree
    with a float32 network to about 1e-6.

    Args:
      lstm: a network with one direction. Regularizers that need a key are left out; zoneout takes its expectation.
      params: its parameters.
      name: prefix of all names in the file.
      readout: ``(weights (O, P), bias (O,) or None)`` of a linear layer on the output; ``y`` is then its result.
      quantize: ``"int8"`` for matrices of 8-bit integers with one scale per row, a quarter of the size. Products are
        still sums in float32. A comment in the file states the error that the rounding of the weights causes.

    Returns:
      the text of the file.

    Raises:
      ValueError, TypeError: for parameters of another configuration or not finite, a bidirectional network, a name that
        is no C identifier, a readout of another shape, or a cell whose gates are not elementwise arithmetic.
    """
    validation.instance("lstm", lstm, RNN, "a jaxlstm.LSTM")
    if lstm.bidirectional:
        raise ValueError("to_c writes single steps, and bidirectional=True needs the whole sequence")
    if lstm.residual:
        raise ValueError(f"to_c writes plain stacks of layers, got {lstm!r}")
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"name must be a C identifier, got {name!r}")
    if quantize is not None:
        validation.choice("quantize", quantize, ("int8",))
    lstm.check_params(params)
    _check_finite("params", params)
    writer = _Writer(name, quantize == "int8")
    size, output = lstm.input_size, "x"
    for n, layer in enumerate(params.layers):
        writer.add_layer(n, lstm, layer.forward, output, size)
        size, output = lstm.output_size, f"s->h{n}"
    size = writer.add_output(output, size, _checked_readout(lstm, readout))
    writer.add_reset(lstm, params)
    return writer.text(lstm, size, _rounding_error(lstm, params) if writer.int8 else None)


def _check_finite(name: str, tree: Any) -> None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise ValueError(f"{name}{jax.tree_util.keystr(path)} must be finite in float32, got NaN or infinity")


def _checked_readout(lstm: RNN, readout: Readout | None) -> tuple[np.ndarray, np.ndarray | None] | None:
    if readout is None:
        return None
    if not isinstance(readout, tuple | list) or len(readout) != 2:
        raise TypeError(f"readout must be (weights, bias or None), got {validation.describe(readout)}")
    weights, bias = (None if a is None else np.asarray(a, np.float32) for a in readout)
    if weights is None or weights.ndim != 2 or weights.shape[1] != lstm.output_size or len(weights) == 0:
        raise ValueError(
            f"the weights of readout must have shape (O, {lstm.output_size}), got {list(np.shape(readout[0]))}"
        )
    if bias is not None and bias.shape != weights.shape[:1]:
        raise ValueError(f"the bias of readout must have shape {[len(weights)]}, got {list(bias.shape)}")
    _check_finite("readout", (weights, bias))
    return weights, bias


def _quantized(w: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns integers from -127 to 127 and the scale of each row; their product approximates the matrix."""
    w = np.asarray(w, np.float32)
    scale = np.abs(w).max(1) / _LARGEST_INT8
    rows = np.where(scale > 0, scale, 1)[:, None]
    return np.rint(w / rows).astype(np.int8), scale.astype(np.float32)


def _rounding_error(lstm: RNN, params: Params, num_steps: int = 1000) -> float:
    """Returns the error of the outputs with rounded matrices: root mean square, relative to the outputs.

    The inputs are a sequence of standard normal numbers.
    """

    def rounded(w: Array) -> Array:
        integers, scale = _quantized(w)
        return jnp.asarray(integers * scale[:, None])

    def round_matrices(weights: Weights) -> Weights:
        matrices = {name: getattr(weights, name) for name in ("w_x", "w_h", "w_p", "w_s")}
        return weights._replace(**{name: rounded(w) for name, w in matrices.items() if w is not None})

    lstm = RNN(
        lstm.input_size, lstm.hidden_size, num_layers=lstm.num_layers, cell=lstm.cell, use_bias=lstm.use_bias,
        learned_state=lstm.learned_state, proj_size=lstm.proj_size, layer_norm=lstm.layer_norm,
        activation=lstm.activation, zoneout_h=lstm.zoneout_h, zoneout_c=lstm.zoneout_c, heads=lstm.heads,
        static_size=lstm.static_size,
    )  # fmt: skip
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    layers = tuple(layer._replace(forward=round_matrices(layer.forward)) for layer in params.layers)
    xs = np.random.default_rng(0).standard_normal((num_steps, lstm.input_size)).astype(np.float32)
    static = None if lstm.static_size is None else xs[0, [0] * lstm.static_size]
    exact, approximate = (lstm(p, xs, static=static)[0] for p in (params, params._replace(layers=layers)))
    return float(jnp.sqrt(((approximate - exact) ** 2).mean() / (exact**2).mean()))


class _Writer:
    """Collects the parts of a file."""

    def __init__(self, name: str, int8: bool) -> None:
        self.name = name
        self.int8 = int8
        self.constants: list[str] = []
        self.fields: list[str] = []
        self.reset: list[str] = []
        self.step: list[str] = []
        self.num_weight_bytes = 0
        self.num_state_floats = 0
        self.num_operations = 0
        self.needs_math_h = False

    def add_layer(self, n: int, lstm: RNN, weights: Weights, x: str, size: int) -> None:
        """Adds one step of a layer, from the array ``x`` of ``size`` numbers to the new ``s->h`` of the layer."""
        cell, units, norm = lstm.resolved_cell, lstm.hidden_size, weights.norm
        self.add_field(f"h{n}", lstm.output_size)
        for name in cell.initial_values:
            self.add_field(f"{name}{n}", units)
        self.emit(0, f"{{ /* layer {n} */")
        products = {"z_x": self.add_product(f"w_x{n}", weights.w_x, x, "z_x")}
        if weights.w_h is not None:
            args = (f"w_h{n}", weights.w_h, f"s->h{n}", "z_h")
            is_dense = weights.w_h.shape[1] == lstm.output_size
            products["z_h"] = self.add_product(*args) if is_dense else self.add_block_product(*args, units)
        if norm is not None:
            for array, gain in (("z_x", norm.x), ("z_h", norm.h)):
                if gain is not None:
                    if self.int8:
                        self.emit(1, f"for (r = 0; r < {gain.size}; ++r) {array}[r] = {products[array]};")
                    self.emit(1, f"{self.name}_normalize({gain.size}, {array});")
                    products[array] = f"({array}[r] * {self.add_array(f'gain{array[1:]}{n}', gain)}[r])"
        if weights.w_s is not None:
            products["z_s"] = f"s->z_s{n}[r]"
            self.add_static(n, weights.w_s)
        if weights.b is not None:
            products["b"] = f"{self.add_array(f'b{n}', weights.b)}[r]"
        rows = {"z_x": cell.slabs_reading("x"), "z_h": cell.slabs_reading("h"), "z_s": cell.slabs_reading("static")}
        pre_activations = [
            [products[source].replace("[r]", f"[{slab * units} + j]" if slab else "[j]") for slab in range(len(slabs))]
            if source in products
            else None
            for source, slabs in {**rows, "b": range(cell.num_gates)}.items()
        ]
        self.add_gates(n, lstm, cell, weights, pre_activations)
        self.emit(0, "}")

    def add_gates(
        self, n: int, lstm: RNN, cell: Cell, weights: Weights, pre_activations: Sequence[list[str] | None]
    ) -> None:
        """Adds the elementwise part of a layer, from the numbers of the sources of each gate, as in `sum_sources`."""
        units, norm = lstm.hidden_size, weights.norm
        states = [f"s->{name}{n}[j]" for name in cell.initial_values]
        h = f"s->h{n}[j]"
        peepholes = None
        if weights.w_c is not None:
            array = self.add_array(f"w_c{n}", weights.w_c)
            peepholes = [f"{array}[{k}][j]" for k in range(len(cell.peepholes))]
        args = (*pre_activations, states or None, peepholes, [h] if cell.reads_h else None)

        def gates(
            z_x: Array, z_h: Array | None, z_s: Array | None, b: Array | None, c: Array | None,
            peepholes: Array | None, h: Array | None, **options: Any,
        ) -> list[Array]:  # fmt: skip
            bias = None if b is None else lax.split(b, [1] * cell.num_gates)
            z = jnp.concatenate(sum_sources(cell, z_x, z_h, z_s, bias, axis=-3))
            named = {} if c is None else dict(zip(cell.initial_values, c))
            old_h = None if h is None else h[0]
            c, new_h = evaluate_cell(cell, z, cell.pack_states(named), peepholes, h=old_h, **options)
            return [*cell.states_by_name(c).values(), new_h]

        output = "u[j]" if weights.w_p is not None else None
        if output:
            self.emit(1, f"float u[{units}];")

        def store(values: Sequence[str]) -> list[str]:
            """Returns the statements that store the new states and the output."""
            *new_states, y = values
            lines = [f"{c} = {_mixed(lstm.zoneout_c, new, c)};" for c, new in zip(states, new_states)]
            return [*lines, f"{output} = {y};" if output else f"{h} = {_mixed(lstm.zoneout_h, y, h)};"]

        if norm is None or norm.c is None:
            block = Block(gates, *args)
            self.add_loop(units, block, store(block.results))
        else:
            self.emit(1, f"float new_c[{units}], normalized_c[{units}];")
            block = Block(lambda *args: gates(*args)[0], *args)
            self.add_loop(units, block, [f"new_c[j] = normalized_c[j] = {block.results[0]};"])
            self.emit(1, f"{self.name}_normalize({units}, normalized_c);")
            shift = "" if norm.b_c is None else f" + {self.add_array(f'shift_c{n}', norm.b_c)}[j]"
            normalized = [f"(normalized_c[j] * {self.add_array(f'gain_c{n}', norm.c)}[j]{shift})"]
            block = Block(lambda u, *args: gates(*args, normalize=lambda _: u[0])[1], normalized, *args)
            self.add_loop(units, block, store(["new_c[j]", block.results[0]]))
        if weights.w_p is not None:
            product = self.add_product(f"w_p{n}", weights.w_p, "u", "p").replace("[r]", "[j]")
            self.emit(1, f"for (j = 0; j < {lstm.output_size}; ++j) {h} = {_mixed(lstm.zoneout_h, product, h)};")

    def add_static(self, n: int, w_s: Array) -> None:
        """Adds the product with the static features to the reset, and its result to the state."""
        self.add_field(f"z_s{n}", len(w_s))
        step, self.step = self.step, []
        self.emit(0, "{ /* static features */")
        product = self.add_product(f"w_s{n}", w_s, "features", "p")
        self.emit(1, f"for (r = 0; r < {len(w_s)}; ++r) s->z_s{n}[r] = {product};")
        self.emit(0, "}")
        self.reset += self.step
        self.step = step

    def add_loop(self, units: int, block: Block, stores: Sequence[str]) -> None:
        """Adds a loop over units."""
        self.emit(1, f"for (j = 0; j < {units}; ++j) {{")
        for line in (*block.lines, *stores):
            self.emit(2, line.replace("NAME_", f"{self.name}_"))
        self.emit(1, "}")
        self.num_operations += units * block.num_operations
        self.needs_math_h |= block.needs_math_h

    def add_output(self, h: str, size: int, readout: tuple[np.ndarray, np.ndarray | None] | None) -> int:
        """Adds the output of the step; returns its size."""
        if readout is None:
            self.emit(0, f"for (j = 0; j < {size}; ++j) y[j] = {h}[j];")
            return size
        weights, bias = readout
        self.emit(0, "{ /* readout */")
        product = self.add_product("w_y", weights, h, "p")
        shift = "" if bias is None else f" + {self.add_array('b_y', bias)}[r]"
        self.emit(1, f"for (r = 0; r < {len(weights)}; ++r) y[r] = {product}{shift};")
        self.emit(0, "}")
        return len(weights)

    def add_product(self, label: str, w: Any, vector: str, result: str) -> str:
        """Adds a product with a matrix; returns the expression of row ``r`` of the result.

        Matrices are stored by columns, and four of them at a time are added to the result: compilers vectorize this
        without changing the order of a sum.
        """
        w = np.asarray(w, np.float32)
        rows, columns = w.shape
        expression = f"{result}[r]"
        if self.int8:
            w, scale = _quantized(w)
            expression = f"({expression} * {self.add_array(label + '_scale', scale)}[r])"
        array = self.add_array(label, w.T)
        whole = columns - columns % 4
        self.emit(1, f"float {result}[{rows}] = {{0}};")
        for start, stop, count in ((0, whole, 4), (whole, columns, 1)):
            if start == stop:
                continue
            values = ", ".join(f"v{i} = {vector}[k{f' + {i}' if i else ''}]" for i in range(count))
            terms = " + ".join(f"{array}[k{f' + {i}' if i else ''}][r] * v{i}" for i in range(count))
            self.emit(1, f"for (k = {start}; k < {stop}; k += {count}) {{")
            self.emit(2, f"const float {values};")
            self.emit(2, f"for (r = 0; r < {rows}; ++r) {result}[r] += {terms};")
            self.emit(1, "}")
        self.num_operations += 2 * rows * columns
        return expression

    def add_block_product(self, label: str, w: Any, vector: str, result: str, units: int) -> str:
        """Adds a product with a block-diagonal or diagonal ``W_h``; returns the expression of row ``r`` of the result.

        The numbers that multiply one number of h are stored together: those of its block, gate by gate.
        """
        w = np.asarray(w, np.float32)
        rows, block = w.shape
        expression = f"{result}[r]"
        if self.int8 and block > 1:  # the rows of a diagonal matrix have one number each
            w, scale = _quantized(w)
            expression = f"({expression} * {self.add_array(label + '_scale', scale)}[r])"
        num_gates = rows // units
        w = w.reshape(num_gates, units // block, block, block).transpose(1, 3, 0, 2).reshape(units, num_gates * block)
        array = self.add_array(label, w)
        terms = [
            (f"{gate * units} + " if gate else "", f"{gate * block} + " if gate else "") for gate in range(num_gates)
        ]
        self.emit(1, f"float {result}[{rows}] = {{0}};")
        self.emit(1, f"for (k = 0; k < {units}; ++k) {{")
        self.emit(2, f"const float v = {vector}[k];")
        self.emit(2, f"float *const p = {result} + k / {block} * {block};")
        self.emit(2, f"for (r = 0; r < {block}; ++r) {{")
        for to, start in terms:
            self.emit(3, f"p[{to}r] += {array}[k][{start}r] * v;")
        self.emit(2, "}")
        self.emit(1, "}")
        self.num_operations += 2 * rows * block
        return expression

    def add_array(self, label: str, a: Any) -> str:
        """Adds a constant array; returns its name."""
        a = np.asarray(a) if np.asarray(a).dtype == np.int8 else np.asarray(a, np.float32)
        numbers = [str(x) for x in a.ravel()] if a.dtype == np.int8 else [literal(x) for x in a.ravel()]
        width = a.shape[-1]
        rows = [_wrap(numbers[n : n + width]) for n in range(0, len(numbers), width)]
        initializer = rows[0] if a.ndim == 1 else "{\n" + ",\n".join(rows) + "\n}"
        shape = "".join(f"[{size}]" for size in a.shape)
        kind = "signed char" if a.dtype == np.int8 else "float"
        self.constants.append(f"static const {kind} {self.name}_{label}{shape} = {initializer};")
        self.num_weight_bytes += a.nbytes
        return f"{self.name}_{label}"

    def add_field(self, label: str, size: int) -> None:
        """Adds an array to the state."""
        self.fields.append(f"    float {label}[{size}];")
        self.num_state_floats += size

    def add_reset(self, lstm: RNN, params: Params) -> None:
        """Adds the initial state: the values of the cell, or the learned state."""
        cell, learned = lstm.resolved_cell, params.state
        for n in range(lstm.num_layers):
            values = {"h": 0.0, **cell.initial_values}
            arrays = {} if learned is None else {"h": learned.h, **cell.states_by_name(learned.c)}
            for name, number in values.items():
                size = lstm.output_size if name == "h" else lstm.hidden_size
                value = self.infinite_literal(number) if math.isinf(number) else literal(number)
                if name in arrays:
                    value = self.add_array(f"initial_{name}{n}", arrays[name][n]) + "[j]"
                self.reset.append(f"    for (j = 0; j < {size}; ++j) s->{name}{n}[j] = {value};")

    def infinite_literal(self, number: float) -> str:
        """Returns the C expression of an infinity, from math.h."""
        self.needs_math_h = True
        return "HUGE_VALF" if number > 0 else "-HUGE_VALF"

    def emit(self, depth: int, line: str) -> None:
        """Adds a line to the body of the step."""
        self.step.append("    " * (depth + 1) + line)

    def text(self, lstm: RNN, output_size: int, error: float | None) -> str:
        """Returns the whole file."""
        name, upper, step = self.name, self.name.upper(), "\n".join(self.step)
        reset, features = "\n".join(self.reset), "" if lstm.static_size is None else ", const float *features"
        declared = [[v for v in "jkr" if re.search(rf"\bfor \({v} = ", body)] for body in (reset, step)]
        functions = [
            text.replace("NAME", name) for function, text in _FUNCTIONS.items() if f"{name}_{function}(" in step
        ]
        precision = "float32"
        if error is not None:
            precision = f"8-bit integers with one scale per row: they change the outputs by {error:.1e} of their size\n"
            precision += "   (root mean square over 1,000 steps of standard normal inputs)"
        header = f"""/* One step of {lstm!r}, for one sequence.
   Written by jaxlstm.export.to_c. C99, also valid C++.

   x: {lstm.input_size} numbers. y: {output_size} numbers.
   Weights: {self.num_weight_bytes:,} bytes. State: {4 * self.num_state_floats:,} bytes.
   Operations per step: {self.num_operations:,}.
   Matrices: {precision}. */"""
        return "\n".join([
            header,
            *(["#include <math.h>"] if self.needs_math_h else []),
            "#include <stdint.h>",
            "",
            f"#define {upper}_INPUT_SIZE {lstm.input_size}",
            f"#define {upper}_OUTPUT_SIZE {output_size}",
            *([] if lstm.static_size is None else [f"#define {upper}_STATIC_SIZE {lstm.static_size}"]),
            "",
            "typedef struct {",
            *self.fields,
            f"}} {name}_state;",
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            f"void {name}_reset({name}_state *s{features});                         /* call before the first step */",
            f"void {name}_step({name}_state *s, const float *x, float *y);",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            *self.constants,
            "",
            *functions,
            f"void {name}_reset({name}_state *s{features})",
            "{",
            f"    int {', '.join(declared[0])};",
            reset,
            "}",
            "",
            f"void {name}_step({name}_state *s, const float *x, float *y)",
            "{",
            f"    int {', '.join(declared[1])};",
            step,
            "}",
            "",
        ])  # fmt: skip


def _mixed(rate: float, new: str, old: str) -> str:
    """Returns the expectation of a value that zoneout keeps at ``rate``."""
    return new if rate == 0 else f"{literal(rate)} * {old} + {literal(1 - rate)} * ({new})"


def _wrap(numbers: Sequence[str], per_line: int = 10) -> str:
    lines = [", ".join(numbers[n : n + per_line]) for n in range(0, len(numbers), per_line)]
    return "{" + ",\n ".join(lines) + "}"


def _polynomial(coefficients: Sequence[float]) -> str:
    expression = literal(coefficients[-1])
    for a in coefficients[-2::-1]:
        expression = f"({expression} * xx + {literal(a)})"
    return expression


def _bits(number: float) -> str:
    return f"{np.float32(number).view(np.uint32):#x}u"


_FUNCTIONS = {
    "tanh": f"""/* A quotient of polynomials, 2e-7 from tanh, of x limited to {LIMIT:g}. Its bits are compared
   as integers because compilers vectorize that. NaN stays NaN. */
static float NAME_tanh(float x)
{{
    union {{ float number; uint32_t bits; }} a;
    uint32_t size, sign;
    float xx;
    a.number = x;
    sign = a.bits & 0x80000000u;
    size = a.bits & 0x7fffffffu;
    size = size > 0x7f800000u ? size : size > {_bits(LIMIT)} ? {_bits(LIMIT)} : size;
    a.bits = sign | size;
    xx = a.number * a.number;
    return a.number * {_polynomial(NUMERATOR)}
        / {_polynomial(DENOMINATOR)};
}}
""",
    "normalize": f"""/* Shifts and scales n numbers to mean 0 and variance 1. */
static void NAME_normalize(int n, float *v)
{{
    float mean = 0.0f, variance = 0.0f, scale = 1.0f, y;
    int i;
    for (i = 0; i < n; ++i) mean += v[i];
    mean /= (float)n;
    for (i = 0; i < n; ++i) {{
        v[i] -= mean;
        variance += v[i] * v[i];
    }}
    variance = variance / (float)n + {literal(EPSILON)};
    if (variance <= 3.0e38f) {{ /* Newton's iterations for 1 / sqrt(variance), first scaled to 1..4 */
        while (variance > 4.0f) {{
            variance *= 0.25f;
            scale *= 0.5f;
        }}
        while (variance < 1.0f) {{
            variance *= 4.0f;
            scale *= 2.0f;
        }}
        y = (7.0f - variance) / 6.0f;
        for (i = 0; i < 4; ++i) y *= 1.5f - 0.5f * variance * y * y;
        scale *= y;
    }} else {{
        scale = variance - variance; /* NaN for NaN and infinity */
    }}
    for (i = 0; i < n; ++i) v[i] *= scale;
}}
""",
}
