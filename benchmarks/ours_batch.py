"""The peers' batches in our types: what `ours.py` reads of the driver's files."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import numpy as np

from vtriune_jax import models
from vtriune_jax.models import layout
from vtriune_jax.models.vision import normalise
from vtriune_jax.types import Message, Prompt, RewardConfig, Sample


def read(path: Path, name: str, text_only: bool) -> dict[str, np.ndarray]:
    """The driver's batch, its normalised patches as the pixels that a run has."""
    data = dict(np.load(path / f"batch_{name}{'_text' if text_only else ''}.npz"))
    if not text_only:
        parts = np.array_split(data["pixel_values"], 64)  # to take little memory
        data["pixel_values"] = np.concatenate([pixels_of(part) for part in parts])
    return data


def pixels_of(patches: np.ndarray) -> np.ndarray:
    """The bytes that the driver's processor normalised."""
    one, zero = normalise(np.repeat([[1], [0]], patches.shape[1], axis=1).astype(np.uint8))
    pixels = np.rint((patches - zero) / (one - zero)).astype(np.uint8)
    np.testing.assert_allclose(normalise(pixels), patches, atol=1e-5)
    return pixels


def prompts_of(
    data: dict[str, np.ndarray], config: models.ModelConfig, response: int
) -> list[Prompt]:
    """The driver's padded batch as prompts; its images follow each other, one a row."""
    rows, length = data["input_ids"].shape
    patches = data.get("pixel_values", np.zeros((0, config.vision.patch), np.uint8))
    grids = data.get("image_grid_thw", np.zeros((0, 3), np.int64))
    ends = np.cumsum(grids.prod(axis=1))
    found = []
    for row in range(rows):
        mask = data["attention_mask"][row, : length - response] > 0
        ids = data["input_ids"][row, : length - response][mask].astype(np.int32)
        grid = grids[row : row + 1]
        own = patches[ends[row] - grid.prod() : ends[row]] if len(grid) else patches
        vision, unit_index = layout.pack_vision(own, grid, config)
        found.append(
            Prompt(
                sample=sample_of({"label": 0}, None, True, row),
                ids=ids,
                positions=layout.mrope_positions(ids, grid, config),
                image_index=layout.image_index(ids, unit_index, config),
                vision=vision,
                grid_thw=grid,
            )
        )
    return found


def sample_of(drawn: dict[str, Any], task: Any, text_only: bool, number: int) -> Sample:
    """A row of the driver's task in our types."""
    content, pictures = "What digit is in the picture?" if task is None else task.ASK, ()
    if not text_only:
        buffer = io.BytesIO()
        drawn["image"].save(buffer, "PNG")
        content, pictures = "<image>" + content, (buffer.getvalue(),)
    return Sample(
        id=str(number),
        data_source="bench",
        messages=(Message("user", content),),
        images=pictures,
        reward=RewardConfig("mathverify", str(drawn["label"])),
    )
