"""Time in chunks: a scan over pieces of a sequence, the last of which may be shorter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def over(
    run: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, *, size: int, reverse: bool = False
) -> tuple[Any, Any]:
    """What ``run(carry, xs)`` returns, with ``run`` called on chunks of the leading axis instead of all of it.

    Args:
      run: a function of the carry and of a piece of ``xs`` that returns the carry and a piece of ``ys``.
      carry: before the first step.
      xs: pytree of arrays with a leading time axis.
      size: steps in a chunk.
      reverse: whether the chunks, like the steps that ``run`` takes, go backward in time.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    if size >= steps:
        return run(carry, xs)
    whole = steps - steps % size
    chunks = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), xs)
    rest = jax.tree.map(lambda a: a[whole:], xs)

    def run_whole(carry: Any) -> tuple[Any, Any]:
        carry, ys = lax.scan(run, carry, chunks, reverse=reverse)
        return carry, jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)

    if whole == steps:
        return run_whole(carry)
    if reverse:
        carry, ys_rest = run(carry, rest)
        carry, ys = run_whole(carry)
    else:
        carry, ys = run_whole(carry)
        carry, ys_rest = run(carry, rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, ys_rest)
