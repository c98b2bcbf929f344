"""Builds the benchmarks: jaxlstm and its peers, each running one LSTM or GRU layer over a batch of sequences.

A builder imports its library, creates parameters and inputs, and returns the forward pass; `jax_benchmark` adds the
training step, the same for all JAX libraries. Libraries that are time-major get time-major inputs and libraries that
are batch-major get batch-major inputs, so no benchmark includes a transposition that its library does not require.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxlstm


class Shape(NamedTuple):
    """Sizes of a benchmark."""

    num_steps: int  # T
    batch_size: int  # B
    input_size: int  # I
    hidden_size: int  # H

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses ``T,B,I,H``.

        Raises:
          ValueError: if ``text`` is not four positive integers.
        """
        sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"a shape is four positive integers T,B,I,H, got {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return ",".join(map(str, self))


@dataclass(frozen=True)
class Benchmark:
    """One library at one shape. Calls return after their result has been computed."""

    name: str
    train: Callable[[], tuple[Any, list[Any]]]  # () -> (loss, gradients), the gradient of the inputs last
    infer: Callable[[], Any]  # () -> outputs
    output_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    to_numpy: Callable[[Any], np.ndarray]
    lower: Callable[[], Any] | None = None  # () -> lowered training step; None for PyTorch

    def check(self) -> None:
        """Runs the training step and inference, and checks their results.

        Raises:
          ValueError: if a result has an unexpected shape, is not finite, or is zero everywhere.
        """
        loss, grads = self.train()
        *_, d_xs = grads
        expected = [("outputs", self.infer(), self.output_shape), ("loss", loss, ()), ("d_xs", d_xs, self.input_shape)]
        for name, array, shape in expected:
            if tuple(array.shape) != shape:
                raise ValueError(f"{name} of shape {tuple(array.shape)}, expected {shape}")
        for name, array in [(name, array) for name, array, _ in expected] + [("a gradient", grad) for grad in grads]:
            array = self.to_numpy(array)
            if not np.isfinite(array).all() or not array.any():
                raise ValueError(f"{name} of shape {array.shape} is zero or not finite")


class ForwardPass(NamedTuple):
    """A forward pass in JAX with its arguments."""

    apply: Callable[[Any, jax.Array], jax.Array]  # (params, xs) -> outputs
    params: Any
    xs: jax.Array
    batch_major: bool = False


def random_inputs(shape: Shape, batch_major: bool = False) -> jax.Array:
    """Returns normal inputs ``(T, B, I)``, or ``(B, T, I)`` if ``batch_major``."""
    sizes = (shape.num_steps, shape.batch_size)
    return jax.random.normal(jax.random.key(1), (*(sizes[::-1] if batch_major else sizes), shape.input_size))


def build_jaxlstm(
    shape: Shape, dtype: Any = None, vmap: bool = False, shard_batch: bool = False, **options: Any
) -> ForwardPass:
    """Builds `jaxlstm.LSTM`.

    Args:
      shape: sizes of the benchmark.
      dtype: of inputs and matrix products; None for float32.
      vmap: whether to map the call for one sequence over the batch with `jax.vmap`.
      shard_batch: whether to shard the batch over all devices, by the sharding of the inputs alone.
      **options: of `jaxlstm.LSTM`.
    """
    lstm = jaxlstm.LSTM(shape.input_size, shape.hidden_size, dtype=dtype, **options)
    params = lstm.init(jax.random.key(0))
    xs = random_inputs(shape).astype(dtype or jnp.float32)
    if shard_batch:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        xs = jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "data")))

    def apply(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        if vmap:
            return jax.vmap(lambda x: lstm(params, x)[0], in_axes=1, out_axes=1)(xs)
        return lstm(params, xs)[0]

    return ForwardPass(apply, params, xs)


def build_flax_nnx(shape: Shape, cell: str) -> ForwardPass:
    """Builds a cell of `flax.nnx` in `nnx.RNN`."""
    nnx: Any = import_module("flax.nnx")
    rnn = nnx.RNN(
        getattr(nnx, cell)(shape.input_size, shape.hidden_size, rngs=nnx.Rngs(0)), time_major=True, rngs=False
    )
    graph, params = nnx.split(rnn)

    def apply(params: Any, xs: jax.Array) -> jax.Array:
        # Without an initial carry the layer advances a random number generator, which a pure function cannot.
        zeros = jnp.zeros((shape.batch_size, shape.hidden_size))
        carry = zeros if cell == "GRUCell" else (zeros, zeros)
        return nnx.merge(graph, params)(xs, initial_carry=carry)

    return ForwardPass(apply, params, random_inputs(shape))


def build_flax_linen(shape: Shape, cell: str) -> ForwardPass:
    """Builds a cell of `flax.linen` in `nn.RNN`."""
    nn: Any = import_module("flax.linen")
    rnn = nn.RNN(getattr(nn, cell)(shape.hidden_size), time_major=True)
    xs = random_inputs(shape)
    return ForwardPass(rnn.apply, rnn.init(jax.random.key(0), xs), xs)


def build_haiku(shape: Shape, cell: str) -> ForwardPass:
    """Builds `hk.LSTM` or `hk.GRU` under `hk.dynamic_unroll`."""
    hk: Any = import_module("haiku")

    def unroll(xs: jax.Array) -> jax.Array:
        core = getattr(hk, cell)(shape.hidden_size)
        return hk.dynamic_unroll(core, xs, core.initial_state(shape.batch_size))[0]

    net = hk.without_apply_rng(hk.transform(unroll))
    xs = random_inputs(shape)
    return ForwardPass(net.apply, net.init(jax.random.key(0), xs), xs)


def build_equinox(shape: Shape, cell: str) -> ForwardPass:
    """Builds a cell of `eqx.nn`, mapped over the batch, under `jax.lax.scan`."""
    eqx: Any = import_module("equinox")
    module = getattr(eqx.nn, cell)(shape.input_size, shape.hidden_size, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(params: Any, xs: jax.Array) -> jax.Array:
        batched_cell = jax.vmap(eqx.combine(params, static))

        def scan_fn(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            state = batched_cell(x, state)
            return state, state if cell == "GRUCell" else state[0]

        zeros = jnp.zeros((shape.batch_size, shape.hidden_size))
        return jax.lax.scan(scan_fn, zeros if cell == "GRUCell" else (zeros, zeros), xs)[1]

    return ForwardPass(apply, params, random_inputs(shape))


def build_keras(shape: Shape, cell: str) -> ForwardPass:
    """Builds `keras.layers.LSTM` or `keras.layers.GRU` on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    keras: Any = import_module("keras")
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras was imported with the backend {keras.backend.backend()!r}")
    layer = getattr(keras.layers, cell)(shape.hidden_size, return_sequences=True)
    layer.build((shape.batch_size, shape.num_steps, shape.input_size))
    non_trainable = [v.value for v in layer.non_trainable_variables]
    params = [v.value for v in layer.trainable_variables]
    xs = random_inputs(shape, batch_major=True)
    return ForwardPass(
        lambda params, xs: layer.stateless_call(params, non_trainable, xs)[0], params, xs, batch_major=True
    )


def jax_benchmark(build: Callable[[Shape], ForwardPass], name: str, shape: Shape) -> Benchmark:
    """Compiles a forward pass, and the value and gradient of ``sum(outputs**2)`` for parameters and inputs."""
    apply, params, xs, batch_major = build(shape)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(apply(params, xs).astype(jnp.float32)))

    train_step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    forward = jax.jit(apply)

    def train() -> tuple[Any, list[Any]]:
        value, grads = jax.block_until_ready(train_step(params, xs))
        return value, jax.tree.leaves(grads)

    leading = (shape.batch_size, shape.num_steps) if batch_major else (shape.num_steps, shape.batch_size)
    return Benchmark(
        name=name,
        train=train,
        infer=lambda: jax.block_until_ready(forward(params, xs)),
        output_shape=(*leading, shape.hidden_size),
        input_shape=xs.shape,
        to_numpy=partial(np.asarray, dtype=np.float32),
        lower=partial(train_step.lower, params, xs),
    )


def load_torch() -> tuple[Any, str, Callable[[], None]]:
    """Imports PyTorch with one thread per core.

    Returns:
      the module, the device that matches JAX's backend, and a function that waits for that device.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    torch: Any = import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    if jax.default_backend() != "cpu" and torch.cuda.is_available():
        return torch, "cuda", torch.cuda.synchronize
    return torch, "cpu", lambda: None


def torch_benchmark(dtype: str, cell: str, name: str, shape: Shape) -> Benchmark:
    """Builds `torch.nn.LSTM` or `torch.nn.GRU` in eager mode, with the loss of `jax_benchmark`."""
    torch, device, synchronize = load_torch()
    options = {"device": device, "dtype": getattr(torch, dtype)}
    layer = getattr(torch.nn, cell)(shape.input_size, shape.hidden_size, **options)
    xs = torch.randn(shape.num_steps, shape.batch_size, shape.input_size, **options)
    xs_with_grad = xs.clone().requires_grad_()
    variables = [*layer.parameters(), xs_with_grad]

    def train() -> tuple[Any, list[Any]]:
        loss = layer(xs_with_grad)[0].float().square().sum()
        grads = torch.autograd.grad(loss, variables)
        synchronize()
        return loss.detach(), list(grads)

    def infer() -> Any:
        with torch.no_grad():
            ys = layer(xs)[0]
        synchronize()
        return ys

    output_shape = (shape.num_steps, shape.batch_size, shape.hidden_size)
    return Benchmark(name, train, infer, output_shape, tuple(xs.shape), lambda a: a.float().cpu().numpy())


Builder = Callable[[str, Shape], Benchmark]

# Names of benchmarks; they are keys in results/*.json.
JAXLSTM, JAXLSTM_SCAN, JAXLSTM_BF16 = "jaxlstm fused", "jaxlstm scan", "jaxlstm fused bf16"
JAXLSTM_SHARDED = "jaxlstm fused, batch over devices"
JAXLSTM_REMAT, JAXLSTM_VMAP = "jaxlstm fused remat=32", "jaxlstm fused vmap"
TORCH, TORCH_BF16 = "torch float32", "torch bfloat16"

CellName = Literal["lstm", "gru"]
FLAX_CELLS: dict[CellName, dict[str, tuple[str, ...]]] = {
    "lstm": {"nnx": ("LSTMCell", "OptimizedLSTMCell"), "linen": ("OptimizedLSTMCell",)},
    "gru": {"nnx": ("GRUCell",), "linen": ("GRUCell",)},
}


def flax_builders(cell: CellName) -> dict[str, Builder]:
    """Returns the builders of the cells of Flax."""
    build = {"nnx": build_flax_nnx, "linen": build_flax_linen}
    return {
        f"{api} {name}": partial(jax_benchmark, partial(build[api], cell=name))
        for api, names in FLAX_CELLS[cell].items()
        for name in names
    }


def jax_peers(cell: CellName) -> dict[str, Builder]:
    """Returns the builders of the other JAX libraries."""
    upper = cell.upper()
    return {
        **flax_builders(cell),
        "haiku": partial(jax_benchmark, partial(build_haiku, cell=upper)),
        "equinox": partial(jax_benchmark, partial(build_equinox, cell=f"{upper}Cell")),
        "keras": partial(jax_benchmark, partial(build_keras, cell=upper)),
    }


def builders(cell: CellName) -> dict[str, Builder]:
    """Returns the builders of all benchmarks."""
    ours = {
        JAXLSTM: {"implementation": "fused"},
        JAXLSTM_SCAN: {"implementation": "scan"},
        JAXLSTM_BF16: {"implementation": "fused", "dtype": jnp.bfloat16},
        JAXLSTM_SHARDED: {"implementation": "fused", "shard_batch": True},
        JAXLSTM_REMAT: {"implementation": "fused", "remat": 32},
        JAXLSTM_VMAP: {"implementation": "fused", "vmap": True},
    }
    return {
        **{name: partial(jax_benchmark, partial(build_jaxlstm, cell=cell, **o)) for name, o in ours.items()},
        **jax_peers(cell),
        TORCH: partial(torch_benchmark, "float32", cell.upper()),
        TORCH_BF16: partial(torch_benchmark, "bfloat16", cell.upper()),
    }


FLAX, JAX_PEERS, BUILDERS = flax_builders("lstm"), jax_peers("lstm"), builders("lstm")


class Registry:
    """Builds the selected benchmarks and records the peers that were left out.

    Args:
      only: words; a peer is selected if its name contains one of them. Empty selects all. jaxlstm is always selected.
      print_line: called with one line for each peer that is left out.
      cell: what the layer is made of.
    """

    def __init__(self, only: Iterable[str], print_line: Callable[[str], None], cell: CellName = "lstm") -> None:
        self.flax, self.jax_peers, self.builders = flax_builders(cell), jax_peers(cell), builders(cell)
        self.skipped: dict[str, str] = {}  # name -> reason
        self._only = [word.lower() for word in only]
        self._print_line = print_line

    def build(self, names: Iterable[str], shape: Shape, *, execute: bool = True) -> list[Benchmark]:
        """Builds the named benchmarks that are selected. A peer that fails is left out of this and all later calls.

        Args:
          names: keys of ``builders``.
          shape: sizes of the benchmark.
          execute: whether to run and check each benchmark; otherwise its training step is only lowered.
        """
        benchmarks = []
        for name in names:
            if name in self.skipped or not self._is_selected(name):
                continue
            if name == JAXLSTM_SHARDED and (jax.device_count() == 1 or shape.batch_size % jax.device_count()):
                continue  # the batch does not divide over several devices
            try:
                benchmark = self.builders[name](name, shape)
                if execute:
                    benchmark.check()
                elif benchmark.lower is not None:
                    benchmark.lower()
            except Exception as error:  # an error in another library must not stop the comparison
                self._skip(name, error)
            else:
                benchmarks.append(benchmark)
        return benchmarks

    def _is_selected(self, name: str) -> bool:
        return not self._only or name.startswith("jaxlstm") or any(word in name.lower() for word in self._only)

    def _skip(self, name: str, error: Exception) -> None:
        if name.startswith("jaxlstm"):
            raise error
        first_line = (str(error).splitlines() or [""])[0]
        missing = isinstance(error, ImportError)
        self.skipped[name] = ("not installed: " if missing else f"failed, {type(error).__name__}: ") + first_line
        self._print_line(f"{name}: {self.skipped[name]}")
