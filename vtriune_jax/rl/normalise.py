"""Sums over tokens and what they are divided by, per data source.

Every function returns (sum, count) with one entry per data source, so that the split into rows,
micro-batches and devices never changes a result: sums add up, means do not. A row is a completion.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""name → (sum, count), arrays of shape [] or [sources]."""

MAXIMA = frozenset({"rollout_ratio_max"})
"""Names whose "sum" is the largest value so far, and its count 1."""

Normalisation = Literal["token", "sequence", "dr"]


def normalised(
    values: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
    how: Normalisation,
    room: int = 0,
) -> tuple[Float[Array, " sources"], Float[Array, " sources"]]:
    """The loss of each token → (sum, count) whose quotient is the loss.

        token     Σ_i Σ_t l_it / Σ_i T_i          all tokens weigh the same (DAPO)
        sequence  Σ_i (Σ_t l_it / T_i) / rows     all completions weigh the same (GRPO, GSPO)
        dr        Σ_i Σ_t l_it / (rows · slot)    no length weighs anything (Dr.GRPO)

    T_i are the trained tokens of row i, `rows` those rows that have any, and `slot` is the `room`
    for a completion, by default the tokens here. A mask that is the same fraction throughout a row
    makes the row weigh so much.
    """
    if how == "token":
        return per_source(values, mask, source, num_sources)
    total, weight = _row_sums(values, mask), mask.max(-1)
    if how == "sequence":
        trained = mask.sum(-1)
        total = weight * total / jnp.where(trained > 0, trained, 1.0)
        return _by_source(total, weight, source, num_sources)
    return _by_source(total, weight * (room or mask.shape[-1]), source, num_sources)


def per_source(
    values: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
) -> tuple[Float[Array, " sources"], Float[Array, " sources"]]:
    """(Σ mask · values, Σ mask) for each data source; what lies under a zero mask is not read."""
    return _by_source(_row_sums(values, mask), mask.sum(-1), source, num_sources)


def largest_per_source(
    values: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
) -> tuple[Float[Array, " sources"], Float[Array, " sources"]]:
    """(largest value, 1) for each data source, (0, 0) where it has no token; `values` are ≥ 0."""
    highest = jnp.where(mask > 0, values, 0.0).max(-1)
    member = jax.nn.one_hot(source, num_sources, dtype=jnp.float32)
    there = (mask.max(-1)[:, None] > 0) * member
    return (highest[:, None] * there).max(0), there.max(0)


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums over two parts of a batch, out of those over each."""
    return {
        name: jax.tree.map(jnp.maximum if name in MAXIMA else jnp.add, a[name], b[name])
        for name in a
    }


def row_means(
    values: Float[Array, "rows tokens"], mask: Float[Array, "rows tokens"]
) -> Float[Array, "rows 1"]:
    """The mean over the trained tokens of each row; 0 in a row without any."""
    count = mask.sum(-1)
    return (_row_sums(values, mask) / jnp.where(count > 0, count, 1.0))[:, None]


def _row_sums(
    values: Float[Array, "rows tokens"], mask: Float[Array, "rows tokens"]
) -> Float[Array, " rows"]:
    return jnp.where(mask > 0, values * mask, 0.0).sum(-1)


def _by_source(
    totals: Float[Array, " rows"],
    counts: Float[Array, " rows"],
    source: Int[Array, " rows"],
    num_sources: int,
) -> tuple[Float[Array, " sources"], Float[Array, " sources"]]:
    # Not a matmul: on a TPU its default precision would round the counts.
    member = jax.nn.one_hot(source, num_sources, dtype=jnp.float32)
    return (totals[:, None] * member).sum(0), (counts[:, None] * member).sum(0)
