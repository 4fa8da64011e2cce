"""Groups for the tiny model of `tiny_update`: prompts with and without images, any lengths."""

import numpy as np

from tests.rl.tiny_update import COMPLETION, CONFIG, PROMPT
from vtriune_jax.data.rows import Slots
from vtriune_jax.models import layout
from vtriune_jax.types import Completion, Group, Prompt, RewardConfig, Sample

SLOTS = Slots(2 * PROMPT, COMPLETION, windows=2, pad_id=0)
"""Room for two sequences in a packed row, most of the time."""
SOURCES = {"a": 0, "b": 1, "c": 2}
GRIDS = ((), ((2, 2),), ((4, 4),), ((2, 4), (2, 2)))
"""Rows and columns of patches of a prompt's images; four patches are a token."""


def make_prompt(rng: np.random.Generator, text: int, grids, source: str) -> Prompt:
    """Each image between its marks, then `text` words."""
    ids = []
    for rows, columns in grids:
        ids += [62, *[CONFIG.image_token_id] * (rows * columns // 4), 63]
    ids = np.array([*ids, *rng.integers(0, 60, text)], np.int32)
    grid = np.array([(1, *each) for each in grids], np.int64).reshape(-1, 3)
    patches = rng.normal(size=(grid.prod(axis=1).sum(), CONFIG.vision.patch))
    vision, units = layout.pack_vision(patches.astype(np.float32), grid, CONFIG)
    return Prompt(
        sample=Sample(source, "row", (), (), RewardConfig("none", "")),
        ids=ids,
        positions=layout.mrope_positions(ids, grid, CONFIG),
        image_index=layout.image_index(ids, units, CONFIG),
        vision=vision,
        grid_thw=grid,
    )


def make_group(rng: np.random.Generator, text: int, grids, lengths, source="a") -> Group:
    """Completions of the given lengths, with noisy log-probs."""
    completions = [
        Completion(
            ids=rng.integers(0, 60, length).astype(np.int32),
            logps=rng.normal(-4.15, 0.3, length).astype(np.float32),
            text="",
            finish="stop",
        )
        for length in lengths
    ]
    return Group(make_prompt(rng, text, grids, source), tuple(completions))
