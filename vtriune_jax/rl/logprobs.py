"""Log-probabilities of given tokens, without ever holding `[tokens, vocab]`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vtriune_jax.models.platform import platform

BANNED_LOGIT = -1e30
"""Finite, so that probability 0 times this logit is 0 and not NaN."""


class Rules(NamedTuple):
    """What is not an array of a block: hashable, known when it is compiled."""

    temperature: float
    banned_ids: tuple[int, ...]
    entropy_gradient: bool
    keep: bool
    """Logits and probabilities, for the backward pass, which computes them again otherwise."""
    barrier: bool
    """Behind the head's gradient: a tied head's is then transposed, and what XLA makes of the two
    in bfloat16 its CPU backend cannot run."""


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

    The gradient is written out, so that it is one pass over the logits and two products of the type
    of `hidden`, as is the forward one; that of the head is added up in the head's own type:

        ∂/∂z = g (1[target] − p) − h p (z − logsumexp(z) + H)   g, h: gradients of log p and H
    """
    rows, tokens, _ = hidden.shape
    vocab = head.shape[1]
    fitting = max(1, max_logits // max(1, rows * vocab))
    whole = tokens <= fitting
    barrier = platform() == "cpu" and hidden.dtype == jnp.bfloat16
    rules = Rules(temperature, tuple(banned_ids), entropy_gradient, whole, barrier)
    if whole:
        return _block(rules, hidden, head, targets)

    chunks = -(-tokens // fitting)
    chunk = -(-tokens // chunks)
    padding = chunks * chunk - tokens

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * chunk)[:, :tokens]

    def one(chunk):
        return _block(rules, chunk[0], head, chunk[1])

    logps, entropy = jax.lax.map(one, (split(hidden), split(targets)))
    return join(logps), join(entropy)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(
    rules: Rules,
    hidden: Float[Array, "rows tokens embed"],
    head: Float[Array, "embed vocab"],
    targets: Int[Array, "rows tokens"],
) -> tuple[Float[Array, "rows tokens"], Float[Array, "rows tokens"]]:
    """`token_logps` of all tokens at once."""
    return _block_forward(rules, hidden, head, targets)[0]


def _block_forward(
    rules: Rules, hidden: Array, head: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple]:
    logits = _logits(rules, hidden, head)
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    normalizer = jnp.log(total) + top[..., 0]
    chosen, possible = _chosen(rules, head, targets)
    logps = jnp.where(possible, jnp.where(chosen, logits, 0.0).sum(-1) - normalizer, 0.0)
    entropy = normalizer - (weights * logits).sum(-1) / total
    kept = (logits, weights / total[..., None]) if rules.keep else None
    return (logps, entropy), (hidden, head, targets, kept, normalizer, entropy)


def _block_backward(
    rules: Rules, kept: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, head, targets, found, normalizer, entropy = kept
    if found is None:
        logits = _logits(rules, hidden, head)
        found = logits, jnp.exp(logits - normalizer[..., None])
    logits, probs = found
    chosen, possible = _chosen(rules, head, targets)
    to_logps, to_entropy = (gradient[..., None] for gradient in gradients)
    change = jnp.where(possible[..., None], to_logps, 0.0) * (chosen - probs)
    if rules.entropy_gradient:
        change -= to_entropy * probs * (logits - (normalizer - entropy)[..., None])
    change = (change / rules.temperature).astype(hidden.dtype)
    to_hidden = jnp.einsum("rtv,ev->rte", change, head.astype(hidden.dtype))
    to_head = jnp.einsum("rte,rtv->ev", hidden, change, preferred_element_type=head.dtype)
    if rules.barrier:
        to_head = jax.lax.optimization_barrier(to_head)
    return to_hidden, to_head, None


_block.defvjp(_block_forward, _block_backward)


def _logits(rules: Rules, hidden: Array, head: Array) -> Float[Array, "rows tokens vocab"]:
    """Float32, divided by the temperature, without banned ids."""
    logits = jnp.einsum(
        "rte,ev->rtv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    logits = logits / rules.temperature
    return jnp.where(_allowed(rules, head), logits, BANNED_LOGIT) if rules.banned_ids else logits


def _chosen(
    rules: Rules, head: Array, targets: Array
) -> tuple[Bool[Array, "rows tokens vocab"], Bool[Array, "rows tokens"]]:
    """Where each target stands among the logits, and whether it is a possible one.

    A comparison instead of a gather: it stays local when the vocabulary is sharded.
    """
    allowed = _allowed(rules, head)
    chosen = (jnp.arange(head.shape[1]) == targets[..., None]) & allowed
    return chosen, jnp.asarray(allowed)[targets]


def _allowed(rules: Rules, head: Array) -> Bool[np.ndarray, " vocab"]:
    allowed = np.ones(head.shape[1], bool)
    allowed[list(rules.banned_ids)] = False
    return allowed
