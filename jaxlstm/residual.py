"""A deep stack of recurrent layers with residual connections and normalized inputs (pre-norm)::

    r_0     = W_in x                             r_0 = x if x has the width of the stream
    s_n     = r_n + layer_n(norm(r_n))           the recurrent layer, over time
    r_{n+1} = s_n + W_down gelu(W_up norm(s_n))  the feed-forward part, step by step; r_{n+1} = s_n without it
    y       = norm(r_L)

The gradient reaches every layer through the sums alone (He, Zhang, Ren & Sun 2016, "Identity Mappings in Deep Residual
Networks"). Normalizing inputs, not sums, keeps deep stacks trainable without warm-up (Xiong et al. 2020, "On Layer
Normalization in the Transformer Architecture").
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from jaxlstm import validation
from jaxlstm.cells import Cell, CellName
from jaxlstm.dropout import dropout, regularizer_key
from jaxlstm.network import CallArgs, RunLayer, StepLayer
from jaxlstm.params import FeedForward, Params, Residual, ResidualBlock, State
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.primitives.pytrees import tree_concatenate, tree_stack
from jaxlstm.recurrence.masking import expand_to_rank
from jaxlstm.rnn import RNN

EPSILON = 1e-5  # added to the variance
LAYER, FEED_FORWARD = 5, 6  # numbers of the random streams of dropout, for `regularizer_key`


def normalize(x: Float[Array, "*batch W"], gain: Float[Array, " W"]) -> Float[Array, "*batch W"]:
    """Returns ``x`` with mean 0 and variance 1 over the last axis, times ``gain`` (Ba, Kiros & Hinton 2016)."""
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * jnp.broadcast_to(gain.astype(x.dtype), x.shape)


@dataclass(frozen=True, repr=False)
class ResidualStack(RNN):
    """A stack of recurrent layers, each of which adds its outputs to its inputs; called like `jaxlstm.LSTM`.

        stack = jaxlstm.ResidualStack(64, 256, num_layers=8, feed_forward=1024)
        params = stack.init(jax.random.key(0))
        ys, state = stack(params, xs)               # xs (T, *batch, 64), ys (T, *batch, 256)

    The equations are in `jaxlstm.residual`. Call, `step`, masks, resets, state and options are the same as in
    `jaxlstm.LSTM`, for every cell, with these differences:

    - All layers have inputs of the width of the outputs, D*P. Inputs of another size are projected to it first.
    - ``dropout`` is the dropout rate of everything that is added: the outputs of every recurrent layer, the last one
      too, and of every feed-forward part.
    - ``layer_norm`` is about the inside of the cell. The inputs of each layer are normalized without it.
    - The stream of sums is float32 or wider.

    A backend for whole stacks, such as ``"cudnn"``, runs one layer per call.

    Args:
      feed_forward: hidden size of the feed-forward part of each layer; None for no such part. Transformers use four
        times the width of the stream.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    _: KW_ONLY
    cell: CellName | Cell = "lstm"
    feed_forward: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feed_forward is not None:
            self._set("feed_forward", validation.positive_int("feed_forward", self.feed_forward))

    @property
    def residual(self) -> bool:
        """True."""
        return True

    @property
    def width(self) -> int:
        """W, the width of the stream of sums and of the outputs: D*P."""
        return self.num_directions * self.output_size

    @property
    def layer_input_sizes(self) -> tuple[int, ...]:
        """Input size of each layer: W."""
        return (self.width,) * self.num_layers

    def residual_shapes(self) -> Residual:
        """Returns the shape and dtype of the parameters around the layers."""
        w, f, array = self.width, self.feed_forward, self.param_shape
        part = None
        if f is not None:
            b_up, b_down = (array(f), array(w)) if self.use_bias else (None, None)
            part = FeedForward(array(w), array(f, w), b_up, array(w, f), b_down)
        w_in = None if self.input_size == w else array(w, self.input_size)
        return Residual(w_in, (ResidualBlock(array(w), part),) * self.num_layers, array(w))

    def init(self, key: Array) -> Params:
        """Initializes the parameters, in ``param_dtype``.

        The recurrent layers are initialized as in `jaxlstm.LSTM`. The other matrices are Glorot-uniform, gains are 1
        and biases zero.

        Args:
          key: PRNG key.
        """
        validation.key(key)
        k_layers, k_residual = jax.random.split(key)
        params = super().init(k_layers)
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.residual_shapes())
        glorot = jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0)

        def draw(key: Array, path: Any, a: Any) -> Array:
            if len(a.shape) == 2:
                return glorot(key, a.shape, a.dtype)
            return jnp.full(a.shape, 1 if path[-1].name == "norm" else 0, a.dtype)

        keys = jax.random.split(k_residual, len(leaves))
        return params._replace(residual=tree.unflatten([draw(k, path, a) for k, (path, a) in zip(keys, leaves)]))

    def scan_layers(self, args: CallArgs, reverse: bool, run_layer: RunLayer) -> tuple[Array, State]:
        """Runs the layers one after the other on the stream of sums; see `RecurrentNetwork.scan_layers`."""
        key, residual = args.key, _residual(args.params)
        state, inputs = self.prepare_layers(args)
        step_mask = inputs.step_mask

        def keep_valid(a: Array) -> Array:
            return a if step_mask is None else jnp.where(expand_to_rank(step_mask, a), a, 0)

        stream = self._project(residual, self.drop_inputs(key, keep_valid(args.xs)))
        last = []
        for n, block in enumerate(residual.blocks):
            xs = normalize(stream, block.norm).astype(self.output_dtype)
            ys, new_state = self.scan_layer(n, args, xs, state, inputs, reverse, run_layer)
            stream += self._drop(key, n, LAYER, ys.astype(stream.dtype))
            if block.feed_forward is not None:
                stream += self._drop(key, n, FEED_FORWARD, self._feed_forward(block.feed_forward, stream))
            last.append(new_state)
        ys = normalize(stream, residual.norm).astype(self.output_dtype)
        return self.drop_outputs(key, keep_valid(ys)), tree_concatenate(last)

    def step_layers(self, params: Params, x: Array, step_layer: StepLayer) -> tuple[State, Array]:
        """Takes one step of all layers on the stream of sums; see `RecurrentNetwork.step_layers`."""
        residual = _residual(params)
        stream = self._project(residual, x.astype(self.output_dtype))
        new_states = []
        for n, block in enumerate(residual.blocks):
            new_states.append(step_layer(n, normalize(stream, block.norm).astype(self.output_dtype)))
            # Rounded as the outputs of a layer are in a call.
            stream += new_states[-1].h.astype(self.output_dtype).astype(stream.dtype)
            if block.feed_forward is not None:
                stream += self._feed_forward(block.feed_forward, stream)
        return tree_stack(new_states), normalize(stream, residual.norm).astype(self.output_dtype)

    def _project(self, residual: Residual, x: Array) -> Array:
        """Returns the inputs of the stream, in ``state_dtype``."""
        return x.astype(self.state_dtype) if residual.w_in is None else self._matvec(residual.w_in, x)

    def _feed_forward(self, part: FeedForward, stream: Array) -> Array:
        """Returns the summand of a feed-forward part."""
        hidden = self._matvec(part.w_up, normalize(stream, part.norm))
        if part.b_up is not None:
            hidden += jnp.broadcast_to(part.b_up.astype(hidden.dtype), hidden.shape)
        added = self._matvec(part.w_down, jax.nn.gelu(hidden))
        if part.b_down is not None:
            added += jnp.broadcast_to(part.b_down.astype(added.dtype), added.shape)
        return added

    def _matvec(self, w: Array, x: Array) -> Array:
        return matvec(w, x, self.output_dtype, self.state_dtype)

    def _drop(self, key: Array | None, n: int, number: int, added: Array) -> Array:
        """Returns a summand of layer ``n`` with ``dropout``."""
        return dropout(regularizer_key(key, n, number), self.dropout, added, over_time=not self.variational)


def _residual(params: Params) -> Residual:
    assert params.residual is not None  # checked with the shapes of all parameters
    return params.residual
