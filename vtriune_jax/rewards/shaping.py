"""From parts of a reward to one number. Plain arithmetic: floats and arrays of any shape alike."""

from __future__ import annotations

from jaxtyping import Array, Float

SIZE_PENALTY = 0.6


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
