r"""The convolutional LSTM: state and inputs are fields over space, and the dense part of a step is a convolution::

    z    = W_x * x + W_h * h + b    one slab of H channels of pre-activations per gate, at every position
    c, h = gates(z, c)              elementwise over positions and channels, from `jaxlstm.cells`

After Shi, Chen, Wang, Yeung, Wong & Woo 2015, "Convolutional LSTM Network: A Machine Learning Approach for
Precipitation Nowcasting". Besides the letters of `jaxlstm.params`, ``*spatial`` is one to three spatial axes and
``*kernel`` the sizes of a kernel along them.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxlstm import initializers, validation
from jaxlstm.cells import Cell
from jaxlstm.dropout import RegularizerMasks
from jaxlstm.network import RecurrentNetwork
from jaxlstm.params import State, Weights
from jaxlstm.primitives.mixed_precision_dot import matvec
from jaxlstm.recurrence.chunked_scan import ScanFns, emit_hidden, scan_directions
from jaxlstm.recurrence.context import Direction, Results
from jaxlstm.recurrence.gates import evaluate_cell
from jaxlstm.recurrence.step import require_form, split_gates

ConvCellName = Literal["lstm", "peephole", "cifg"]
Convolve = Callable[[Array, Array, DTypeLike, DTypeLike], Array]  # (w, x, dtype, accum_dtype) -> z


def convolve(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """Returns ``W * x`` over the spatial axes of ``x``, zero-padded to the same size.

    Operands are rounded to ``dtype``; sums and result are in ``accum_dtype``.
    """
    *kernel, _, channels = w.shape
    batch, field = x.shape[: x.ndim - w.ndim + 1], x.shape[x.ndim - w.ndim + 1 :]
    letters = "DHW"[: len(kernel)]
    z = lax.conv_general_dilated(
        x.reshape(math.prod(batch), *field).astype(dtype),
        w.astype(dtype),
        window_strides=[1] * len(kernel),
        padding=[(size // 2, size // 2) for size in kernel],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=jnp.dtype(accum_dtype),
    )
    return z.reshape(*batch, *field[:-1], channels)


def convolve_by_patches(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """Computes `convolve` as one matrix product: the patch around each position times the kernel as a matrix."""
    *kernel, _, channels = w.shape
    spatial = x.shape[-1 - len(kernel) : -1]
    padding = [(size // 2, size // 2) for size in kernel]

    # Patches are as many times larger than x as the kernel has positions, so the derivative recomputes them.
    @partial(jax.checkpoint, prevent_cse=False)
    def multiply_patches(w: Array, x: Array) -> Array:
        padded = jnp.pad(x.astype(dtype), [(0, 0)] * (x.ndim - 1 - len(kernel)) + padding + [(0, 0)])
        shifts = itertools.product(*map(range, kernel))
        windows = [tuple(slice(first, first + size) for first, size in zip(shift, spatial)) for shift in shifts]
        patches = jnp.concatenate([padded[(..., *window, slice(None))] for window in windows], axis=-1)
        return matvec(w.reshape(-1, channels).T, patches, dtype, accum_dtype)

    return multiply_patches(w, x)


def convolve_in_loop(
    w: Float[Array, "*kernel m n"], x: Float[Array, "*batch_and_spatial m"], dtype: DTypeLike, accum_dtype: DTypeLike
) -> Float[Array, "*batch_and_spatial n"]:
    """Computes `convolve` in the form that is fast in the body of a compiled loop.

    XLA:CPU rewrites the convolutions of a derivative for its fast kernels only outside of loops. In a loop, a training
    step takes 3 to 11 times as long with convolutions as with patches (16 to 64 channels, kernels of 3 and 5, two
    cores). Forward, both take about the same time.
    """
    on_cpu = jax.default_backend() == "cpu"
    return (convolve_by_patches if on_cpu else convolve)(w, x, dtype, accum_dtype)


def project_inputs(
    weights: Weights,
    x: Float[Array, "*batch_and_spatial I"],
    dtype: DTypeLike,
    accum_dtype: DTypeLike,
    convolve: Convolve = convolve,
) -> Float[Array, "*batch_and_spatial GH"]:
    """Returns ``W_x * x + b`` in ``accum_dtype``, the part of ``z`` that does not depend on the previous step."""
    z = convolve(weights.w_x, x, dtype, accum_dtype)
    return z if weights.b is None else z + jnp.broadcast_to(weights.b.astype(accum_dtype), z.shape)


def recurrent_step(
    cell: Cell,
    weights: Weights,
    z_x: Float[Array, "*batch_and_spatial GH"],
    state: State,
    dtype: DTypeLike,
) -> State:
    """Takes one step, from the projected inputs and the state to the new state; convolves in ``dtype``."""
    z = split_gates(z_x + convolve_in_loop(weights.w_h, state.h, dtype, z_x.dtype), cell.num_gates, -1)
    if weights.w_c is None:
        c, h = evaluate_cell(cell, z, state.c)
    else:  # (K, *spatial, H) to (K, 1, ..., 1, *spatial, H)
        peepholes = jnp.expand_dims(weights.w_c, tuple(range(1, 1 + z.ndim - weights.w_c.ndim)))
        c, h = evaluate_cell(cell, z, state.c, peepholes=peepholes.astype(z.dtype))
    return State(h, c)


@dataclass(frozen=True, repr=False)
class ConvLSTM(RecurrentNetwork):
    """A convolutional recurrent network: static configuration only, frozen and hashable, called like `jaxlstm.LSTM`.

        conv = jaxlstm.ConvLSTM(1, 16, (64, 64))
        params = conv.init(jax.random.key(0))
        ys, state = conv(params, xs)                # xs (T, *batch, 64, 64, 1), ys (T, *batch, 64, 64, 16)

    Channels come last. Convolutions have stride 1 and zero padding, so the fields keep their size. Parameters are
    ``w_x (*kernel, I, G*H)``, ``w_h (*kernel, H, G*H)``, ``b (G*H,)`` and ``w_c (3, *spatial, H)``. Input kernels are
    Glorot-uniform over the fan of the kernel, and recurrent kernels orthogonal as matrices ``(prod(kernel)*H, H)``,
    separately for each gate, as in Keras: on white noise the convolution preserves the mean square, and kernel size 1
    gives `jaxlstm.LSTM`'s initialization.

    Args:
      input_size: I, channels of the input.
      hidden_size: H, channels of the state and of the output of each direction.
      spatial_shape: sizes of the one to three spatial axes; an int for one axis.
      kernel_size: of both convolutions, odd: one size for every spatial axis, or a tuple.
      num_layers: L.
      bidirectional: adds a second direction that runs backward in time; D is 2 and outputs are concatenated.
      cell: ``"lstm"``; ``"peephole"``, the cell of the paper, whose gates read the cell state at their own position and
        channel; ``"cifg"``; or a `jaxlstm.Cell`.
      use_bias: whether ``z`` has a bias, the same at every position.
      learned_state: whether the initial state, a field, is trained; resets then restart from it.
      forget_bias: initial bias of the forget gate; None for 1.
      chrono: longest expected dependency, in steps: draws the initial biases of forget and input gate accordingly.
      dropout: dropout rate of the outputs of every layer but the last, when a ``key`` is given.
      input_dropout: dropout rate of the inputs, with one mask for all steps.
      output_dropout: dropout rate of the outputs of the last layer, with one mask for all steps.
      variational: whether ``dropout`` has one mask for all steps, too.
      dtype: dtype of convolutions and outputs; None for ``param_dtype``. Sums, gates and state are float32 or wider.
      param_dtype: dtype of the parameters.
      remat: number of steps per chunk for rematerialization.
      unroll: steps per iteration of the compiled loop.

    Raises:
      ValueError, TypeError: for an option that is out of range, unknown or of the wrong type.
    """

    spatial_shape: int | tuple[int, ...]
    kernel_size: int | tuple[int, ...] = 3
    _: KW_ONLY
    cell: ConvCellName | Cell = "lstm"

    def __post_init__(self) -> None:
        self._set("spatial_shape", validation.spatial_shape("spatial_shape", self.spatial_shape))
        self._set("kernel_size", validation.kernel_shape("kernel_size", self.kernel_size, self.spatial_axes))
        super().__post_init__()
        require_form("ConvLSTM", self.resolved_cell, several_states=False)

    @property
    def cell_names(self) -> tuple[str, ...]:
        """The names that ``cell`` may have."""
        return get_args(ConvCellName)

    def _normalized_default(self, name: str, default: Any) -> Any:
        return validation.kernel_shape(name, default, self.spatial_axes) if name == "kernel_size" else default

    @property
    def spatial_axes(self) -> tuple[int, ...]:
        """Sizes of the spatial axes."""
        return validation.sizes("spatial_shape", self.spatial_shape)

    def feature_shape(self, size: int) -> tuple[int, ...]:
        """Returns ``(*spatial, size)``."""
        return (*self.spatial_axes, size)

    def weight_shapes(self, input_size: int) -> Weights:
        """Returns the shape and dtype of the weights of one direction of a layer with this input size."""
        cell, array = self.resolved_cell, self.param_shape
        kernel, channels = validation.sizes("kernel_size", self.kernel_size), cell.num_gates * self.hidden_size
        peepholes = array(len(cell.peepholes), *self.feature_shape(self.hidden_size)) if cell.peepholes else None
        return Weights(
            w_x=array(*kernel, input_size, channels),
            w_h=array(*kernel, self.hidden_size, channels),
            b=array(channels) if self.use_bias else None,
            w_c=peepholes,
        )

    def weight_initializers(self) -> dict[str, initializers.Initializer]:
        """Returns the initializers of ``w_x``, ``w_h`` and ``w_c``."""
        num_gates = self.resolved_cell.num_gates
        return {
            "w_x": initializers.per_gate(jax.nn.initializers.glorot_uniform(), num_gates, axis=-1),
            "w_h": initializers.per_gate(jax.nn.initializers.orthogonal(), num_gates, axis=-1),
            "w_c": jax.nn.initializers.zeros,
        }

    def run_directions(self, directions: tuple[Direction, ...]) -> Results:
        """Runs the directions of a layer one after the other."""
        return scan_directions([self._equations(d.weights) for d in directions], directions, self.scan_context())

    def _equations(self, weights: Weights) -> ScanFns:
        in_chunks = self.remat is not None  # then the projection runs within the loop over chunks
        form = convolve_in_loop if in_chunks else convolve

        def project(xs: Float[Array, "T B *spatial I"]) -> Float[Array, "T B *spatial GH"]:
            # Batch before time in the merged axis: a batch sharded over devices stays where it is.
            z = project_inputs(weights, jnp.moveaxis(xs, 1, 0), self.output_dtype, self.state_dtype, form)
            return jnp.moveaxis(z, 0, 1)

        def step(z_x: Array, state: State, masks: RegularizerMasks) -> State:
            del masks  # a convolutional network has no regularizers inside the recurrence
            return recurrent_step(self.resolved_cell, weights, z_x, state, self.output_dtype)

        return ScanFns(project, emit_hidden(step))

    def layer_step(self, weights: Weights, x: Array, state: State, z_static: Array | None = None) -> State:
        """Takes one step of one layer without regularizers: from its input and the state to the new state."""
        del z_static
        z_x = project_inputs(weights, x, self.output_dtype, self.state_dtype)
        return recurrent_step(self.resolved_cell, weights, z_x, state, self.output_dtype)
