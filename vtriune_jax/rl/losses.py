"""Losses as sums and denominators over tokens; whoever has all of them divides, once.

Every function returns a dict `name → (sum, count)` with one entry per data source; see `normalise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtriune_jax.errors import UserError
from vtriune_jax.rl.kl import Estimator, kl_penalty
from vtriune_jax.rl.normalise import Normalisation, Sums, normalised, per_source
from vtriune_jax.rl.ratios import (
    LARGEST_LOG_RATIO,
    cispo_loss,
    clipped_loss,
    ratio_statistics,
    rollout_ratio,
    sequence_log_ratio,
)


@dataclass(frozen=True)
class LossConfig:
    """What is minimised, over the distribution `softmax(logits / temperature)` without banned ids.

    `old` names the log-probs below the ratio: "current" is right for one update per rollout batch
    (the ratio is 1, its gradient is not 0, and no second forward pass is needed); for several there
    are "recomputed", `batch.old_logps`, the trainer's before the first of them (NaN: the current
    ones, as in the first itself), and "rollout", the sampler's.
    """

    kind: Literal["grpo", "gspo", "cispo", "sft"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    """Bound of the loss where A < 0, in units of −A; 0 is off."""
    normalise: Normalisation = "token"
    old: Literal["current", "recomputed", "rollout"] = "current"
    tis_cap: float = 0.0
    """Where the weights of truncated importance sampling end; 0 is off."""
    kl_weight: float = 0.0
    """Above 0, `batch.reference_logps` are needed."""
    kl: Estimator = "k3"
    entropy_weight: float = 0.0
    temperature: float = 1.0
    banned_ids: tuple[int, ...] = ()
    """Never sampled and never trained on; the sampler's set."""
    max_logits: int = 2**27
    """Logits held at once on a device (float32: 512 MiB)."""
    room: int = 0
    """Tokens that a completion may have, by which "dr" divides; 0: those of its slot."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(
                f"temperature={self.temperature}: there is no gradient of greedy completions; "
                "sample with a positive temperature, e.g. 1.0"
            )
        if self.tis_cap and self.old == "rollout":
            raise UserError(
                f'tis_cap={self.tis_cap} has nothing to weigh with old="rollout", whose ratio is '
                'to the sampler already; set old="recomputed", or tis_cap=0'
            )


def policy_gradient(
    logps: Float[Array, "rows tokens"],
    entropy: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    batch: Any,
    num_sources: int,
    config: LossConfig,
) -> Sums:
    """The loss of the GRPO family over a `Batch`, as sums; `config.normalise` says over what.

        l = w · surrogate(r, A) + kl_weight · KL − entropy_weight · H
        r = exp(log p − log p_old)                         log r limited to ±20
        w = min(exp(log p_old − log p_rollout), tis_cap)   without gradient, if tis_cap is not 0

    The surrogate is `ratios.clipped_loss` of the token's ratio for "grpo" (with clip_high above
    clip_low: DAPO) and of the completion's for "gspo", or `ratios.cispo_loss`. The log-probs that
    the trainer had when the batch was sampled stand for p_old in w, whatever `old` is.

    Beside `loss`: `entropy`; `clip_fraction`, tokens where the clip acted, and `dual_clip_fraction`
    if that is on; `kl`, the estimate r − 1 − log r of KL(old ‖ current), by token for all kinds;
    `rollout_gap`, |log p − log p_rollout|, which is 0 when sampler and trainer agree and nothing
    was updated in between; `ratios.ratio_statistics` of w before its truncation, unless
    old="rollout", which has no such ratio; `reference_kl` if that is on.
    """

    def total(values: Float[Array, "rows tokens"]) -> tuple[jax.Array, jax.Array]:
        return per_source(values, mask, batch.source, num_sources)

    old = _old(logps, batch, config)
    # Mask and bound come before the exponential: 0 · inf would be NaN, in the gradient too.
    log_ratio = jnp.where(mask > 0, logps - old, 0.0)
    log_ratio = jnp.clip(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    sums = _surrogate(logps, log_ratio, mask, batch.advantages, config)
    loss = sums.pop("loss")
    sums = {name: total(values) for name, values in sums.items()}
    if config.old != "rollout":
        ratio = rollout_ratio(old, batch.rollout_logps, mask)
        histogram = config.tis_cap > 0
        sums |= ratio_statistics(ratio, mask, batch.source, num_sources, histogram)
        loss = loss * jnp.minimum(ratio, config.tis_cap) if config.tis_cap else loss
    if config.kl_weight:
        penalty = kl_penalty(logps, _given(batch, "reference_logps"), mask, config.kl)
        loss = loss + config.kl_weight * penalty
        sums["reference_kl"] = total(penalty)
    if config.entropy_weight:
        loss = loss - config.entropy_weight * entropy
    gap = jnp.abs(jnp.where(mask > 0, logps - batch.rollout_logps, 0.0))
    return sums | {
        "loss": normalised(loss, mask, batch.source, num_sources, config.normalise, config.room),
        "entropy": total(entropy),
        "kl": total(jnp.exp(log_ratio) - 1.0 - log_ratio),
        "rollout_gap": total(gap),
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


def _surrogate(
    logps: Float[Array, "rows tokens"],
    log_ratio: Float[Array, "rows tokens"],
    mask: Float[Array, "rows tokens"],
    advantages: Float[Array, "rows tokens"],
    config: LossConfig,
) -> dict[str, Float[Array, "rows tokens"]]:
    """The `loss` of each token, and where clips acted."""
    low, high = config.clip_low, config.clip_high
    if config.kind == "cispo":
        loss, clipped = cispo_loss(log_ratio, logps, advantages, low, high)
        return {"loss": loss, "clip_fraction": clipped}
    if config.kind == "gspo":
        log_ratio = sequence_log_ratio(log_ratio, logps, mask)
    loss, clipped, capped = clipped_loss(log_ratio, advantages, low, high, config.dual_clip)
    found = {"loss": loss, "clip_fraction": clipped}
    return found | {"dual_clip_fraction": capped} if config.dual_clip else found


def _old(
    logps: Float[Array, "rows tokens"], batch: Any, config: LossConfig
) -> Float[Array, "rows tokens"]:
    current = jax.lax.stop_gradient(logps)
    if config.old == "current":
        return current
    if config.old == "rollout":
        return batch.rollout_logps
    given = _given(batch, "old_logps")
    return jnp.where(jnp.isnan(given), current, given)


def _given(batch: Any, name: str) -> Float[Array, "rows tokens"]:
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"this loss needs batch.{name}; compute it with rl.policy.make_logps")
    return value
