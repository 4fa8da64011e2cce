"""AdamW with warm-up, and which parameters it may touch, by path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from vtriune_jax.errors import UserError

NO_DECAY = r"norm|/bias$|/scale$"
"""Paths of parameters that weight decay leaves alone."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW after a clip of the global gradient norm; V-Triune's numbers."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    mu_dtype: str = "float32"
    """Of the first moment; the second stays float32."""


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip the global norm to `clip_norm`, then AdamW at `learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
            mu_dtype=config.mu_dtype,
        ),
    )


def learning_rate(config: OptimConfig, step: ArrayLike) -> jax.Array:
    """Linear warm-up over the first `warmup_steps` updates, then constant.

    Update `step` (from 0) has the rate (step + 1) / warmup_steps of the full one: the first update
    already moves.
    """
    reached = jnp.minimum(1.0, (jnp.asarray(step) + 1) / max(1, config.warmup_steps))
    return config.learning_rate * reached


def decayed(params: Any) -> Any:
    """A tree of booleans, true where weight decay acts: on matrices, not on norms or biases."""
    return unflatten_dict(
        {path: not re.search(NO_DECAY, path) for path in flatten_dict(params, sep="/")}, sep="/"
    )


def partition(params: Any, freeze: Sequence[str]) -> tuple[dict, dict]:
    """Split a parameter tree into (trained, frozen) by regexes searched in the joined paths.

    Raises UserError for a regex that is malformed or matches no parameter, with the nearest paths,
    and when nothing is left to train.
    """
    flat = flatten_dict(params, sep="/")
    held = {path for pattern in freeze for path in _matches(pattern, list(flat))}
    if len(held) == len(flat):
        raise UserError(
            f"freeze={list(freeze)} matches all {len(flat)} parameters; leave some to train"
        )
    trained = {path: leaf for path, leaf in flat.items() if path not in held}
    rest = {path: leaf for path, leaf in flat.items() if path in held}
    return unflatten_dict(trained, sep="/"), unflatten_dict(rest, sep="/")


def combine(trained: dict, frozen: dict) -> dict:
    """The inverse of `partition`."""
    return unflatten_dict(flatten_dict(trained, sep="/") | flatten_dict(frozen, sep="/"), sep="/")


def _matches(pattern: str, paths: list[str]) -> list[str]:
    try:
        found = [path for path in paths if re.search(pattern, path)]
    except re.error as error:
        raise UserError(f"freeze: {pattern!r} is not a regular expression: {error}") from error
    if not found:
        pieces = (path.split("/")[:depth] for path in paths for depth in range(1, 9))
        places = sorted({"/".join(piece) for piece in pieces})
        near = difflib.get_close_matches(pattern.strip("^$"), places, n=3, cutoff=0.0)
        raise UserError(
            f"freeze: {pattern!r} matches no parameter; the nearest paths are {', '.join(near)}"
        )
    return found
