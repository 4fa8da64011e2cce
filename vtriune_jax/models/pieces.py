"""The rows of a batch in pieces, one after the other: the same result in less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

T = TypeVar("T")


def split_rows(tree: T, pieces: int) -> T:
    """The tree with a leading axis of `pieces` in front of all others.

    A piece is every k-th row, so that it lies on all devices as the whole does.
    """

    def split(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(len(x) // pieces, pieces, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def map_rows(function: Callable[[T], Array], tree: T, pieces: int) -> Array:
    """`function(tree)`, whose rows are those of the tree, by so many pieces of it."""
    if pieces == 1:
        return function(tree)
    found: Any = jax.lax.map(function, split_rows(tree, pieces))
    return jax.lax.collapse(jnp.swapaxes(found, 0, 1), 0, 2)
