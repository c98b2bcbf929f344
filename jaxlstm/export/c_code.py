"""Writes one step of a network as a C99 file without dependencies."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import ArrayLike, Float

from jaxlstm import validation
from jaxlstm.cells import Cell
from jaxlstm.export.c_expressions import Block, literal
from jaxlstm.params import Params, Weights
from jaxlstm.recurrence.cpu_activations import DENOMINATOR, LIMIT, NUMERATOR
from jaxlstm.recurrence.gates import evaluate_cell
from jaxlstm.recurrence.step import EPSILON
from jaxlstm.rnn import RNN

Readout = tuple[Float[ArrayLike, "O P"], Float[ArrayLike, "O"] | None]

_LARGEST_INT8 = 127


def to_c(
    lstm: RNN, params: Params, *, name: str = "lstm", readout: Readout | None = None, quantize: str | None = None
) -> str:
    """Writes ``lstm.step`` for one sequence as a C99 file, for microcontrollers and other programs without Python.

    The file contains the weights as constants and needs no library, except math.h if the gates of a user-defined cell
    call one of its functions. It allocates no memory, and it is valid C++. It defines, with ``name`` as prefix::

        typedef struct { ... } lstm_state;
        void lstm_reset(lstm_state *s);                                 zeros, or the learned initial state
        void lstm_step(lstm_state *s, const float *x, float *y);        x[LSTM_INPUT_SIZE], y[LSTM_OUTPUT_SIZE]

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
        w_p = None if weights.w_p is None else rounded(weights.w_p)
        return weights._replace(w_x=rounded(weights.w_x), w_h=rounded(weights.w_h), w_p=w_p)

    lstm = RNN(
        lstm.input_size, lstm.hidden_size, num_layers=lstm.num_layers, cell=lstm.cell, use_bias=lstm.use_bias,
        learned_state=lstm.learned_state, proj_size=lstm.proj_size, layer_norm=lstm.layer_norm,
        activation=lstm.activation, zoneout_h=lstm.zoneout_h, zoneout_c=lstm.zoneout_c,
    )  # fmt: skip
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    layers = tuple(layer._replace(forward=round_matrices(layer.forward)) for layer in params.layers)
    xs = np.random.default_rng(0).standard_normal((num_steps, lstm.input_size)).astype(np.float32)
    exact, approximate = lstm(params, xs)[0], lstm(params._replace(layers=layers), xs)[0]
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
        cell, units = lstm.resolved_cell, lstm.hidden_size
        rows = cell.num_gates * units
        self.add_field(f"h{n}", lstm.output_size)
        if cell.has_cell_state:
            self.add_field(f"c{n}", units)
        self.emit(0, f"{{ /* layer {n} */")
        z_x = self.add_product(f"w_x{n}", weights.w_x, x, "z")
        z_h = self.add_product(f"w_h{n}", weights.w_h, f"s->h{n}", "z_h")
        bias = "" if weights.b is None else f" + {self.add_array(f'b{n}', weights.b)}[r]"
        if weights.norm is not None:
            for product, array in ((z_x, "z"), (z_h, "z_h")):
                if self.int8:
                    self.emit(1, f"for (r = 0; r < {rows}; ++r) {array}[r] = {product};")
                self.emit(1, f"{self.name}_normalize({rows}, {array});")
            z_x = f"z[r] * {self.add_array(f'gain_x{n}', weights.norm.x)}[r]"
            z_h = f"z_h[r] * {self.add_array(f'gain_h{n}', weights.norm.h)}[r]"
        self.emit(1, f"for (r = 0; r < {rows}; ++r) z[r] = {z_x} + {z_h}{bias};")
        self.num_operations += 2 * rows
        self.add_gates(n, lstm, cell, weights)
        self.emit(0, "}")

    def add_gates(self, n: int, lstm: RNN, cell: Cell, weights: Weights) -> None:
        """Adds the elementwise part of a layer."""
        units, norm = lstm.hidden_size, weights.norm
        z = [f"z[{gate * units} + j]" if gate else "z[j]" for gate in range(cell.num_gates)]
        c = [f"s->c{n}[j]"] if cell.has_cell_state else None
        peepholes = None
        if weights.w_c is not None:
            array = self.add_array(f"w_c{n}", weights.w_c)
            peepholes = [f"{array}[{k}][j]" for k in range(len(cell.peepholes))]

        def gates(z: Array, c: Array | None, peepholes: Array | None, **options: Any) -> tuple[Array | None, Array]:
            return evaluate_cell(cell, z, None if c is None else c[0], peepholes, **options)

        h, old_h = f"s->h{n}[j]", f"s->h{n}[j]"
        output = "u[j]" if weights.w_p is not None else None
        if output:
            self.emit(1, f"float u[{units}];")

        def store_h(value: str) -> str:
            return f"{output} = {value};" if output else f"{h} = {_mixed(lstm.zoneout_h, value, old_h)};"

        if norm is None or norm.c is None:
            block = Block(lambda *args: [a for a in gates(*args) if a is not None], z, c, peepholes)
            stores = [store_h(block.results[-1])]
            if c is not None:
                stores.insert(0, f"{c[0]} = {_mixed(lstm.zoneout_c, block.results[0], c[0])};")
            self.add_loop(units, block, stores)
        else:
            assert c is not None
            self.emit(1, f"float new_c[{units}], normalized_c[{units}];")
            block = Block(lambda *args: gates(*args)[0], z, c, peepholes)
            self.add_loop(units, block, [f"new_c[j] = normalized_c[j] = {block.results[0]};"])
            self.emit(1, f"{self.name}_normalize({units}, normalized_c);")
            shift = "" if norm.b_c is None else f" + {self.add_array(f'shift_c{n}', norm.b_c)}[j]"
            normalized = [f"(normalized_c[j] * {self.add_array(f'gain_c{n}', norm.c)}[j]{shift})"]
            block = Block(lambda z, c, w, u: gates(z, c, w, normalize=lambda _: u[0])[1], z, c, peepholes, normalized)
            stores = [store_h(block.results[0]), f"{c[0]} = {_mixed(lstm.zoneout_c, 'new_c[j]', c[0])};"]
            self.add_loop(units, block, stores)
        if weights.w_p is not None:
            product = self.add_product(f"w_p{n}", weights.w_p, "u", "p").replace("[r]", "[j]")
            self.emit(1, f"for (j = 0; j < {lstm.output_size}; ++j) {h} = {_mixed(lstm.zoneout_h, product, old_h)};")

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
            expression += f" * {self.add_array(label + '_scale', scale)}[r]"
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
        """Adds the initial state: zeros, or the learned one."""
        for n in range(lstm.num_layers):
            for field in ("h", "c") if lstm.resolved_cell.has_cell_state else ("h",):
                value = "0.0f"
                size = lstm.output_size if field == "h" else lstm.hidden_size
                if params.state is not None:
                    value = self.add_array(f"initial_{field}{n}", getattr(params.state, field)[n]) + "[j]"
                self.reset.append(f"    for (j = 0; j < {size}; ++j) s->{field}{n}[j] = {value};")

    def emit(self, depth: int, line: str) -> None:
        """Adds a line to the body of the step."""
        self.step.append("    " * (depth + 1) + line)

    def text(self, lstm: RNN, output_size: int, error: float | None) -> str:
        """Returns the whole file."""
        name, upper, step = self.name, self.name.upper(), "\n".join(self.step)
        declared = [v for v in "jkr" if re.search(rf"\bfor \({v} = ", step)]
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
            "",
            "typedef struct {",
            *self.fields,
            f"}} {name}_state;",
            "",
            "#ifdef __cplusplus",
            'extern "C" {',
            "#endif",
            f"void {name}_reset({name}_state *s);                         /* call before the first step */",
            f"void {name}_step({name}_state *s, const float *x, float *y);",
            "#ifdef __cplusplus",
            "}",
            "#endif",
            "",
            *self.constants,
            "",
            *functions,
            f"void {name}_reset({name}_state *s)",
            "{",
            "    int j;",
            *self.reset,
            "}",
            "",
            f"void {name}_step({name}_state *s, const float *x, float *y)",
            "{",
            f"    int {', '.join(declared)};",
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
