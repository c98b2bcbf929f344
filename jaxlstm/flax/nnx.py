"""The modules of `jaxlstm.flax` for Flax nnx; their parameters are `nnx.Param` leaves of a `jaxlstm.Params`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlstm import lstm as model
from jaxlstm.flax import common
from jaxlstm.flax.common import NOWHERE, Sharding
from jaxlstm.params import Params, State


class LSTM(nnx.Module):
    """A network over whole sequences, called as `nnx.RNN` is: ``outputs = rnn(inputs)``.

    It takes the place of ``nnx.RNN(cell)``, of stacks of it, and of a direction of `nnx.Bidirectional`. The numbers are
    those of ``lstm(params, xs)``. Regularisers are active until ``deterministic`` is set, as by ``module.eval()``.

    Args:
      lstm: the configuration.
      params: parameters to start from, such as those of `jaxlstm.interop`; drawn by ``lstm.init`` where None.
      rngs: streams ``params``, where they are drawn, and ``dropout``, where the configuration has a regulariser.
      time_major: whether inputs are ``(T, *batch, I)`` instead of ``(*batch, T, I)``.
      return_carry: whether a call returns ``(carry, outputs)``.
      reverse: whether time runs backward.
      keep_order: whether outputs then stay aligned with their inputs instead of coming in the order of reading.
      deterministic: whether the regularisers are off.
      sharding: mesh axes for arrays by name, such as ``{"w_x": ("model", None), "b": ("model",)}``, for every layer
        and direction; they become the ``out_sharding`` of the `nnx.Param`.

    Raises:
      ValueError, TypeError: for a name in ``sharding`` that no parameter has, or neither ``params`` nor ``rngs``.
    """

    def __init__(
        self,
        lstm: model.LSTM,
        *,
        params: Params | None = None,
        rngs: nnx.Rngs | None = None,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        deterministic: bool = False,
        sharding: Sharding = NOWHERE,
    ):
        self.lstm = lstm
        self.params = _params(lstm, params, rngs, sharding)
        self.rngs = nnx.data(rngs.dropout.fork() if rngs is not None and common.is_stochastic(lstm) else None)
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.deterministic = deterministic

    def __call__(
        self,
        inputs: Float[Array, "*batch_T I"],
        *,
        initial_carry: State | None = None,
        seq_lengths: Int[Array, "*batch"] | None = None,
        mask: Bool[Array, "*batch_T"] | None = None,
        resets: Bool[Array, "*batch_T"] | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Array | None = None,
    ) -> Any:
        """The network over a sequence; an argument that is None is as it was set in the constructor.

        Args:
          inputs: ``(*batch, T, I)``, or ``(T, *batch, I)`` if ``time_major``.
          initial_carry: a `jaxlstm.State`; where None zeros, or the learned one.
          seq_lengths: as ``lengths`` of `jaxlstm.LSTM`: what is behind them is not read, and outputs are zero there.
          mask: as there, with time where ``inputs`` have it.
          resets: the same.
          return_carry: whether the last state is returned too.
          time_major: whether time is the leading axis.
          reverse: whether time runs backward.
          keep_order: whether outputs then stay aligned with their inputs.
          deterministic: whether the regularisers are off.
          rngs: what to draw them from instead of the module's own stream. A stream of the name ``carry``, which
            `nnx.Bidirectional` hands to what it holds, is for initial carries and not used.

        Returns:
          outputs, ``(*batch, T, D*P)`` or ``(T, *batch, D*P)``; with ``return_carry`` the `jaxlstm.State` before them.

        Raises:
          ValueError, TypeError: for a wrong shape, size, dtype or type, or a regulariser that has nothing to draw from.
        """

        def chosen(value: bool | None, default: bool) -> bool:
            return default if value is None else value

        return common.over_time(
            self.lstm,
            _arrays(self.params),
            inputs,
            initial_carry,
            seq_lengths,
            mask,
            resets,
            None if chosen(deterministic, self.deterministic) else self._key(rngs),
            time_major=chosen(time_major, self.time_major),
            return_carry=chosen(return_carry, self.return_carry),
            reverse=chosen(reverse, self.reverse),
            keep_order=chosen(keep_order, self.keep_order),
        )

    def step(self, state: State, x: Float[Array, "*batch I"]) -> tuple[State, Float[Array, "*batch P"]]:
        """``lstm.step`` with the parameters of this module."""
        return self.lstm.step(_arrays(self.params), state, x)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What `nnx.view` calls.

        Args:
          deterministic: whether the regularisers are off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | Array | None) -> Array | None:
        """A key for the regularisers, None where there are none."""
        if not common.is_stochastic(self.lstm):
            return None
        if rngs is None or (isinstance(rngs, nnx.RngStream) and rngs.tag == "carry"):
            rngs = self.rngs
        if rngs is None:
            raise ValueError("the regularisers need rngs, in the constructor or in the call, or deterministic=True")
        if isinstance(rngs, nnx.Rngs):
            return rngs.dropout()
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs


class LSTMCell(nnx.RNNCellBase):
    """One step of one layer, for `nnx.RNN` and scans of the user's own: ``carry, y = cell(carry, x)``.

    The carry is Flax's: ``(c, h)``, each ``(*batch, .)``, or h alone for a cell without c.

    Args:
      lstm: the configuration, of one layer in one direction and without regularisers.
      params: parameters to start from; drawn by ``lstm.init`` where None.
      rngs: stream ``params``, where they are drawn.
      sharding: as of `LSTM`.

    Raises:
      ValueError, TypeError: for a configuration that a cell cannot have, a name in ``sharding`` that no parameter has,
        or neither ``params`` nor ``rngs``.
    """

    def __init__(
        self,
        lstm: model.LSTM,
        *,
        params: Params | None = None,
        rngs: nnx.Rngs | None = None,
        sharding: Sharding = NOWHERE,
    ):
        common.check_cell(lstm)
        self.lstm = lstm
        self.params = _params(lstm, params, rngs, sharding)

    def __call__(self, carry: Any, inputs: Float[Array, "*batch I"]) -> tuple[Any, Float[Array, "*batch P"]]:
        """One step.

        Args:
          carry: ``(c, h)``, or h alone, from `initialize_carry` or the step before.
          inputs: of this step.

        Returns:
          the new carry, and h in the configuration's ``dtype``.
        """
        return common.step(self.lstm, _arrays(self.params), carry, inputs)

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: nnx.Initializer | None = None,
    ) -> Any:
        """The carry before the first step: zeros, the learned one, or what ``carry_init`` draws.

        Args:
          input_shape: of the inputs of one step, ``(*batch, I)``.
          rngs: what ``carry_init`` draws from, by its stream ``carry``.
          carry_init: an initialiser for c and h.
        """
        carry = common.from_state(self.lstm.initial_state(input_shape[:-1], _arrays(self.params)))
        if carry_init is None:
            return carry
        if rngs is None:
            raise ValueError("carry_init needs rngs to draw from")
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        return jax.tree.map(lambda a: carry_init(stream(), a.shape, a.dtype), carry)

    @property
    def num_feature_axes(self) -> int:
        """The axes of an input that are no batch axes: 1."""
        return 1


def _params(lstm: model.LSTM, params: Params | None, rngs: nnx.Rngs | None, sharding: Sharding) -> Any:
    """Parameters as a module holds them."""
    if params is None:
        if rngs is None:
            raise TypeError("neither params nor rngs: one or the other says where training starts")
        params = lstm.init(rngs.params())

    def wrap(array: Any, axes: tuple[str | None, ...] | None) -> nnx.Param:
        metadata: Mapping[str, Any] = {} if axes is None else {"out_sharding": axes}
        # A copy lies on the mesh in use, if there is one; Flax lays out nothing that lies elsewhere.
        return nnx.Param(jnp.array(array), **metadata)

    return nnx.data(common.place(params, sharding, wrap))


def _arrays(params: Any) -> Params:
    """The parameters that a module holds, as arrays."""
    return jax.tree.map(lambda p: p[...], params, is_leaf=lambda p: isinstance(p, nnx.Variable))
