"""Who is measured: this library and its peers, each doing the same work, one LSTM layer over a batch of sequences.

A builder imports its library, makes parameters and inputs, and gives the forward pass; the training step is made here,
the same for all. Libraries that lead with time get inputs that lead with time, the others inputs that lead with the
batch, so that no transposition is charged to anybody who did not choose it.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxlstm


class Shape(NamedTuple):
    """The size of the work."""

    steps: int  # T
    rows: int  # B
    inputs: int  # I
    units: int  # H

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``T,B,I,H``."""
        sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError(f"a shape is four positive integers T,B,I,H, got {text!r}")
        return cls(*sizes)

    def __str__(self) -> str:
        return ",".join(map(str, self))


@dataclass(frozen=True)
class Contestant:
    """One library at one shape, ready to run; a call returns when its result is there."""

    name: str
    train: Callable[[], tuple[Any, list[Any]]]  # the value of the loss, and its gradients, that of the inputs last
    infer: Callable[[], Any]  # the outputs
    output_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    to_numpy: Callable[[Any], np.ndarray]
    lower: Callable[[], Any] | None = None  # the training step, lowered and not yet compiled; None outside of JAX

    def check(self) -> None:
        """Run both, and raise `ValueError` unless all is there, of the expected shape, finite and not all zero."""
        value, grads = self.train()
        *_, d_xs = grads
        expected = [("outputs", self.infer(), self.output_shape), ("loss", value, ()), ("d_xs", d_xs, self.input_shape)]
        for what, array, shape in expected:
            if tuple(array.shape) != shape:
                raise ValueError(f"{what} of shape {tuple(array.shape)}, expected {shape}")
        for what, array in [(what, array) for what, array, _ in expected] + [("a gradient", grad) for grad in grads]:
            array = self.to_numpy(array)
            if not np.isfinite(array).all() or not array.any():
                raise ValueError(f"{what} of shape {array.shape} is zero or not finite")


class Program(NamedTuple):
    """A forward pass in JAX."""

    forward: Callable[[Any, jax.Array], jax.Array]  # (params, xs) -> outputs
    params: Any
    xs: jax.Array
    batch_leads: bool = False


def inputs(shape: Shape, batch_leads: bool = False) -> jax.Array:
    """Normal inputs, ``(T, B, I)`` or ``(B, T, I)``."""
    leading = (shape.rows, shape.steps) if batch_leads else (shape.steps, shape.rows)
    return jax.random.normal(jax.random.key(1), (*leading, shape.inputs))


def this_library(
    shape: Shape, dtype: Any = None, one_by_one: bool = False, spread: bool = False, **options: Any
) -> Program:
    """`jaxlstm.LSTM`; ``one_by_one`` maps the call for one sequence over the batch with `jax.vmap`.

    ``spread`` lays the batch over all devices, by the sharding of the inputs and nothing else.
    """
    lstm = jaxlstm.LSTM(shape.inputs, shape.units, dtype=dtype, **options)
    params = lstm.init(jax.random.key(0))
    xs = inputs(shape).astype(dtype or jnp.float32)
    if spread:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        xs = jax.device_put(xs, NamedSharding(mesh, PartitionSpec(None, "data")))

    def forward(params: jaxlstm.Params, xs: jax.Array) -> jax.Array:
        if one_by_one:
            return jax.vmap(lambda x: lstm(params, x)[0], in_axes=1, out_axes=1)(xs)
        return lstm(params, xs)[0]

    return Program(forward, params, xs)


def flax_nnx(shape: Shape, cell: str) -> Program:
    """A cell of `flax.nnx` in `nnx.RNN`."""
    nnx: Any = import_module("flax.nnx")
    rnn = nnx.RNN(getattr(nnx, cell)(shape.inputs, shape.units, rngs=nnx.Rngs(0)), time_major=True, rngs=False)
    graph, params = nnx.split(rnn)

    def forward(params: Any, xs: jax.Array) -> jax.Array:
        zeros = jnp.zeros((shape.rows, shape.units))  # given, because the layer's own would count up a generator
        return nnx.merge(graph, params)(xs, initial_carry=(zeros, zeros))

    return Program(forward, params, inputs(shape))


def flax_linen(shape: Shape) -> Program:
    """`nn.OptimizedLSTMCell` in `nn.RNN`."""
    nn: Any = import_module("flax.linen")
    rnn = nn.RNN(nn.OptimizedLSTMCell(shape.units), time_major=True)
    xs = inputs(shape)
    return Program(rnn.apply, rnn.init(jax.random.key(0), xs), xs)


def haiku(shape: Shape) -> Program:
    """`hk.LSTM` under `hk.dynamic_unroll`."""
    hk: Any = import_module("haiku")

    def unroll(xs: jax.Array) -> jax.Array:
        core = hk.LSTM(shape.units)
        return hk.dynamic_unroll(core, xs, core.initial_state(shape.rows))[0]

    net = hk.without_apply_rng(hk.transform(unroll))
    xs = inputs(shape)
    return Program(net.apply, net.init(jax.random.key(0), xs), xs)


def equinox(shape: Shape) -> Program:
    """`eqx.nn.LSTMCell`, mapped over the batch, under `jax.lax.scan`."""
    eqx: Any = import_module("equinox")
    cell = eqx.nn.LSTMCell(shape.inputs, shape.units, key=jax.random.key(0))
    params, static = eqx.partition(cell, eqx.is_inexact_array)

    def forward(params: Any, xs: jax.Array) -> jax.Array:
        step = jax.vmap(eqx.combine(params, static))

        def body(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            state = step(x, state)
            return state, state[0]

        zeros = jnp.zeros((shape.rows, shape.units))
        return jax.lax.scan(body, (zeros, zeros), xs)[1]

    return Program(forward, params, inputs(shape))


def keras(shape: Shape) -> Program:
    """`keras.layers.LSTM` on the JAX backend."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    keras: Any = import_module("keras")
    if keras.backend.backend() != "jax":
        raise RuntimeError(f"Keras was imported with the backend {keras.backend.backend()!r}")
    layer = keras.layers.LSTM(shape.units, return_sequences=True)
    layer.build((shape.rows, shape.steps, shape.inputs))
    rest = [v.value for v in layer.non_trainable_variables]
    params = [v.value for v in layer.trainable_variables]
    xs = inputs(shape, batch_leads=True)
    return Program(lambda params, xs: layer.stateless_call(params, rest, xs)[0], params, xs, batch_leads=True)


def in_jax(build: Callable[[Shape], Program], name: str, shape: Shape) -> Contestant:
    """A program as a contestant: value and gradient of ``sum(y**2)``, and the forward pass, both jitted."""
    forward, params, xs, batch_leads = build(shape)

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, xs).astype(jnp.float32)))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    outputs = jax.jit(forward)

    def train() -> tuple[Any, list[Any]]:
        value, grads = jax.block_until_ready(step(params, xs))
        return value, jax.tree.leaves(grads)

    return Contestant(
        name=name,
        train=train,
        infer=lambda: jax.block_until_ready(outputs(params, xs)),
        output_shape=((shape.rows, shape.steps) if batch_leads else (shape.steps, shape.rows)) + (shape.units,),
        input_shape=xs.shape,
        to_numpy=partial(np.asarray, dtype=np.float32),
        lower=partial(step.lower, params, xs),
    )


def pytorch() -> tuple[Any, str, Callable[[], None]]:
    """PyTorch with all cores, the device of JAX's kind, and what waits for it."""
    torch: Any = import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    if jax.default_backend() != "cpu" and torch.cuda.is_available():
        return torch, "cuda", torch.cuda.synchronize
    return torch, "cpu", lambda: None


def in_torch(dtype: str, name: str, shape: Shape) -> Contestant:
    """`torch.nn.LSTM`, eager."""
    torch, device, synchronize = pytorch()
    place = {"device": device, "dtype": getattr(torch, dtype)}
    layer = torch.nn.LSTM(shape.inputs, shape.units, **place)
    xs = torch.randn(*shape[:3], **place)
    followed = xs.clone().requires_grad_()
    wanted = [*layer.parameters(), followed]

    def train() -> tuple[Any, list[Any]]:
        value = layer(followed)[0].float().square().sum()
        grads = torch.autograd.grad(value, wanted)
        synchronize()
        return value.detach(), list(grads)

    def infer() -> Any:
        with torch.no_grad():
            ys = layer(xs)[0]
        synchronize()
        return ys

    outputs = (shape.steps, shape.rows, shape.units)
    return Contestant(name, train, infer, outputs, tuple(xs.shape), lambda a: a.float().cpu().numpy())


Builder = Callable[[str, Shape], Contestant]

OURS, SCAN, OURS_BF16 = "jaxlstm fused", "jaxlstm scan", "jaxlstm fused bf16"
SPREAD = "jaxlstm fused, batch over devices"
REMAT, ONE_BY_ONE = "jaxlstm fused remat=32", "jaxlstm fused vmap"
TORCH, TORCH_BF16 = "torch float32", "torch bfloat16"

FLAX: dict[str, Builder] = {
    "nnx LSTMCell": partial(in_jax, partial(flax_nnx, cell="LSTMCell")),
    "nnx OptimizedLSTMCell": partial(in_jax, partial(flax_nnx, cell="OptimizedLSTMCell")),
    "linen OptimizedLSTMCell": partial(in_jax, flax_linen),
}
JAX_PEERS: dict[str, Builder] = {
    **FLAX,
    "haiku": partial(in_jax, haiku),
    "equinox": partial(in_jax, equinox),
    "keras": partial(in_jax, keras),
}
BUILDERS: dict[str, Builder] = {
    OURS: partial(in_jax, partial(this_library, implementation="fused")),
    SCAN: partial(in_jax, partial(this_library, implementation="scan")),
    OURS_BF16: partial(in_jax, partial(this_library, implementation="fused", dtype=jnp.bfloat16)),
    SPREAD: partial(in_jax, partial(this_library, implementation="fused", spread=True)),
    REMAT: partial(in_jax, partial(this_library, implementation="fused", remat=32)),
    ONE_BY_ONE: partial(in_jax, partial(this_library, implementation="fused", one_by_one=True)),
    **JAX_PEERS,
    TORCH: partial(in_torch, "float32"),
    TORCH_BF16: partial(in_torch, "bfloat16"),
}


class Field:
    """Those who take part.

    Args:
      only: words; a contestant takes part if its name contains one of them. This library always does. Empty: all.
      say: where to report, in one line, who is left out and why.
    """

    def __init__(self, only: Iterable[str], say: Callable[[str], None]) -> None:
        self.skipped: dict[str, str] = {}
        self._only = [word.lower() for word in only]
        self._say = say

    def build(self, names: Iterable[str], shape: Shape, *, run: bool = True) -> list[Contestant]:
        """The contestants at ``shape``, run and checked, or only lowered; who fails is left out from then on."""
        ready = []
        for name in names:
            if name in self.skipped or not self._takes_part(name):
                continue
            if name == SPREAD and (jax.device_count() == 1 or shape.rows % jax.device_count()):
                continue  # nothing to spread, or not evenly
            try:
                contestant = BUILDERS[name](name, shape)
                if run:
                    contestant.check()
                elif contestant.lower is not None:
                    contestant.lower()
            except Exception as error:  # whatever goes wrong in a foreign library, the others go on
                self._skip(name, error)
            else:
                ready.append(contestant)
        return ready

    def _takes_part(self, name: str) -> bool:
        return not self._only or name.startswith("jaxlstm") or any(word in name.lower() for word in self._only)

    def _skip(self, name: str, error: Exception) -> None:
        if name.startswith("jaxlstm"):
            raise error
        first_line = (str(error).splitlines() or [""])[0]
        missing = isinstance(error, ImportError)
        self.skipped[name] = ("not installed: " if missing else f"failed, {type(error).__name__}: ") + first_line
        self._say(f"{name}: {self.skipped[name]}")
