"""Penalties that keep the policy near a reference model."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from vtriune_jax.rl.ratios import LARGEST_LOG_RATIO

Estimator = Literal["k1", "k2", "k3", "mse"]


def kl_penalty(
    logps: Float[Array, "rows tokens"],
    reference: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    estimator: Estimator,
) -> Float[Array, "rows tokens"]:
    """An estimate of KL(policy ‖ reference) from each sampled token, with d = log p_ref − log p.

        k1   −d              unbiased, but its gradient is 0 on average: to watch, not to penalise
        k2   d² / 2          also called "mse"; its gradient is that of the KL
        k3   e^d − 1 − d     unbiased, never negative, of low variance (GRPO's)

    d is limited to ±20, and 0 under a zero mask.
    """
    d = jnp.where(mask > 0, reference - logps, 0.0)
    d = jnp.clip(d, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    if estimator == "k1":
        return -d
    if estimator == "k3":
        return jnp.expm1(d) - d
    return d * d / 2
