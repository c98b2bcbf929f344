"""The C file of `jaxlstm.export.to_c`, compiled with warnings as errors and sanitizers, against the library."""

import re
import shutil
import subprocess
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlstm
from jaxlstm.export import to_c
from jaxlstm.export.c_expressions import literal

I, H = 3, 5  # noqa: E741 (shape letter)
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WARN = ("-Wall", "-Wextra", "-Werror", "-pedantic")
MAIN = """
#include <stdio.h>
int main(void)
{
    net_state s;
    float x[NET_INPUT_SIZE], y[NET_OUTPUT_SIZE];
#ifdef NET_STATIC_SIZE
    float features[NET_STATIC_SIZE];
    if (fread(features, sizeof features[0], NET_STATIC_SIZE, stdin) != NET_STATIC_SIZE) return 1;
    net_reset(&s, features);
#else
    net_reset(&s);
#endif
    while (fread(x, sizeof x[0], NET_INPUT_SIZE, stdin) == NET_INPUT_SIZE) {
        net_step(&s, x, y);
        fwrite(y, sizeof y[0], NET_OUTPUT_SIZE, stdout);
    }
    return 0;
}
"""


# A user-defined cell of comparisons, selections and functions of math.h.


def unusual_update(f, u, v, c):
    i = jnp.exp(-jnp.square(u)) / (1 + jnp.abs(jnp.sin(v)) ** 3)
    return jnp.where(f > 0.5, f * c + i * jax.nn.relu(u), jnp.minimum(f * c, jnp.sqrt(i)))


def unusual_output(u, v, c):
    return jnp.sign(v) * jnp.tanh(jnp.log1p(c * c)) - 0.1 * jax.nn.sigmoid(u)


UNUSUAL_CELL = jaxlstm.Cell(
    gates={"f": lambda z: jnp.clip(0.25 * z + 0.5, 0, 1), "u": None, "v": None},
    update=unusual_update,
    output=unusual_output,
)

# Two states that take each other's place, neither of which is computed.
SWAPPED_CELL = jaxlstm.Cell(
    gates={"a": jnp.tanh, "b": None},
    update=lambda c, n: (n, c),
    output=lambda a, b, c, n, h: a * c / (2.0 + jnp.abs(b)) - 0.1 * n + 0.2 * h,
    reads={"b": ("x",)},
    state={"c": 0.5, "n": -1.5},
)

NETWORKS = {
    "lstm": {},
    "all options": {
        "cell": "peephole", "num_layers": 2, "proj_size": 2, "layer_norm": True, "learned_state": True,
        "zoneout_h": 0.3, "zoneout_c": 0.2, "dropout": 0.5,
    },
    "user-defined cell": {"cell": UNUSUAL_CELL},
    "peephole without bias": {"cell": "peephole", "use_bias": False},
    "cifg wide projection": {"cell": "cifg", "proj_size": 6, "zoneout_h": 0.1},
    "rnn": {"cell": "rnn", "num_layers": 2},
    "rnn relu": {"cell": "rnn", "activation": "relu"},
    "rnn sigmoid layer norm": {"cell": "rnn", "activation": "sigmoid", "layer_norm": True, "use_bias": False},
    "layer norm": {"layer_norm": True},
    "gru": {"cell": "gru", "num_layers": 2},
    "gru layer norm": {"cell": "gru", "layer_norm": True, "learned_state": True, "zoneout_h": 0.2},
    "gru heads": {"cell": "gru", "heads": 2, "use_bias": False, "hidden_size": 6},
    "slstm": {"cell": "slstm", "proj_size": 3, "num_layers": 2},
    "slstm heads": {"cell": "slstm", "heads": 2, "hidden_size": 6},
    "minlstm": {"cell": "minlstm", "num_layers": 2, "zoneout_h": 0.2},
    "mingru": {"cell": "mingru", "layer_norm": True, "learned_state": True},
    "indrnn": {"cell": "indrnn"},
    "paralstm": {"cell": "paralstm", "learned_state": True, "num_layers": 2, "zoneout_c": 0.2},
    "paralstm layer norm": {"cell": "paralstm", "layer_norm": True, "hidden_size": 7},
    "ea": {"cell": "ea", "static_size": 2, "num_layers": 2, "proj_size": 3},
    "user-defined states": {"cell": SWAPPED_CELL, "learned_state": True, "heads": 5},
}  # fmt: skip
IN_DEFAULT_TIER = ("lstm", "user-defined cell", "slstm heads")
every_network = pytest.mark.parametrize(
    "name", [name if name in IN_DEFAULT_TIER else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")


def make(name, **options):
    """Makes a network in float32 with biases, peepholes, gains and learned states that differ from their start."""
    lstm = jaxlstm.LSTM(I, **{"hidden_size": H, **NETWORKS[name], **options})
    noise = cases.random_params(lstm, np.random.default_rng(len(name)), np.float32)
    return lstm, jax.tree.map(lambda a, b: a + 0.3 * b, lstm.init(jax.random.key(0)), noise)


def run_c(tmp_path, source, xs, output_size, *flags, compiler="gcc", main=MAIN, static=()):
    """Compiles a file and runs it over a sequence, after a reset with the static features."""
    (tmp_path / "net.c").write_text(source + main)
    language = ("-x", "c++") if compiler == "g++" else ("-std=c99",)
    command = [compiler, *language, *WARN, *flags, str(tmp_path / "net.c"), "-o", str(tmp_path / "net"), "-lm"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    data = b"".join(np.asarray(a, np.float32).tobytes() for a in (static, xs))
    result = subprocess.run([tmp_path / "net"], input=data, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    return np.frombuffer(result.stdout, np.float32).reshape(len(xs), output_size)


def inputs(num_steps=1000):
    """A sequence of normal numbers."""
    return np.random.default_rng(1).standard_normal((num_steps, I)).astype(np.float32)


def static_of(lstm):
    """The static features of a network, or no features, as an option of `run_c` and of a call."""
    return {} if lstm.static_size is None else {"static": np.array([0.8, -1.3], np.float32)}


def assert_equal_to_rounding(ys, expected):
    """Compares to 1e-6 of the size of the outputs."""
    expected = np.asarray(expected)
    assert np.sqrt(np.mean((ys - expected) ** 2)) < 1e-6 * np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(ys, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_compiler
@every_network
def test_to_c_equals_library(tmp_path, name):
    lstm, params = make(name)
    static = static_of(lstm)
    ys = run_c(tmp_path, to_c(lstm, params, name="net"), inputs(), lstm.output_size, *SANITIZE, **static)
    assert_equal_to_rounding(ys, lstm(params, inputs(), **static)[0])


@pytest.mark.slow
@needs_compiler
@every_network
def test_to_c_int8_equals_library_with_the_same_weights(tmp_path, name):
    """Weights that are multiples of a scale, with 127 in each row, are not changed by the quantization."""
    lstm, params = make(name)

    def whole(w):
        if w is None or w.shape[1] == 1:  # a diagonal matrix is not quantized
            return w
        integers = np.rint(100 * np.asarray(w)).clip(-127, 127)
        integers[:, 0] = 127
        return jnp.asarray(integers / 256, jnp.float32)

    layers = []
    for w, _ in params.layers:
        layers.append(jaxlstm.Layer(w._replace(**{n: whole(getattr(w, n)) for n in ("w_x", "w_h", "w_p", "w_s")})))
    params = params._replace(layers=tuple(layers))
    source = to_c(lstm, params, name="net", quantize="int8")
    ys = run_c(tmp_path, source, inputs(100), lstm.output_size, *SANITIZE, **static_of(lstm))
    assert_equal_to_rounding(ys, lstm(params, inputs(100), **static_of(lstm))[0])


@needs_compiler
def test_to_c_int8_states_its_error(tmp_path):
    lstm, params = make("lstm")
    source = to_c(lstm, params, name="net", quantize="int8")
    xs = np.random.default_rng(0).standard_normal((1000, I)).astype(np.float32)
    expected = np.asarray(lstm(params, xs)[0])
    ys = run_c(tmp_path, source, xs, H)
    error = np.sqrt(np.mean((ys - expected) ** 2) / np.mean(expected**2))
    assert f"change the outputs by {error:.1e} of their size" in source
    assert 1e-4 < error < 2e-2
    assert "math.h" not in source


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_to_c_readout_equals_product(tmp_path, quantize):
    lstm, params = make("cifg wide projection")
    w, b = np.random.default_rng(2).standard_normal((2, 7, 6)).astype(np.float32)
    w[:, 0] = np.abs(w).max(1)
    source = to_c(lstm, params, name="net", readout=(w, b[:, 0]), quantize=quantize)
    ys = run_c(tmp_path, source, inputs(), 7, *SANITIZE)
    expected = np.asarray(lstm(params, inputs())[0]) @ w.T + b[:, 0]
    assert np.abs(ys - expected).max() < (1e-5 if quantize is None else 0.05) * np.abs(expected).max()
    assert "#define NET_OUTPUT_SIZE 7\n" in source


@needs_compiler
def test_to_c_reset_starts_again(tmp_path):
    lstm, params = make("all options")
    main = MAIN.replace("net_step(&s", "net_reset(&s); net_step(&s")
    ys = run_c(tmp_path, to_c(lstm, params, name="net"), inputs(5), lstm.output_size, main=main)
    expected = [lstm(params, x[None])[0][0] for x in inputs(5)]
    assert_equal_to_rounding(ys, np.stack(expected))


@needs_compiler
def test_to_c_reset_takes_static_features(tmp_path):
    """A reset in the middle starts again with other features."""
    lstm, params = make("ea")
    other = "{ float f[] = {-0.5f, 2.0f}; if (n++ == 3) net_reset(&s, f); } net_step(&s"
    main = MAIN.replace("net_state s;", "net_state s; int n = 0;").replace("net_step(&s", other)
    static = np.array([[0.8, -1.3], [-0.5, 2.0]], np.float32)
    ys = run_c(tmp_path, to_c(lstm, params, name="net"), inputs(6), 3, main=main, static=static[0])
    parts = zip((inputs(6)[:3], inputs(6)[3:]), static)
    assert_equal_to_rounding(ys, np.concatenate([lstm(params, xs, static=features)[0] for xs, features in parts]))


@pytest.mark.slow
@needs_compiler
def test_to_c_step_passes_nan_on(tmp_path):
    lstm, params = make("all options")
    xs = inputs(3)
    xs[1, 0] = np.nan
    ys = run_c(tmp_path, to_c(lstm, params, name="net"), xs, lstm.output_size, *SANITIZE)
    assert np.isfinite(ys[0]).all()
    assert np.isnan(ys[1:]).all()
    xs[1, 0] = np.inf
    expected = np.asarray(jaxlstm.LSTM(I, H)(make("lstm")[1], xs)[0])
    ys = run_c(tmp_path, to_c(*make("lstm"), name="net"), xs, H, *SANITIZE)
    np.testing.assert_allclose(ys, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@needs_compiler
@every_network
@pytest.mark.parametrize("compiler", ["g++", "gcc -m32"])
def test_to_c_compiles_elsewhere(tmp_path, name, compiler):
    compiler, *flags = compiler.split()
    empty = "int main(void) { return 0; }"
    (tmp_path / "empty.c").write_text(empty)
    if subprocess.run(
        [compiler, *flags, "-o", tmp_path / "empty", tmp_path / "empty.c"], capture_output=True
    ).returncode:
        pytest.skip(f"no compiler {compiler} {flags}")
    lstm, params = make(name)
    static, source = static_of(lstm), to_c(lstm, params, name="net")
    ys = run_c(tmp_path, source, inputs(), lstm.output_size, *flags, compiler=compiler, **static)
    assert_equal_to_rounding(ys, lstm(params, inputs(), **static)[0])


def test_to_c_header_states_sizes():
    lstm = jaxlstm.LSTM(16, 64)
    source = to_c(lstm, lstm.init(jax.random.key(0)), name="tiny")
    assert source.startswith("/* One step of LSTM(16, 64), for one sequence.")
    assert f"Weights: {4 * lstm.num_parameters:,} bytes. State: 512 bytes." in source
    assert "#define TINY_INPUT_SIZE 16\n" in source
    assert "math.h" not in source


@pytest.mark.parametrize("number", [0.0, 1.0, -2.5, 1e-30, 3.4028235e38, 0.1, 16777216.0, -1e22])
def test_literal_reads_back(number):
    text = literal(number)
    assert text.endswith("f")
    assert "." in text or "e" in text
    assert np.float32(text.removesuffix("f")) == np.float32(number)


def to_c_of(name="lstm", network=None, params=None, **options):
    """Calls `to_c` with one wrong argument."""
    lstm, right = make("lstm") if network is None else (network, network.init(jax.random.key(0)))
    return lambda: to_c(lstm, right if params is None else params, name=name, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (to_c_of(network=jaxlstm.ConvLSTM(1, 2, 8)), TypeError, "lstm must be a jaxlstm.LSTM, got ConvLSTM"),
        (to_c_of(network=jaxlstm.LSTM(3, 4, bidirectional=True)), ValueError, "needs the whole sequence"),
        (to_c_of(name="2net"), ValueError, "name must be a C identifier, got '2net'"),
        (to_c_of(quantize="int4"), ValueError, "quantize must be one of 'int8'; got 'int4'"),
        (to_c_of(readout=(np.ones((2, 4)), None)), ValueError, r"must have shape \(O, 5\), got \[2, 4\]"),
        (to_c_of(readout=(np.ones((2, 5)), np.ones(3))), ValueError, r"must have shape \[2\], got \[3\]"),
        (to_c_of(readout=np.ones((2, 5))), TypeError, r"readout must be \(weights, bias or None\)"),
        (to_c_of(readout=(np.full((2, 5), np.nan), None)), ValueError, r"readout\[0\] must be finite"),
        (
            to_c_of(network=jaxlstm.LSTM(3, 4, cell=jaxlstm.Cell({"y": jax.lax.lgamma}, lambda y: y))),
            ValueError,
            "got the operation 'lgamma'",
        ),
    ],
)
def test_to_c_rejects(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_to_c_rejects_parameters_that_are_not_finite():
    lstm, params = make("lstm")
    damaged = jax.tree.map(lambda a: a.at[0].set(jnp.inf), params)
    with pytest.raises(ValueError, match=r"params.layers\[0\].forward.w_x must be finite in float32"):
        to_c(lstm, damaged)


@needs_compiler
def test_program_of_the_documentation_prints_the_first_output(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    lstm = jaxlstm.LSTM(4, 16)
    params = lstm.init(jax.random.key(0))
    (tmp_path / "lstm.c").write_text(to_c(lstm, params))
    (tmp_path / "main.c").write_text(re.search(r"```c\n(.*?)```", page, re.DOTALL)[1])
    command = re.search(r"`cc (.*?) && (\./a\.out)`", page)
    subprocess.run(["gcc", *command[1].split(), *WARN], cwd=tmp_path, check=True)
    printed = subprocess.run([command[2]], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    ys, _ = lstm(params, jnp.tile(jnp.eye(4)[0], (10, 1)))
    assert float(printed) == pytest.approx(float(ys[-1, 0]), abs=1e-6)
