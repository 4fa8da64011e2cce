"""Held-out rewards: the same rollouts and verifiers as in training, with sampling of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from vtriune_jax.assemble import Parts
from vtriune_jax.data.packing import stack_vision
from vtriune_jax.rollout.local import Sampling
from vtriune_jax.types import Completion, Group, Prompt, Verdict, Vision
from vtriune_jax.verifiers.router import Item

Encode = Callable[[Any, Vision], Float[Array, "rows units embed"]]


def evaluate(parts: Parts, encode: Encode, params: Any) -> tuple[list[Group], list[list[Verdict]]]:
    """Completes and judges every held-out sample once, `config.eval.batch` at a time.

    Boxes are judged at the fixed threshold `config.eval.iou_threshold`, not at the dynamic one of
    training, so that numbers before and after are of the same thing.
    """
    config = parts.config
    sampling = Sampling(
        n=1, temperature=config.eval.temperature, max_tokens=parts.slots.completion_tokens
    )
    key = jax.random.key(config.seed)
    prompts = [parts.prompt(sample) for sample in parts.heldout]
    groups: list[Group] = []
    pending = []
    for start in range(0, len(prompts), config.eval.batch):
        chunk = prompts[start : start + config.eval.batch]
        # The last chunk is filled up with repetitions: one shape, one compilation.
        full = (chunk * config.eval.batch)[: config.eval.batch]
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jax.numpy.arange(len(full)))
        features = encode(params, stack_vision(full, parts.slots))
        answered = parts.engine.generate(
            params, full, features, sampling, keys, parts.slots.prompt_tokens
        )[: len(chunk)]
        groups += answered
        pending.append(parts.verifiers.submit(items(answered, threshold=config.eval.iou_threshold)))
    verdicts = [verdict for future in pending for verdict in future.result()]
    return groups, [[verdict] for verdict in verdicts]


def items(
    groups: Sequence[Group], progress: float = 1.0, threshold: float | None = None
) -> list[Item]:
    """What the verifiers are asked about each completion, group by group."""
    return [
        item(group.prompt, completion, progress, threshold)
        for group in groups
        for completion in group.completions
    ]


def item(prompt: Prompt, completion: Completion, progress: float, threshold: float | None) -> Item:
    """One question to the verifiers: a completion, how it wants to be judged, the images' sizes."""
    return Item(
        completion=completion.text,
        reward=prompt.sample.reward,
        progress=progress,
        grid=prompt.image_sizes,
        threshold=threshold,
    )
