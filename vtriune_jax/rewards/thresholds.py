"""The IoU threshold that rises while the policy improves."""

from __future__ import annotations

from jaxtyping import Float

from vtriune_jax.rewards.arrays import Array, namespace


def stepped_threshold(
    progress: Float[Array, "*batch"] | float,
    bounds: tuple[float, ...] = (0.10, 0.25),
    values: tuple[float, ...] = (0.85, 0.95, 0.99),
) -> Float[Array, "*batch"]:
    """V-Triune's dynamic IoU threshold: `values[k]` up to and including `bounds[k]`, then the last.

    `progress` is step / total steps. A lenient start gives a weak policy something to climb; the
    strict end keeps the pressure on exact boxes. `bounds` must rise and be one fewer than `values`.
    """
    if len(values) != len(bounds) + 1 or list(bounds) != sorted(bounds):
        raise ValueError(
            f"stepped_threshold: bounds={bounds}, values={values}; expected rising bounds and one "
            "more value than bounds"
        )
    xp = namespace(progress)
    stage = xp.searchsorted(xp.asarray(bounds), progress, side="left")
    return xp.asarray(values)[stage]
