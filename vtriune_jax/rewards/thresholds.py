"""The IoU threshold that rises while the policy improves."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def stepped_threshold(
    progress: Float[Array, "*batch"] | float,
    bounds: tuple[float, ...] = (0.10, 0.25),
    values: tuple[float, ...] = (0.85, 0.95, 0.99),
) -> Float[Array, "*batch"]:
    """V-Triune's dynamic IoU threshold: `values[k]` up to and including `bounds[k]`, then the last.

    `progress` is step / total steps. A lenient start gives a weak policy something to climb; the
    strict end keeps the pressure on exact boxes. `bounds` must rise and be one fewer than `values`.
    """
    if len(values) != len(bounds) + 1:
        raise ValueError(
            f"stepped_threshold: {len(bounds)} bounds separate {len(bounds) + 1} values, "
            f"but {len(values)} were given"
        )
    stage = jnp.searchsorted(jnp.asarray(bounds), progress, side="left")
    return jnp.asarray(values)[stage]
