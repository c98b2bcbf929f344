"""Compiles, checks and times the candidates of a network: `autotune`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxlstm import validation
from jaxlstm.autotuning.agreement import relative_error, tolerance
from jaxlstm.autotuning.candidates import Candidate, list_candidates
from jaxlstm.autotuning.search import search
from jaxlstm.autotuning.tuning import Tuning, device_name
from jaxlstm.params import Params
from jaxlstm.rnn import RATES, RNN

MATRICES = ("w_x", "w_h", "w_p", "w_s")  # of `jaxlstm.params.Weights`


def autotune(lstm: RNN, xs_shape: tuple[int, ...], *, training: bool = True, seconds: float = 20.0) -> Tuning:
    """Finds the fastest backend, layout and number of steps per iteration of a network, by measurement on this device.

        tuning = jaxlstm.autotune(lstm, xs.shape)
        print(tuning)  # a row per candidate
        ys, state = tuning.lstm(params, xs)  # the same parameters, the same results up to rounding

    Candidates are the backends that do not refuse the network, the layouts of `jaxlstm.recurrence.fused.Fused` with
    1, 2 or 4 steps per iteration, and on a CPU `jaxlstm.recurrence.scan.Scan(concatenate=True)`. The outputs, the final
    state and, in training, the gradients of each are compared with ``"scan"`` in float32, or float64 for a network with
    float64; one that differs by more than the tolerance of its dtype is reported and never chosen. The default and
    ``"scan"`` are always tried, and a candidate that is not faster than the default by more than 2 % is not chosen.

    Programs run on random inputs without lengths, masks and resets; in training with a key, if a regularizer is on. An
    experimental backend that is chosen may refuse a call with masks. The choice is for these shapes on this device;
    other shapes run, at another speed. Call it outside of `jax.jit`. Nothing is written: see `Tuning.save`.

    Args:
      lstm: a `jaxlstm.LSTM`.
      xs_shape: ``(T, *batch, I)``, at least one step and one sequence.
      training: whether to time a value and gradient with respect to parameters and inputs; otherwise a call.
      seconds: seconds for the search, compilation included. They are exceeded if they are too few to compile and run
        the default and ``"scan"``, or if the last candidate takes longer than those before it.

    Raises:
      TypeError: if ``lstm`` is not a `jaxlstm.LSTM`, or for an argument of the wrong type.
      ValueError: for a wrong shape, or ``seconds`` that are not positive and finite.
      RuntimeError: if no candidate gives correct results, or inside of `jax.jit`.
    """
    return tune(lstm, xs_shape, training=training, seconds=seconds, experimental=True)


def tune(lstm: RNN, xs_shape: tuple[int, ...], *, training: bool, seconds: float, experimental: bool) -> Tuning:
    """Does the work of `autotune`; with ``experimental=False`` the experimental backends are no candidates."""
    start = time.perf_counter()
    if isinstance(jnp.zeros(()), Tracer):  # constants are traced inside of jax.jit
        raise RuntimeError("jaxlstm.autotune runs programs to time them: call it outside of jax.jit")
    xs_shape = _check_arguments(lstm, xs_shape, seconds)
    training = validation.flag("training", training)
    args = _draw_args(lstm, xs_shape, training=training)
    compiled: dict[RNN, Callable[[], Any]] = {}

    def compile_network(network: RNN, args: ProgramArgs) -> Callable[[], Any]:
        if network not in compiled:
            program = _training_program(network) if training else _inference_program(network)
            executable = program.lower(*args).compile()
            compiled[network] = lambda: jax.block_until_ready(executable(*args))
        return compiled[network]

    def compile_candidate(candidate: Candidate) -> Callable[[], Any]:
        return compile_network(with_candidate(lstm, candidate), args)

    wide = lstm.state_dtype
    reference = validation.replace_quietly(lstm, implementation="scan", dtype=wide, param_dtype=wide)
    if reference.dtype == lstm.output_dtype and reference.param_dtype == lstm.param_dtype:
        reference = with_candidate(lstm, Candidate("scan", lstm.unroll))  # also a candidate: compiled once
    expected = jax.device_get(compile_network(reference, args.astype(wide))())
    result = search(
        list_candidates(lstm, xs_shape, training=training, experimental=experimental),
        compile_candidate,
        lambda actual: relative_error(actual, expected),
        tolerance=tolerance(lstm, xs_shape),
        seconds=seconds,
        start=start,
        clock=time.perf_counter,
    )
    return Tuning(
        with_candidate(lstm, result.chosen), result.trials, xs_shape, training, device_name(), jax.__version__
    )


def _check_arguments(lstm: Any, xs_shape: Any, seconds: Any) -> tuple[int, ...]:
    """Returns ``xs_shape`` as a tuple of ints."""
    if not isinstance(lstm, RNN):
        raise TypeError(f"lstm must be a jaxlstm.LSTM, got {type(lstm).__name__}")
    if validation.number("seconds", seconds) <= 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    sizes = validation.sizes("xs_shape", xs_shape)
    if len(sizes) < 2 or sizes[-1] != lstm.input_size:
        raise ValueError(f"xs_shape must be (T, *batch, {lstm.input_size}), got {sizes}")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"xs_shape must have at least one step and one sequence, got {sizes}")
    validation.available("param_dtype", jnp.dtype(lstm.param_dtype))
    validation.available("dtype", lstm.output_dtype)
    return sizes


def with_candidate(lstm: RNN, candidate: Candidate) -> RNN:
    """Returns the network with the backend and the steps per iteration of a candidate."""
    return validation.replace_quietly(lstm, implementation=candidate.implementation, unroll=candidate.unroll)


# Programs


class ProgramArgs(NamedTuple):
    """Arguments of a program."""

    params: Params
    xs: Array  # (T, *batch, I)
    cotangent: Array | None  # (T, *batch, D*P), of the outputs; None without derivatives
    key: Array | None
    static: Array | None = None  # (*batch, S), for a cell that reads static features

    def astype(self, dtype: jnp.dtype) -> "ProgramArgs":
        """Returns parameters, inputs and static features in another dtype."""
        params, xs, static = jax.tree.map(lambda a: a.astype(dtype), (self.params, self.xs, self.static))
        return self._replace(params=params, xs=xs, static=static)


def _draw_args(lstm: RNN, xs_shape: tuple[int, ...], *, training: bool) -> ProgramArgs:
    """Draws parameters and normal inputs, by NumPy: to compile `LSTM.init` takes longer than to compile a candidate.

    Matrices are uniform within ±1/sqrt(columns). All other arrays are around 0.5, so that each of them matters.
    """
    rng = np.random.default_rng(0)

    def normal(shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    def draw(path: Any, a: Any) -> Array:
        if jax.tree_util.keystr(path, simple=True, separator=".").split(".")[-1] in MATRICES:
            return jnp.asarray(rng.uniform(-1.0, 1.0, a.shape) * a.shape[-1] ** -0.5, a.dtype)
        return jnp.asarray(0.5, a.dtype) + jnp.asarray(0.1, a.dtype) * normal(a.shape, a.dtype)

    params = jax.tree.map_with_path(draw, lstm.param_shapes())
    xs = normal(xs_shape, lstm.param_dtype)
    static = None if lstm.static_size is None else normal((*xs_shape[1:-1], lstm.static_size), lstm.param_dtype)
    if not training:
        return ProgramArgs(params, xs, None, None, static)
    cotangent = normal((*xs_shape[:-1], lstm.num_directions * lstm.output_size), lstm.state_dtype)
    is_regularized = any(getattr(lstm, rate) for rate in RATES)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than the default generator
    return ProgramArgs(params, xs, cotangent, key if is_regularized else None, static)


def _inference_program(lstm: RNN) -> Any:
    """Returns a compiled call, which computes outputs and final state."""
    return jax.jit(lambda params, xs, cotangent, key, static: lstm(params, xs, key=key, static=static))


def _training_program(lstm: RNN) -> Any:
    """Returns a compiled function of outputs, final state, and the gradients of parameters and inputs."""

    def loss(params: Params, xs: Array, cotangent: Array, key: Any, static: Any) -> tuple[Array, Any]:
        ys, state = lstm(params, xs, key=key, static=static)
        return (ys.astype(cotangent.dtype) * cotangent).sum(), (ys, state)

    def results(params: Params, xs: Array, *rest: Any) -> Any:
        (_, outputs), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, xs, *rest)
        return outputs, gradients  # without the loss, a sum in which terms cancel: it says little about errors

    return jax.jit(results)
