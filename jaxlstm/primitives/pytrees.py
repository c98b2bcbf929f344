"""Indexing, stacking, concatenation and reversal of pytrees of arrays."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def tree_index(tree: Tree, index: int | slice) -> Tree:
    """Indexes the leading axis of every array of a tree."""
    return jax.tree.map(lambda a: a[index], tree)


def tree_stack(trees: Sequence[Tree]) -> Tree:
    """Stacks trees of the same structure along a new leading axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def tree_concatenate(trees: Sequence[Tree]) -> Tree:
    """Concatenates trees of the same structure along the leading axis."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *trees)


def tree_flip(tree: Tree) -> Tree:
    """Reverses the leading axis of every array of a tree."""
    return jax.tree.map(lambda a: jnp.flip(a, 0), tree)
