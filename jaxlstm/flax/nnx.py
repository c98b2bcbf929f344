"""The modules of `jaxlstm.flax` for Flax nnx; their parameters are a `jaxlstm.Params` with `nnx.Param` leaves."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

import jaxlstm.rnn
from jaxlstm import validation
from jaxlstm.flax import common
from jaxlstm.flax.common import MeshAxes, Sharding, override
from jaxlstm.params import Params, State


class LSTM(nnx.Module):
    """A network over whole sequences, called like `nnx.RNN`: ``outputs = rnn(inputs)``.

    Replaces ``nnx.RNN(cell)``, a stack of them, or one direction of an `nnx.Bidirectional`. Computes
    ``lstm(params, xs)``. Regularizers are active until ``deterministic`` is set, for example by ``module.eval()``.

    Args:
      lstm: the configuration.
      params: initial parameters, such as those from `jaxlstm.interop`; None draws them by ``lstm.init``.
      rngs: random streams ``params``, needed without ``params``, and ``dropout``, needed for regularizers.
      time_major: whether inputs are ``(T, *batch, I)`` instead of ``(*batch, T, I)``.
      return_carry: whether a call returns ``(carry, outputs)``.
      reverse: whether time runs backward.
      keep_order: whether outputs of a reversed call stay aligned with their inputs; otherwise the last step is first.
      deterministic: whether regularizers are off.
      sharding: mesh axes of arrays by name, such as ``{"w_x": ("model", None), "b": ("model",)}``, for every layer
        and direction; sets ``out_sharding`` of the `nnx.Param`.

    Raises:
      ValueError, TypeError: for a name in ``sharding`` that no parameter has, a flag that is not a bool, or if both
        ``params`` and ``rngs`` are missing.
    """

    def __init__(
        self,
        lstm: jaxlstm.rnn.RNN,
        *,
        params: Params | None = None,
        rngs: nnx.Rngs | None = None,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        deterministic: bool = False,
        sharding: Sharding | None = None,
    ):
        self.lstm = lstm
        self.params = _create_params(lstm, params, rngs, sharding)
        self.rngs = nnx.data(rngs.dropout.fork() if rngs is not None and common.is_stochastic(lstm) else None)
        self.time_major = validation.flag("time_major", time_major)
        self.return_carry = validation.flag("return_carry", return_carry)
        self.reverse = validation.flag("reverse", reverse)
        self.keep_order = validation.flag("keep_order", keep_order)
        self.deterministic = validation.flag("deterministic", deterministic)

    def __call__(
        self,
        inputs: Float[Array, "*batch_T I"],
        *,
        initial_carry: State | None = None,
        seq_lengths: Int[Array, "*batch"] | None = None,
        mask: Bool[Array, "*batch_T"] | None = None,
        resets: Bool[Array, "*batch_T"] | None = None,
        static: Float[Array, "*batch S"] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Any:
        """Runs the network over a sequence. The attribute is the default of an argument that is None.

        Args:
          inputs: ``(*batch, T, I)``, or ``(T, *batch, I)`` if ``time_major``.
          initial_carry: a `jaxlstm.State`; None for zeros, or for the learned state.
          seq_lengths: lengths as in `jaxlstm.LSTM`: inputs at and past the length are not read, and outputs are zero.
          mask: as in `jaxlstm.LSTM`, with the time axis last, or first if ``time_major``.
          resets: as in `jaxlstm.LSTM`, with the same axes as ``mask``.
          static: static features, for a cell that reads them, such as ``"ea"``.
          return_carry: whether to return the final state too.
          time_major: whether time is the leading axis.
          reverse: whether time runs backward.
          keep_order: whether outputs of a reversed call stay aligned with their inputs.
          deterministic: whether regularizers are off.
          rngs: source of the regularizers' keys in place of the module's own stream. A stream named ``carry``, which
            `nnx.Bidirectional` passes for initial carries, is ignored.

        Returns:
          Outputs ``(*batch, T, D*P)``, or ``(T, *batch, D*P)`` if ``time_major``; with ``return_carry`` the pair of
          the final `jaxlstm.State` and the outputs.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type, or a regularizer without random streams.
        """
        deterministic = override("deterministic", self.deterministic, deterministic)
        return common.apply_to_sequence(
            self.lstm,
            _param_arrays(self.params),
            inputs,
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            mask=mask,
            resets=resets,
            static=static,
            key=None if deterministic else self._regularizer_key(rngs),
            time_major=override("time_major", self.time_major, time_major),
            return_carry=override("return_carry", self.return_carry, return_carry),
            reverse=override("reverse", self.reverse, reverse),
            keep_order=override("keep_order", self.keep_order, keep_order),
        )

    def step(self, state: State, x: Float[Array, "*batch I"]) -> tuple[State, Float[Array, "*batch P"]]:
        """Runs ``lstm.step`` with the parameters of this module."""
        return self.lstm.step(_param_arrays(self.params), state, x)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets attributes for `nnx.view`.

        Args:
          deterministic: whether regularizers are off; None leaves the attribute unchanged.
        """
        if deterministic is not None:
            self.deterministic = validation.flag("deterministic", deterministic)

    def _regularizer_key(self, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array | None:
        """Returns a key for the regularizers, or None for a network without regularizers."""
        if not common.is_stochastic(self.lstm):
            return None
        if rngs is None or (isinstance(rngs, nnx.RngStream) and rngs.tag == "carry"):
            rngs = self.rngs
        if rngs is None:
            raise ValueError("regularizers need rngs, in the constructor or in the call, or deterministic=True")
        if isinstance(rngs, nnx.Rngs):
            return rngs.dropout()
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs


class LSTMCell(nnx.RNNCellBase):
    """One step of one layer, for `nnx.RNN` and other scans: ``carry, y = cell(carry, x)``.

    The carry is Flax's: ``(c, h)``, each ``(*batch, size)``, or h alone for a cell without c, such as a GRU. c is a
    dictionary for a cell with several states, such as ``"slstm"``.

    Args:
      lstm: the configuration: one layer, one direction and no regularizers.
      params: initial parameters; None draws them by ``lstm.init``.
      rngs: random stream ``params``, needed without ``params``.
      sharding: as in `LSTM`.

    Raises:
      ValueError, TypeError: for a configuration that needs the whole sequence, a name in ``sharding`` that no parameter
        has, or if both ``params`` and ``rngs`` are missing.
    """

    def __init__(
        self,
        lstm: jaxlstm.rnn.RNN,
        *,
        params: Params | None = None,
        rngs: nnx.Rngs | None = None,
        sharding: Sharding | None = None,
    ):
        common.check_cell_options(lstm)
        self.lstm = lstm
        self.params = _create_params(lstm, params, rngs, sharding)

    def __call__(self, carry: Any, inputs: Float[Array, "*batch I"]) -> tuple[Any, Float[Array, "*batch P"]]:
        """Runs one step.

        Args:
          carry: ``(c, h)``, or h alone, from `initialize_carry` or the previous step; or a `jaxlstm.State` of the same
            arrays.
          inputs: input of this step; integers are promoted.

        Returns:
          The new carry, of the type of the old one, and h in the ``dtype`` of the configuration.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type.
        """
        return common.apply_step(self.lstm, _param_arrays(self.params), carry, inputs)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> Any:
        """Returns the carry before the first step: zeros, the learned state, or a draw of ``carry_init``.

        Args:
          input_shape: shape of the input of one step, ``(*batch, I)``.
          rngs: random stream ``carry`` for ``carry_init``.
          carry_init: initializer of c and h.
        """
        carry = common.carry_from_state(self.lstm.initial_state(input_shape[:-1], _param_arrays(self.params)))
        if carry_init is None:
            return carry
        if rngs is None:
            raise ValueError("carry_init needs rngs to draw from")
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        return jax.tree.map(lambda a: carry_init(stream(), a.shape, a.dtype), carry)

    @property
    def num_feature_axes(self) -> int:
        """Number of axes of an input that are not batch axes: 1."""
        return 1


def _create_params(
    lstm: jaxlstm.rnn.RNN, params: Params | None, rngs: nnx.Rngs | None, sharding: Sharding | None
) -> Any:
    """Returns the parameters with `nnx.Param` leaves, drawn from ``rngs`` if ``params`` is None."""
    if params is None:
        if rngs is None:
            raise TypeError("expected params or rngs, got neither: pass parameters, or a stream to draw them from")
        params = lstm.init(rngs.params())

    def annotate(array: Any, mesh_axes: MeshAxes | None) -> nnx.Param:
        metadata: Mapping[str, Any] = {} if mesh_axes is None else {"out_sharding": mesh_axes}
        # Copy onto the mesh in use, if there is one; Flax does not move arrays from other devices.
        return nnx.Param(jnp.array(array), **metadata)

    return nnx.data(common.annotate_params(params, sharding, annotate))


def _param_arrays(params: Any) -> Params:
    """Returns the arrays of the `nnx.Param` leaves."""
    return jax.tree.map(lambda p: p[...], params, is_leaf=lambda p: isinstance(p, nnx.Variable))
