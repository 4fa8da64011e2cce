"""Log-probabilities of given tokens, without ever holding `[tokens, vocab]`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

BANNED_LOGIT = -1e30
"""Finite, so that probability 0 times this logit is 0 and not NaN."""


def token_logps(
    hidden: Float[Array, "rows tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "rows tokens"],
    *,
    temperature: float = 1.0,
    banned_ids: Sequence[int] = (),
    max_logits: int = 2**27,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    """Log-probability of each target, and the entropy of the distribution it came from.

        z = hidden · head / temperature,  z = −∞ at banned ids
        log p(target) = z[target] − logsumexp(z),   H = logsumexp(z) − Σ p z

    which is the sampler's distribution when temperature and banned ids are the sampler's. A banned
    target has no probability; it gets 0, and the caller masks it. The entropy carries no gradient
    unless `entropy_gradient` asks for one.
    Logits are float32 whatever the type of `hidden`.

    At most `max_logits` logits exist at once: the tokens axis is walked in chunks (the rows axis is
    the sharded one) that are computed again in the backward pass. When all fit, nothing is computed
    twice.
    """
    rows, tokens, _ = hidden.shape
    vocab = head.shape[1]
    allowed = np.ones(vocab, bool)
    allowed[list(banned_ids)] = False
    fitting = max(1, max_logits // max(1, rows * vocab))
    if tokens <= fitting:
        return _block(hidden, head, targets, temperature, allowed, entropy_gradient)

    chunks = -(-tokens // fitting)
    chunk = -(-tokens // chunks)
    padding = chunks * chunk - tokens

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * chunk)[:, :tokens]

    @jax.checkpoint
    def one(chunk):
        return _block(chunk[0], head, chunk[1], temperature, allowed, entropy_gradient)

    logps, entropy = jax.lax.map(one, (split(hidden), split(targets)))
    return join(logps), join(entropy)


def _block(
    hidden: Float[Array, "rows tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "rows tokens"],
    temperature: float,
    allowed: Bool[np.ndarray, " vocab"],
    entropy_gradient: bool,
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    # The head is cast here, inside the chunk, so that its gradient adds up in the head's own type.
    logits = jnp.einsum(
        "rte,ev->rtv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    logits = logits / temperature
    if not allowed.all():
        logits = jnp.where(allowed, logits, BANNED_LOGIT)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    normalizer = jnp.log(total) + top[..., 0]
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    chosen = (jnp.arange(logits.shape[-1]) == targets[..., None]) & allowed
    possible = jnp.asarray(allowed)[targets]
    logps = jnp.where(possible, jnp.where(chosen, logits, 0.0).sum(-1) - normalizer, 0.0)
    entropy = normalizer - (weights * logits).sum(-1) / total
    return logps, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)
