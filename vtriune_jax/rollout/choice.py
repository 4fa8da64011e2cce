"""Which token comes next: temperature, banned ids, top-k and top-p, and the draw itself."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

BLOCK = 128
"""Neighbouring tokens whose probabilities are added up first."""


@dataclass(frozen=True)
class Sampling:
    """How to draw completions. Log-probs are those of the softmax at this temperature."""

    max_tokens: int
    n: int = 8
    temperature: float = 1.0
    """0 is greedy; log-probs are then those at temperature 1."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 is off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""


def next_token(
    logits: Float[Array, "groups n vocab"],
    keys: Key[Array, "groups n"],
    t: Int[Array, ""],
    banned: tuple[int, ...],
    sampling: Sampling,
) -> tuple[Int[Array, "groups n"], Float[Array, "groups n"]]:
    """Choose the next ids; their log-probs are under the temperature and without banned ids only.

    Top-k and top-p narrow the choice but not the log-probs, which so stay those of a distribution
    that the trainer can recompute.
    """
    logits = logits.at[..., jnp.asarray(banned, jnp.int32)].set(-jnp.inf)
    logits = logits / (sampling.temperature or 1.0)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    if sampling.temperature == 0:
        ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        kept = truncate(logits, sampling.top_k, sampling.top_p)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t))))
        ids = pick(jnp.where(kept > -jnp.inf, weights, 0.0), uniform(keys))
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)
    logps = chosen - top - jnp.log(weights.sum(axis=-1, keepdims=True))
    return ids, logps[..., 0]


def pick(
    weights: Float[Array, "*rows vocab"], uniform: Float[Array, "*rows"]
) -> Int[Array, "*rows"]:
    """Draw an id in proportion to its weight with one number from [0, 1).

    The first id at which the running sum of the weights exceeds `uniform` of the whole; the sums of
    blocks tell in which block that is, so that only one block is walked. An id of weight 0 is never
    drawn. One random number, not one for each id of the vocabulary, as the Gumbel trick takes.
    """
    padding = -weights.shape[-1] % BLOCK
    weights = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, padding)])
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    goal = uniform * ends[..., -1]
    block = _first_above(ends, sums, goal)
    before = jnp.where(jnp.arange(ends.shape[-1]) < block[..., None], ends, 0.0).max(axis=-1)
    own = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + _first_above(jnp.cumsum(own, axis=-1), own, goal - before)


def _first_above(
    ends: Float[Array, "*rows sums"], sizes: Float[Array, "*rows sums"], goal: Float[Array, "*rows"]
) -> Int[Array, "*rows"]:
    """Where the running sums `ends` first exceed the goal, or by rounding never do, the last one
    of a size above 0."""
    place = jnp.arange(ends.shape[-1], dtype=jnp.int32)
    last = jnp.where(sizes > 0, place, 0).max(axis=-1)
    return jnp.minimum((ends <= goal[..., None]).sum(axis=-1, dtype=jnp.int32), last)


def truncate(
    logits: Float[Array, "*rows vocab"], top_k: int, top_p: float
) -> Float[Array, "*rows vocab"]:
    """Set to -inf all but the top k, then all but the likeliest that reach probability top_p."""
    if top_k <= 0 and top_p >= 1:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    if top_k > 0:
        ordered = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < top_p) & jnp.isfinite(ordered)
    # The likeliest token always stays, even for top_p = 0.
    kept = kept.at[..., 0].set(True)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
