"""Groups of completions → a `Batch` of static shape, in one of the ways of `data.rows`.

Single and group rows: the prompt left-padded into its slot, then completions, each right-padded
into a slot of its own, so that they begin at the same places in every row. Packed rows: sequences
one behind the other, told apart by segments. In all of them the head is applied to completion
slots alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from vtriune_jax.data import device_rows
from vtriune_jax.data.rows import Rows, Slots, assign, cut, packed_rows, sequence_lengths
from vtriune_jax.errors import UserError
from vtriune_jax.models import layout
from vtriune_jax.types import Batch, Group, Prompt, Vision

Places = list[list[tuple[int, int]]]
"""What lies in each row: (group, number of the completion in it)."""


def pack(
    groups: Sequence[Group],
    advantages: Float[np.ndarray, "groups samples"],
    weights: Float[np.ndarray, "groups samples"],
    sources: Mapping[str, int],
    slots: Slots,
    features: Float[Array, "groups units embed"] | None = None,
    rows: Rows | None = None,
    parts: int = 1,
    unit: int = 1,
) -> Batch:
    """Lays the completions of `groups` out as `rows`: by default single ones, of whole slots.

    `weights` is 0 for completions that must not be trained on (a failed verification). The images
    travel as patches, or as `features` when the vision tower has already encoded them: once for
    each prompt of a row.

    Packed rows are a multiple of `unit` for each of `parts` minibatches, and their number follows
    from `rows.n`; no completion is ever left out.

    Raises:
      UserError: a prompt, a completion or the images of a prompt do not fit their slot.
      ValueError: the sequences do not fit into packed rows of so many; `data.rows.needs` tells.
    """
    size = slots.completion_tokens
    rows = rows or Rows("single", 1, size, slots.prompt_tokens + size)
    places = _places(groups, rows, parts, unit)
    packed = rows.kind == "packed"
    shape, per_token = (len(places), rows.tokens), (len(places), rows.n, rows.completion_tokens)
    ids = np.full(shape, slots.pad_id, np.int32)
    positions = np.zeros((shape[0], 3, shape[1]), np.int32)
    segments = np.zeros(shape, np.int32)
    image_index = np.full(shape, -1, np.int32)
    predictors = np.zeros(per_token, np.int32)
    mask, gains, logps = np.zeros((3, *per_token), np.float32)
    source = np.zeros(per_token[:2], np.int32)
    prompt_of = np.zeros((len(places), rows.n if packed else 1), np.int32)
    for row, members in enumerate(places):
        end = 0
        for k, (group, i) in enumerate(members):
            prompt, completion = groups[group].prompt, groups[group].completions[i]
            length = len(completion.ids)
            _check_tokens(prompt, length, slots)
            if packed:
                first = end + len(prompt.ids)
            else:
                first = slots.prompt_tokens + k * rows.completion_tokens
            if packed or k == 0:
                here = slice(first - len(prompt.ids), first)
                ids[row, here] = prompt.ids
                positions[row, :, here] = prompt.positions
                segments[row, here] = k + 1
                image_index[row, here] = prompt.image_index
                prompt_of[row, k] = group
            end = first + length
            ids[row, first:end] = completion.ids
            positions[row, :, first:end] = prompt.positions[:, -1:] + 1 + np.arange(length)
            segments[row, first:end] = k + 1 if packed else 1
            predictors[row, k, :length] = np.arange(first - 1, end - 1)
            mask[row, k, :length] = weights[group][i]
            gains[row, k] = advantages[group][i]
            logps[row, k, :length] = completion.logps
            source[row, k] = sources[prompt.sample.data_source]
    return Batch(
        ids=ids,
        positions=positions,
        segments=segments,
        image_index=image_index,
        mask=mask,
        advantages=gains,
        rollout_logps=logps,
        source=source,
        predictors=predictors if packed else None,
        **_images(groups, prompt_of, slots, features),
    )


def stack_vision(prompts: Sequence[Prompt], slots: Slots) -> Vision:
    """The images of several prompts, each padded to `slots.windows` windows."""
    for prompt in prompts:
        _check_windows(prompt, slots)
    return layout.stack_visions([prompt.vision for prompt in prompts], slots.windows)


def check_fits(prompt: Prompt, demonstration: int, slots: Slots) -> None:
    """Raises the UserError of `pack` early, for a prompt and the tokens of its demonstration."""
    _check_tokens(prompt, demonstration, slots, "demonstration")
    _check_windows(prompt, slots)


def minibatch(batch: Batch, parts: int, k: int) -> Batch:
    """The k-th of `parts` batches of equally many rows, in order."""
    rows = len(batch.ids)
    if rows % parts:
        raise UserError(f"minibatches={parts} does not divide the {rows} rows of a batch")
    return jax.tree.map(lambda leaf: device_rows.part(leaf, parts, k), batch)


def padding(
    batch: Batch, prompts: Sequence[Prompt], slots: Slots
) -> dict[str, tuple[float, float]]:
    """(padded, all) of the tokens of a batch, `pad/tokens`, and of patches, `pad/vision`.

    Patches are those that the vision tower sees: of the batch, or, if it is frozen, of `prompts`.
    """
    if batch.vision is None:
        seen = [prompt.vision.segments for prompt in prompts]
        patches = len(prompts) * slots.windows * prompts[0].vision.segments.shape[-1]
    else:
        seen = [batch.vision.segments]
        patches = batch.vision.segments.size
    filled = sum(np.count_nonzero(segments) for segments in seen)
    tokens, used = batch.segments.size, np.count_nonzero(batch.segments)
    return {
        "pad/tokens": (float(tokens - used), float(tokens)),
        "pad/vision": (float(patches - filled), float(patches)),
    }


def _places(groups: Sequence[Group], rows: Rows, parts: int, unit: int) -> Places:
    each = [[(g, i) for i in range(len(group.completions))] for g, group in enumerate(groups)]
    if rows.kind != "packed":
        return [own[k : k + rows.n] for own in each for k in range(0, len(own), rows.n)]
    every = [place for own in each for place in own]
    found, done = [], 0
    for part in cut(groups, parts):
        lengths = sequence_lengths(part)
        count = packed_rows(len(lengths), rows.n, unit)
        members = assign(lengths, count, rows.n, rows.tokens)
        if members is None:
            raise ValueError(f"{len(lengths)} sequences do not fit into {count} rows of {rows}")
        found += [[every[done + i] for i in row] for row in members]
        done += len(lengths)
    return found


def _images(
    groups: Sequence[Group], prompt_of: np.ndarray, slots: Slots, features: Array | None
) -> dict[str, Any]:
    """The images of each prompt of each row, as patches or as features."""
    if features is not None:
        return {"features": device_rows.take([features], prompt_of)}
    vision = stack_vision([groups[g].prompt for g in prompt_of.reshape(-1)], slots)
    return {"vision": jax.tree.map(lambda x: x.reshape(*prompt_of.shape, *x.shape[1:]), vision)}


def _check_tokens(
    prompt: Prompt, completion: int, slots: Slots, called: str = "completion"
) -> None:
    for name, key, size, limit in (
        ("prompt", "prompt", len(prompt.ids), slots.prompt_tokens),
        (called, "completion", completion, slots.completion_tokens),
    ):
        if size > limit:
            raise UserError(
                f"{prompt.sample.place}: the {name} has {size} tokens, its slot {limit}; "
                f"raise batch.{key}_tokens or drop the row"
            )


def _check_windows(prompt: Prompt, slots: Slots) -> None:
    windows = prompt.vision.patches.shape[0]
    if windows > slots.windows:
        raise UserError(
            f"{prompt.sample.place}: its images fill {windows} windows, batch.windows="
            f"{slots.windows}; raise batch.windows or lower data.max_pixels"
        )
