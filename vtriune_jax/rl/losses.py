"""Losses as sums and denominators over tokens; whoever has all of them divides, once.

Every function returns a dict `name → (sum, count)` with one entry per data source, so that the
split into rows, micro-batches and devices never changes a result: sums add up, means do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtriune_jax.errors import UserError

Sums = dict[str, tuple[jax.Array, jax.Array]]
"""name → (sum, count), arrays of shape [] or [sources]."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, over the distribution `softmax(logits / temperature)` without banned ids.

    `old` names the log-probs below the ratio of GRPO: "current" is right for one update per rollout
    batch (the ratio is 1, its gradient is not 0, and no second forward pass is needed), "rollout"
    takes the sampler's, for several updates per rollout batch.
    """

    kind: Literal["grpo", "sft"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    old: Literal["current", "rollout"] = "current"
    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()
    """Never sampled and never trained on; the sampler's set."""
    max_logits: int = 2**27
    """Logits held at once on a device (float32: 512 MiB)."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(
                f"temperature={self.temperature}: there is no gradient of greedy completions; "
                "sample with a positive temperature, e.g. 1.0"
            )


def grpo(
    logps: Float[Array, "rows tokens"],
    entropy: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    rollout_logps: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
    config: LossConfig,
) -> Sums:
    """The clipped policy gradient of GRPO, summed over tokens.

        r = exp(log p − log p_old)
        loss = Σ max(−A r, −A clip(r, 1 − clip_low, 1 + clip_high))

    Beside `loss`: `entropy`; `clip_fraction`, tokens where the clip took the gradient away; `kl`,
    the estimate r − 1 − log r of KL(old ‖ current); `rollout_gap`, |log p − log p_rollout|, which
    is 0 when sampler and trainer agree and nothing was updated in between.
    """
    old = jax.lax.stop_gradient(logps) if config.old == "current" else rollout_logps
    # The mask comes before the exponential: 0 · inf would be NaN, in the gradient too.
    log_ratio = jnp.where(mask > 0, logps - old, 0.0)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    gap = jnp.abs(jnp.where(mask > 0, logps - rollout_logps, 0.0))
    return {
        "loss": per_source(jnp.maximum(plain, clipped), mask, source, num_sources),
        "entropy": per_source(entropy, mask, source, num_sources),
        "clip_fraction": per_source((clipped > plain) * 1.0, mask, source, num_sources),
        "kl": per_source(ratio - 1.0 - log_ratio, mask, source, num_sources),
        "rollout_gap": per_source(gap, mask, source, num_sources),
    }


def sft(
    logps: Float[Array, "rows tokens"],
    entropy: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
) -> Sums:
    """Cross-entropy of the demonstration, −Σ log p, and the entropy."""
    return {
        "loss": per_source(-logps, mask, source, num_sources),
        "entropy": per_source(entropy, mask, source, num_sources),
    }


def per_source(
    values: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    source: Int[Array, " rows"],
    num_sources: int,
) -> tuple[Float[Array, " sources"], Float[Array, " sources"]]:
    """(Σ mask · values, Σ mask) for each data source; what lies under a zero mask is not read."""
    kept = jnp.where(mask > 0, values * mask, 0.0).sum(-1)
    # Not a matmul: on a TPU its default precision would round the counts.
    member = jax.nn.one_hot(source, num_sources, dtype=jnp.float32)
    return (kept[:, None] * member).sum(0), (mask.sum(-1)[:, None] * member).sum(0)
