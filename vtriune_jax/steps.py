"""What one step of a stage does, each line of the loop as a function.

A supervised stage goes the same way as one that samples: its completions are the demonstrations,
nobody judges them, and each has advantage 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vtriune_jax.assemble import Parts
from vtriune_jax.data.packing import split_batch
from vtriune_jax.evaluate import items
from vtriune_jax.metrics import Sums
from vtriune_jax.optim import make_optimizer, partition
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.stages import Stage
from vtriune_jax.types import Batch, Completion, Group, Prompt, TrainState, Verdict

Features = Float[Array, "groups units embed"] | None
Encode = Callable[[Any, Sequence[Prompt]], Features]
Update = Callable[[TrainState, Batch], tuple[TrainState, Sums]]


@dataclass(frozen=True)
class Compiled:
    """The state of a stage at its start, and the jitted functions of its loop."""

    state: TrainState
    encode: Encode
    """Images → features for `respond`; None where neither it nor the update needs them."""
    update: Update
    """All minibatches of a batch, one after the other, and the sums over them."""
    vision_frozen: bool
    """Whether the update takes the features, or trains the tower on the images."""


def compiled(stage: Stage, params: Any, parts: Parts) -> Compiled:
    """What the loop of a stage calls, beginning at `params`."""
    tx = make_optimizer(stage.optim)
    state = init_state(params, tx, parts.mesh, stage.freeze)
    vision_frozen = "visual" not in partition(state.params, stage.freeze)[0]
    update_once = make_update(
        parts.graphdef,
        tx,
        stage.loss,
        parts.mesh,
        state,
        num_sources=len(parts.sources),
        freeze=stage.freeze,
        micro_batches=parts.config.batch.micro_batches,
    )

    def encode(params: Any, prompts: Sequence[Prompt]) -> Features:
        if not (vision_frozen or stage.sampling):
            return None
        return jax.block_until_ready(parts.encode(params, prompts))

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        total: Sums = {}
        for part in split_batch(batch, stage.minibatches):
            state, sums = update_once(state, part)
            total = jax.tree.map(jnp.add, total, sums) if total else sums
        return state, jax.device_get(total)

    return Compiled(state, encode, update, vision_frozen)


def respond(
    stage: Stage,
    step: int,
    params: Any,
    prompts: Sequence[Prompt],
    features: Features,
    parts: Parts,
) -> list[Group]:
    """n completions of every prompt, or its demonstration.

    What is random follows from the seed, the step of the run and the prompt's place in it.
    """
    if not stage.sampling:
        return [Group(prompt, (demonstration(prompt, parts),)) for prompt in prompts]
    key = jax.random.fold_in(jax.random.key(parts.config.seed), stage.start + step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    slot = parts.slots.prompt_tokens
    return parts.engine.generate(params, prompts, features, stage.sampling, keys, slot)


def demonstration(prompt: Prompt, parts: Parts) -> Completion:
    """The text to imitate; its log-probs are not known, and not needed."""
    text = prompt.sample.demonstration
    ids = parts.prompter.encode_completion(text)
    return Completion(ids=ids, logps=np.zeros(len(ids), np.float32), text=text, finish="stop")


def verify(stage: Stage, step: int, groups: Sequence[Group], parts: Parts) -> list[list[Verdict]]:
    """A verdict for every completion, none for demonstrations.

    The progress that thresholds follow counts from 1.
    """
    if not stage.sampling:
        return []
    progress = (step + 1) / stage.steps
    verdicts = iter(parts.verifiers.score(items(groups, parts, progress=progress)))
    return [[next(verdicts) for _ in group.completions] for group in groups]


def advantages(
    groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]
) -> tuple[Float[np.ndarray, "groups n"], Float[np.ndarray, "groups n"]]:
    """Advantages and weights [groups, n]: a failed verification is masked, never a reward of 0."""
    if not verdicts:
        ones = np.ones((len(groups), len(groups[0].completions)), np.float32)
        return ones, ones
    scores = np.array([[verdict.score for verdict in judged] for judged in verdicts])
    valid = np.array([[verdict.status == "ok" for verdict in judged] for judged in verdicts])
    values, weights, _ = group_advantages(scores, valid)
    return values, weights
