"""Learning-rate schedule and optimizer: AdamW with warm-up and cosine decay, or SGD with a constant rate."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

DEFAULT_PEAK = {"adamw": 4e-3, "asgd": 0.3}  # learning rate at the end of the warm-up
SCHEDULE_TICKS = 10_000  # length of every run in units of the schedule
FINAL_FRACTION = 0.01  # of the peak, at the end of the cosine

# Biases, peepholes, gains and shifts of normalization, and learned initial states.
NOT_DECAYED = {"b", "b_out", "b_up", "b_down", "w_c", "norm", "state"}

OptimizerName = Literal["adamw", "asgd"]
Schedule = Callable[[ArrayLike], Array]  # completed fraction of the run, in [0, 1] -> learning rate


def learning_rate_schedule(name: OptimizerName, peak: float, warmup: float) -> Schedule:
    """Returns the learning rate as a function of the completed fraction of the run.

    Counting in fractions of the run instead of updates gives runs limited by steps and runs limited by time the same
    schedule.

    Args:
      name: ``"adamw"`` falls along a cosine after the warm-up, ``"asgd"`` stays at the peak.
      peak: learning rate at the end of the warm-up.
      warmup: fraction of the run in which the rate rises linearly from 0.
    """
    ticks = round(warmup * SCHEDULE_TICKS)
    if name == "asgd":
        by_tick = optax.warmup_constant_schedule(0.0, peak, max(ticks, 1))  # 0 would give a rate of 0
    else:
        by_tick = optax.warmup_cosine_decay_schedule(0.0, peak, ticks, SCHEDULE_TICKS, end_value=FINAL_FRACTION * peak)
    return lambda progress: jnp.asarray(by_tick(jnp.asarray(progress) * SCHEDULE_TICKS))


def make_optimizer(
    schedule: Schedule, *, weight_decay: float, clip: float, name: OptimizerName = "adamw"
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW or SGD behind clipping by global norm.

    Each update takes the argument ``progress`` in [0, 1], the completed fraction of the run, which sets the learning
    rate. Non-finite gradients change nothing and are counted.

    Args:
      schedule: the learning rate, from `learning_rate_schedule`.
      weight_decay: decoupled weight decay of all parameters but those in `NOT_DECAYED`, whatever their number of axes.
      clip: largest global norm of a gradient.
      name: ``"adamw"``, or ``"asgd"``, SGD for averaging of the parameters (Merity, Keskar & Socher 2018).
    """

    def scale(updates: Any, state: Any, params: Any = None, *, progress: ArrayLike = 0.0, **_: Any) -> tuple[Any, Any]:
        del params
        rate = schedule(progress)
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    chain = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.identity() if name == "asgd" else optax.scale_by_adam(b2=0.99),
        optax.add_decayed_weights(weight_decay, _is_decayed),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, scale),
    )
    unlimited = int(jnp.iinfo(jnp.int32).max)  # the training loop decides when too many steps were skipped
    return optax.with_extra_args_support(optax.apply_if_finite(chain, max_consecutive_errors=unlimited))


def _is_decayed(params: Any) -> Any:
    """Returns for each parameter whether it decays: by its role, which its name tells."""
    return jax.tree.map_with_path(
        lambda path, _: NOT_DECAYED.isdisjoint(jax.tree_util.keystr(path, simple=True, separator=".").split(".")),
        params,
    )
