"""From parts of a reward to one number. Plain arithmetic: floats and arrays of any shape alike."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int

from vtriune_jax.rewards.arrays import Array, namespace

SIZE_PENALTY = 0.6

_MOST_TOKENS = 46_340
"""Its square is the last to fit into an int32."""


def combine(
    accuracy: Float[Array, "*batch"] | float,
    format: Float[Array, "*batch"] | float,
    accuracy_ratio: Float[Array, "*batch"] | float,
    format_ratio: Float[Array, "*batch"] | float,
) -> Float[Array, "*batch"] | float:
    """The row's reward (α·accuracy + φ·format) / (α + φ), so that a perfect answer earns 1."""
    weighted = accuracy_ratio * accuracy + format_ratio * format
    return weighted / (accuracy_ratio + format_ratio)


def size_penalty(
    predicted: Float[Array, "*batch"] | float, true: Float[Array, "*batch"] | float
) -> Float[Array, "*batch"] | float:
    """0.6 ** |P − G|: each surplus or missing box costs 40 %."""
    return SIZE_PENALTY ** abs(predicted - true)


def weighted_mean(
    parts: Float[Array, "*batch n"], weights: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """Σ w·part / Σ w over the last axis; 0 where the weights sum to 0."""
    xp = namespace(parts)
    total = weights.sum(axis=-1)
    return (weights * parts).sum(axis=-1) / xp.where(total > 0, total, 1)


def tags_once(counts: Int[Array, "*batch tags"]) -> Float[Array, "*batch"]:
    """The share of a template's tags that occur exactly once, from how often each one does."""
    return (counts == 1).mean(axis=-1)


def soft_overlong(
    length: Float[Array, "*batch"] | Int[Array, "*batch"], longest: int, cushion: int
) -> Float[Array, "*batch"]:
    """DAPO's soft penalty of long completions, to be added to the reward (Yu 2025, eq. 13).

    0 up to `longest` − `cushion` tokens, from there linearly down to −1 at `longest`; −1 beyond.
    """
    if not 0 < cushion <= longest:
        raise ValueError(
            f"soft_overlong: cushion={cushion}, longest={longest}; expected 0 < cushion ≤ longest"
        )
    xp = namespace(length)
    return xp.clip((longest - cushion - length) / cushion, -1.0, 0.0)


def repetition_penalty(
    tokens: Int[Array, "*batch tokens"], mask: Bool[Array, "*batch tokens"], n: int = 8
) -> Float[Array, "*batch"]:
    """−(share of a completion's n-grams that occurred in it before), to be added to the reward.

    0 for a text without any repetition of n tokens, near −1 for one phrase over and over. `mask` is
    True for a prefix: the completion's own tokens. Exact, in O(tokens · log tokens · log n).
    """
    if n < 1 or tokens.shape[-1] > _MOST_TOKENS:
        raise ValueError(
            f"repetition_penalty: n={n}, {tokens.shape[-1]} tokens; expected n ≥ 1 and at most "
            f"{_MOST_TOKENS} tokens"
        )
    xp = namespace(tokens)
    if tokens.shape[-1] < n:
        return xp.zeros(tokens.shape[:-1])
    # ranks of n-grams (equal ones have equal ranks) out of those of two shorter, overlapping ones
    ranks, width = _ranks(tokens), 1
    while width < n:
        shift = min(width, n - width)
        pairs = ranks[..., :-shift] * tokens.shape[-1] + ranks[..., shift:]
        ranks, width = _ranks(pairs), width + shift
    real = mask[..., n - 1 :]
    ordered = xp.sort(xp.where(real, ranks, -1), axis=-1)
    changes = (ordered[..., 1:] != ordered[..., :-1]).sum(axis=-1)
    different = changes + (ordered[..., 0] >= 0)
    total = real.sum(axis=-1)
    return -(total - different) / xp.maximum(total, 1)


def _ranks(values: Array) -> Array:
    """Equal values → equal numbers, from 0 up to less than their number, along the last axis."""
    xp = namespace(values)
    order = xp.argsort(values, axis=-1, stable=True)
    ordered = xp.take_along_axis(values, order, axis=-1)
    new = xp.astype(ordered[..., 1:] != ordered[..., :-1], values.dtype)
    rank = xp.concat([xp.zeros_like(new[..., :1]), xp.cumulative_sum(new, axis=-1)], axis=-1)
    return xp.take_along_axis(rank, xp.argsort(order, axis=-1), axis=-1)
