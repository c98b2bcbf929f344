"""A scan that remembers less."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def scan(body: Callable, carry: Any, xs: Any, *, reverse: bool, unroll: int, remat: int | None) -> tuple[Any, Any]:
    """`jax.lax.scan`, keeping for the backward pass only the carry every ``remat`` steps (Chen et al. 2016).

    The steps within a chunk are computed again when their derivative is taken. A last chunk may be shorter.

    Args:
      body: ``(carry, x) -> (carry, y)``.
      carry: the carry before the first step.
      xs: pytree of arrays with a leading time axis.
      reverse: whether time runs backward.
      unroll: steps per iteration of the compiled loop.
      remat: steps per chunk; None keeps everything.
    """
    run = partial(lax.scan, body, reverse=reverse, unroll=unroll)
    if remat is None:
        return run(carry, xs)
    steps = jax.tree.leaves(xs)[0].shape[0]
    whole = steps - steps % remat
    chunks = jax.tree.map(lambda a: a[:whole].reshape(-1, remat, *a.shape[1:]), xs)
    rest = jax.tree.map(lambda a: a[whole:], xs)
    run_chunk = jax.checkpoint(run)

    def run_whole(carry: Any) -> tuple[Any, Any]:
        carry, ys = lax.scan(run_chunk, carry, chunks, reverse=reverse)
        return carry, jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)

    if whole == steps:
        return run_whole(carry)
    if reverse:
        carry, ys_rest = run_chunk(carry, rest)
        carry, ys = run_whole(carry)
    else:
        carry, ys = run_whole(carry)
        carry, ys_rest = run_chunk(carry, rest)
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, ys_rest)
