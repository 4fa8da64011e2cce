"""What weighs the gradient of a token: ratios of probabilities, their clips and truncations."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtriune_jax.rl.normalise import Sums, largest_per_source, per_source, row_means

LARGEST_LOG_RATIO = 20.0
"""Beyond it a ratio of two models says nothing more; its exponential would overflow, and one token
take a whole step with it."""

RATIO_EDGES = (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)
"""Between the bins of the histogram of rollout ratios."""


def sequence_log_ratio(
    log_ratio: Float[Array, "rows tokens"],
    logps: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
) -> Float[Array, "rows tokens"]:
    """GSPO's log-ratio, the same number for all tokens of a completion (Zheng 2025, eq. 7 and 14).

        log s_i = 1/T_i Σ_t (log p_it − log p_old_it),   log s_it = sg(log s_i) + log p_it − sg(…)

    Its value is the sequence's, its gradient the token's own.
    """
    own = logps - jax.lax.stop_gradient(logps)
    return jnp.where(mask > 0, jax.lax.stop_gradient(row_means(log_ratio, mask)) + own, 0.0)


def clipped_loss(
    log_ratio: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    """PPO's clipped loss of each token, and where either clip took the gradient away (0 or 1).

    loss = max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high))
    loss = min(loss, −A · dual_clip)   where A < 0, if dual_clip is not 0   (Ye 2020)
    """
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = jnp.maximum(plain, clipped)
    if not dual_clip:
        return loss, (clipped > plain) * 1.0, jnp.zeros_like(loss)
    bound = -advantages * dual_clip
    capped = (advantages < 0) & (loss > bound)
    return jnp.where(capped, bound, loss), (clipped > plain) * 1.0, capped * 1.0


def cispo_loss(
    log_ratio: Float[Array, "rows tokens"],
    logps: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    """CISPO's loss of each token, and where the clip acted (0 or 1); (MiniMax 2025, eq. 4 and 5).

        loss = −sg(clip(r, 1 − clip_low, 1 + clip_high)) · A · log p

    The weight is clipped, never the gradient: every token keeps one.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -weight * advantages * logps, (weight != ratio) * 1.0


def rollout_ratio(
    trainer: Float[Array, "rows tokens"],
    rollout: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
) -> Float[Array, "rows tokens"]:
    """p_trainer / p_rollout of each token under the parameters that sampled it; no gradient.

    1 where sampler and trainer compute the same, and under a zero mask.
    """
    gap = jnp.where(mask > 0, trainer - rollout, 0.0)
    bounded = jnp.clip(gap, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return jax.lax.stop_gradient(jnp.exp(bounded))


def ratio_statistics(
    ratio: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
    histogram: bool,
) -> Sums:
    """Mean and maximum of `rollout_ratio`, and the share of tokens in each bin of RATIO_EDGES."""
    sums = {
        "rollout_ratio": per_source(ratio, mask, source, num_sources),
        "rollout_ratio_max": largest_per_source(ratio, mask, source, num_sources),
    }
    if histogram:
        for low, high in pairwise((0.0, *RATIO_EDGES, float("inf"))):
            inside = (low <= ratio) & (ratio < high)
            name = f"rollout_ratio_from_{low:g}_to_{high:g}"
            sums[name] = per_source(inside * 1.0, mask, source, num_sources)
    return sums
