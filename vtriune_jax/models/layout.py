"""Where the patches, units and tokens of a prompt lie: NumPy on the host, no model.

The vision tower works on windows of fixed size, so that its shapes are static. This module says
which slot of which window a patch goes to, which feature an image token takes, and the three
M-RoPE positions of every token. Patches come in the order of Hugging Face's image processor:
image by image, frame by frame, unit by unit (row-major), and row-major inside a unit. A video is
an image of several frames; images and videos of a prompt stand in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Num

from vtriune_jax.errors import UserError
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.types import Vision


@dataclass(frozen=True)
class WindowLayout:
    """The place of each patch of a row's images in the windows of the vision tower."""

    windows: int
    order: Int[np.ndarray, " patches"]
    """Place of each patch in the flattened [windows · slots]."""
    positions: Int[np.ndarray, "patches 2"]
    """(row, column) of each patch in its image."""
    segments: Int[np.ndarray, " patches"]
    """Number of the patch's image frame, from 1."""
    unit_index: Int[np.ndarray, " units"]
    """Place of each unit in the flattened [windows · slots / unit_patches]."""


def window_layout(grid_thw: Int[np.ndarray, "images 3"], config: ModelConfig) -> WindowLayout:
    """Cut the images into windows; a unit keeps its place inside its (possibly partial) window.

    Raises UserError when a grid is not a whole number of units.
    """
    merge, side = config.vision.merge_size, config.vision.window_units
    inside = np.arange(merge**2)
    unit_index, positions, segments = [], [], []
    windows = segment = 0
    for frames, rows, columns in np.asarray(grid_thw).tolist():
        if rows % merge or columns % merge:
            raise UserError(
                f"an image of {rows}×{columns} patches does not divide into units of "
                f"{merge}×{merge}; resize it to a multiple of {config.vision.patch_size * merge} px"
            )
        row, column = np.divmod(np.arange(rows * columns // merge**2), columns // merge)
        across = -(-columns // (merge * side))
        window = row // side * across + column // side
        place = window * side**2 + row % side * side + column % side
        position = np.stack(
            [
                row[:, None] * merge + inside // merge,
                column[:, None] * merge + inside % merge,
            ],
            axis=-1,
        ).reshape(-1, 2)
        for _ in range(frames):
            segment += 1
            unit_index.append(windows * side**2 + place)
            positions.append(position)
            segments.append(np.full(rows * columns, segment))
            windows += across * -(-rows // (merge * side))
    units = np.concatenate([np.zeros(0, np.int32), *unit_index]).astype(np.int32)
    return WindowLayout(
        windows=windows,
        order=(units[:, None] * merge**2 + inside).reshape(-1).astype(np.int32),
        positions=np.concatenate([np.zeros((0, 2)), *positions]).astype(np.int32),
        segments=np.concatenate([np.zeros(0), *segments]).astype(np.int32),
        unit_index=units,
    )


def pack_vision(
    patches: Num[np.ndarray, "patches patch"],
    grid_thw: Int[np.ndarray, "images 3"],
    config: ModelConfig,
    windows: int | None = None,
) -> tuple[Vision, Int[np.ndarray, " units"]]:
    """Put a row's patches into windows, `windows` of them (default: as many as needed).

    The second result is the place of the k-th image token's feature among the encoded units.
    Raises UserError when the patches do not match the grids or need more windows than allowed.
    """
    layout = window_layout(grid_thw, config)
    windows = layout.windows if windows is None else windows
    if len(patches) != len(layout.order):
        raise UserError(
            f"{len(patches)} image patches do not fit image_grid_thw, which asks for "
            f"{len(layout.order)}; pass both from the same processor call"
        )
    if windows < layout.windows:
        raise UserError(
            f"images need {layout.windows} vision windows, more than the {windows} allowed; "
            "lower the image size or raise the limit"
        )
    places = windows * config.vision.slots

    def spread(values: np.ndarray, width: int) -> np.ndarray:
        out = np.zeros((places, width), values.dtype)
        out[layout.order] = values.reshape(-1, width)
        return out.reshape(windows, config.vision.slots, width)

    vision = Vision(
        patches=spread(patches, config.vision.patch),
        positions=spread(layout.positions, 2),
        segments=spread(layout.segments, 1)[..., 0],
    )
    return vision, layout.unit_index


def stack_visions(visions: Sequence[Vision], windows: int) -> Vision:
    """Stack the visions of several rows, each padded to `windows` windows."""

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, windows - len(array))] + [(0, 0)] * (array.ndim - 1))

    most = max(len(vision.segments) for vision in visions)
    if most > windows:
        raise UserError(f"a row has {most} vision windows, more than the {windows} allowed")
    return Vision(
        patches=np.stack([pad(np.asarray(vision.patches)) for vision in visions]),
        positions=np.stack([pad(np.asarray(vision.positions)) for vision in visions]),
        segments=np.stack([pad(np.asarray(vision.segments)) for vision in visions]),
    )


def image_index(
    ids: Int[np.ndarray, " tokens"], unit_index: Int[np.ndarray, " units"], config: ModelConfig
) -> Int[np.ndarray, " tokens"]:
    """Each token's place among the encoded units of the row's images and videos, -1 for text.

    Raises UserError when there are more or fewer image and video tokens than units.
    """
    is_vision = np.isin(ids, (config.image_token_id, config.video_token_id))
    if is_vision.sum() != len(unit_index):
        raise UserError(
            f"{is_vision.sum()} image tokens but {len(unit_index)} image features; each image or "
            f"video needs frames × rows × columns / {config.vision.unit_patches} copies of id "
            f"{config.image_token_id} or {config.video_token_id}, as the processor writes them"
        )
    index = np.full(len(is_vision), -1, np.int32)
    index[is_vision] = unit_index
    return index


def mrope_positions(
    ids: Int[np.ndarray, " tokens"],
    grid_thw: Int[np.ndarray, "images 3"],
    config: ModelConfig,
    seconds: Sequence[float] | None = None,
) -> Int[np.ndarray, "3 tokens"]:
    """The (time, height, width) positions of one unpadded sequence.

    `grid_thw` lists images and videos in the order of the prompt; the tokens tell them apart.
    Text counts on in all three axes; an image or video spans its grid of units from the current
    position, and the text after it goes on from there plus the longer side (frames do not count).
    A frame of a video lasts `seconds[k]` (`second_per_grid_ts` of the k-th video; 1 if None), and
    time advances by `tokens_per_second`, rounded down, in float32 as transformers computes it.

    This is transformers 5.23. Where a video's time passes its longer side, transformers up to 5.2,
    and servers that follow it, let the text go on after the last frame instead. A completion goes
    on from the prompt's last position + 1. Raises UserError when the tokens do not match the grids,
    or `seconds` the videos.
    """
    ids = np.asarray(ids)
    merge = config.vision.merge_size
    grids = np.asarray(grid_thw, np.int64).reshape(-1, 3) // (1, merge, merge)
    units = grids.prod(axis=1)
    places = np.flatnonzero(image_index(ids, np.arange(units.sum()), config) >= 0)
    runs = np.split(places, np.cumsum(units)[:-1]) if len(units) else []
    for run in runs:
        if run[-1] - run[0] != len(run) - 1 or (ids[run] != ids[run[0]]).any():
            raise UserError(
                f"the {len(run)} tokens of an image or video are not one run (from token {run[0]} "
                "on); list the grids in the order of the prompt"
            )
    first_ids = ids[np.array([run[0] for run in runs], int)]
    steps = _time_steps(first_ids, seconds, config)
    pieces, start, position = [], 0, 0
    for grid, run, step in zip(grids, runs, steps, strict=True):
        text = np.arange(run[0] - start) + position
        position += len(text)
        time, *place = np.indices(grid).reshape(3, -1)
        time = (time.astype(np.float32) * step).astype(np.int64)
        pieces += [np.tile(text, (3, 1)), np.stack([time, *place]) + position]
        position += max(grid[1:])
        start = run[-1] + 1
    pieces.append(np.tile(np.arange(len(ids) - start) + position, (3, 1)))
    return np.concatenate(pieces, axis=1).astype(np.int32)


def _time_steps(
    first_ids: Int[np.ndarray, " images"], seconds: Sequence[float] | None, config: ModelConfig
) -> list[np.float32]:
    """How far time advances from frame to frame of each image or video, told by its first token."""
    is_video = first_ids == config.video_token_id
    lasting = [1.0] * is_video.sum() if seconds is None else seconds
    if len(lasting) != is_video.sum():
        raise UserError(
            f"second_per_grid_ts has {len(lasting)} entries for {is_video.sum()} videos; "
            "pass one per video"
        )
    rest = iter(lasting)
    rate = config.vision.tokens_per_second
    return [np.float32(rate * next(rest) if video else 1) for video in is_video]
