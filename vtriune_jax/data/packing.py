"""Groups of completions → a `Batch` of static shape.

One completion a row: the prompt left-padded into its slot, the completion right-padded into the
next, so that every row's completion begins at the same place and the head is applied to the
completion slot alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vtriune_jax.errors import UserError
from vtriune_jax.models import layout
from vtriune_jax.types import Batch, Group, Prompt, Vision


@dataclass(frozen=True)
class Slots:
    """The static sizes of a row, and what its padding is made of."""

    prompt_tokens: int
    completion_tokens: int
    windows: int
    pad_id: int


def pack(
    groups: Sequence[Group],
    advantages: Float[np.ndarray, "groups samples"],
    weights: Float[np.ndarray, "groups samples"],
    sources: Mapping[str, int],
    slots: Slots,
    features: Float[Array, "groups units embed"] | None = None,
) -> Batch:
    """Lays the completions of `groups` out as rows, group by group.

    `weights` is 0 for completions that must not be trained on (a failed verification). The images
    travel as patches, or as `features` when the vision tower has already encoded them: once per
    group, repeated here for its completions.

    Raises:
      UserError: a prompt, a completion or the images of a prompt do not fit their slot.
    """
    rows = [(group, i) for group in groups for i in range(len(group.completions))]
    count, prompt_slot, slot = len(rows), slots.prompt_tokens, slots.completion_tokens
    tokens = prompt_slot + slot
    ids = np.full((count, tokens), slots.pad_id, np.int32)
    positions = np.zeros((count, 3, tokens), np.int32)
    segments = np.zeros((count, tokens), np.int32)
    image_index = np.full((count, tokens), -1, np.int32)
    mask = np.zeros((count, slot), np.float32)
    logps = np.zeros((count, slot), np.float32)
    for row, (group, i) in enumerate(rows):
        prompt, completion = group.prompt, group.completions[i]
        start, length = prompt_slot - len(prompt.ids), len(completion.ids)
        _check_tokens(prompt, length, slots)
        end = prompt_slot + length
        ids[row, start:prompt_slot] = prompt.ids
        ids[row, prompt_slot:end] = completion.ids
        positions[row, :, start:prompt_slot] = prompt.positions
        positions[row, :, prompt_slot:end] = prompt.positions[:, -1:] + 1 + np.arange(length)
        segments[row, start:end] = 1
        image_index[row, start:prompt_slot] = prompt.image_index
        mask[row, :length] = 1.0
        logps[row, :length] = completion.logps
    repeats = np.asarray([len(group.completions) for group in groups])
    flat_weights = np.asarray(weights, np.float32).reshape(count, 1)
    flat_advantages = np.asarray(advantages, np.float32).reshape(count, 1)
    prompts = [group.prompt for group in groups]
    return Batch(
        ids=ids,
        positions=positions,
        segments=segments,
        image_index=image_index,
        mask=mask * flat_weights,
        advantages=np.broadcast_to(flat_advantages, mask.shape),
        rollout_logps=logps,
        source=np.array([sources[g.prompt.sample.data_source] for g, _ in rows], np.int32),
        vision=None if features is not None else stack_vision([g.prompt for g, _ in rows], slots),
        features=None if features is None else repeat_features(features[: len(prompts)], repeats),
    )


def repeat_features(
    features: Float[Array, "groups units embed"], repeats: np.ndarray
) -> Float[Array, "rows units embed"]:
    """The features of each group, once for each of its completions."""
    return jnp.repeat(features, repeats, axis=0, total_repeat_length=int(repeats.sum()))


def stack_vision(prompts: Sequence[Prompt], slots: Slots) -> Vision:
    """The images of several prompts, each padded to `slots.windows` windows."""
    for prompt in prompts:
        _check_windows(prompt, slots)
    return layout.stack_visions([prompt.vision for prompt in prompts], slots.windows)


def check_fits(prompt: Prompt, completion: int, slots: Slots) -> None:
    """Raises the UserError of `pack` early, for a prompt and the tokens of its completion."""
    _check_tokens(prompt, completion, slots)
    _check_windows(prompt, slots)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """The batch as `parts` batches of equally many rows, in order."""
    rows = len(batch.ids)
    if rows % parts:
        raise UserError(f"minibatches={parts} does not divide the {rows} rows of a batch")
    size = rows // parts
    return [
        jax.tree.map(lambda leaf, k=k: leaf[k * size : (k + 1) * size], batch) for k in range(parts)
    ]


def _check_tokens(prompt: Prompt, completion: int, slots: Slots) -> None:
    for name, size, limit in (
        ("prompt", len(prompt.ids), slots.prompt_tokens),
        ("completion", completion, slots.completion_tokens),
    ):
        if size > limit:
            raise UserError(
                f"sample {prompt.sample.id}: the {name} has {size} tokens, its slot {limit}; "
                f"raise batch.{name}_tokens or drop the row"
            )


def _check_windows(prompt: Prompt, slots: Slots) -> None:
    windows = prompt.vision.patches.shape[0]
    if windows > slots.windows:
        raise UserError(
            f"sample {prompt.sample.id}: its images fill {windows} windows, batch.windows="
            f"{slots.windows}; raise batch.windows or lower data.max_pixels"
        )
