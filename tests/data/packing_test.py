import dataclasses

import jax
import numpy as np
import pytest

from vtriune_jax.data.packing import (
    Slots,
    check_fits,
    pack,
    repeat_features,
    split_batch,
    stack_vision,
)
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig, layout
from vtriune_jax.types import Completion, Group, Prompt, RewardConfig, Sample

PAD, IMAGE, START, END = 0, 60, 62, 63
SLOTS = Slots(prompt_tokens=20, completion_tokens=5, windows=4, pad_id=PAD)
SOURCES = {"a": 0, "b": 1}
CONFIG = ModelConfig(
    vision=VisionConfig(
        depth=1, embed=8, mlp=8, heads=1, out=8, full_attention=(), patch_size=2, window_size=8
    ),
    text=TextConfig(
        vocab=64, embed=8, mlp=8, layers=1, heads=1, kv_heads=1, mrope_section=(2, 1, 1)
    ),
    image_token_id=IMAGE,
    video_token_id=61,
    vision_start_token_id=START,
    vision_end_token_id=END,
    tied=True,
)


def make_prompt(*grids, source="a", text=3, seed=0) -> Prompt:
    """Some text, then each image between its marks and a word after it."""
    rng = np.random.default_rng(seed)
    ids, units = list(range(1, text + 1)), 0
    for rows, columns in grids:
        ids += [START, *[IMAGE] * (rows * columns // 4), END, 7]
        units += rows * columns
    ids = np.array(ids, np.int32)
    grid_thw = np.array([(1, *grid) for grid in grids], np.int32).reshape(-1, 3)
    patches = rng.normal(size=(units, CONFIG.vision.patch)).astype(np.float32)
    vision, unit_index = layout.pack_vision(patches, grid_thw, CONFIG)
    return Prompt(
        sample=Sample(source, f"row-{seed}", (), (), RewardConfig("none", "")),
        ids=ids,
        positions=layout.mrope_positions(ids, grid_thw, CONFIG),
        image_index=layout.image_index(ids, unit_index, CONFIG),
        vision=vision,
        grid_thw=grid_thw,
    )


def make_group(prompt: Prompt, *lengths: int) -> Group:
    return Group(
        prompt,
        tuple(
            Completion(
                ids=np.arange(20, 20 + n, dtype=np.int32),
                logps=-np.arange(1, n + 1, dtype=np.float32),
                text="",
                finish="stop",
            )
            for n in lengths
        ),
    )


@pytest.fixture(scope="module")
def groups():
    """One image; no image; two images of different sizes."""
    return [
        make_group(make_prompt((4, 4)), 3, 5),
        make_group(make_prompt(source="b", text=8, seed=1), 1, 4),
        make_group(make_prompt((4, 6), (2, 2), seed=2), 2, 2),
    ]


@pytest.fixture(scope="module")
def batch(groups):
    advantages = np.array([[1.0, -1.0], [0.5, 0.25], [2.0, -2.0]])
    weights = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return pack(groups, advantages, weights, SOURCES, SLOTS)


def rows_of(groups):
    return [(group.prompt, completion) for group in groups for completion in group.completions]


def test_prompts_end_and_completions_begin_at_the_same_place(groups, batch):
    assert batch.ids.shape == (6, 25)
    for row, (prompt, completion) in enumerate(rows_of(groups)):
        start, end = 20 - len(prompt.ids), 20 + len(completion.ids)
        np.testing.assert_array_equal(batch.ids[row, start:20], prompt.ids)
        np.testing.assert_array_equal(batch.ids[row, 20:end], completion.ids)
        filled = np.zeros(25, bool)
        filled[start:end] = True
        assert (batch.ids[row, ~filled] == PAD).all()
        np.testing.assert_array_equal(batch.segments[row], filled.astype(np.int32))


def test_positions_go_on_as_if_the_row_were_one_text(groups, batch):
    for row, (prompt, completion) in enumerate(rows_of(groups)):
        whole = np.concatenate([prompt.ids, completion.ids])
        want = layout.mrope_positions(whole, prompt.grid_thw, CONFIG)
        got = batch.positions[row][:, batch.segments[row] > 0]
        np.testing.assert_array_equal(got, want)
        assert (batch.positions[row][:, batch.segments[row] == 0] == 0).all()


def test_only_image_tokens_of_the_prompt_take_features(groups, batch):
    for row, (prompt, _) in enumerate(rows_of(groups)):
        start = 20 - len(prompt.ids)
        np.testing.assert_array_equal(batch.image_index[row, start:20], prompt.image_index)
        assert (batch.image_index[row, :start] == -1).all()
        assert (batch.image_index[row, 20:] == -1).all()
    np.testing.assert_array_equal(batch.image_index >= 0, batch.ids == IMAGE)


def test_masks_weights_and_advantages(batch):
    lengths, weights = [3, 5, 1, 4, 2, 2], [1, 1, 1, 0, 1, 1]
    inside = np.arange(5) < np.array(lengths)[:, None]
    np.testing.assert_array_equal(batch.mask, inside * np.array(weights)[:, None])
    assert batch.mask.dtype == batch.advantages.dtype == np.float32
    np.testing.assert_array_equal(
        batch.advantages, np.repeat([[1.0], [-1.0], [0.5], [0.25], [2.0], [-2.0]], 5, axis=1)
    )
    np.testing.assert_array_equal(batch.rollout_logps, inside * -np.arange(1.0, 6.0))
    assert batch.source.tolist() == [0, 0, 1, 1, 0, 0]


def test_images_travel_once_per_row(groups, batch):
    assert batch.features is None
    assert batch.vision.segments.shape == (6, 4, 16)
    for row, (prompt, _) in enumerate(rows_of(groups)):
        windows = len(prompt.vision.segments)
        np.testing.assert_array_equal(batch.vision.patches[row, :windows], prompt.vision.patches)
        assert not batch.vision.segments[row, windows:].any()
    assert batch.vision.segments.max(axis=(1, 2)).tolist() == [1, 1, 0, 0, 2, 2]


def test_or_as_features_once_per_group(groups):
    groups = [groups[0], make_group(groups[1].prompt, 1), make_group(groups[2].prompt, 2, 1, 1)]
    ones = [np.ones(len(group.completions)) for group in groups]
    filled_up = np.arange(5 * 16 * 8, dtype=np.float32).reshape(5, 16, 8)  # two rows too many
    flat = np.concatenate(ones)
    batch = pack(groups, flat, flat, SOURCES, SLOTS, filled_up)
    assert batch.vision is None
    np.testing.assert_array_equal(batch.features, filled_up[[0, 0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(
        repeat_features(filled_up[:2], np.array([1, 3])), filled_up[[0, 1, 1, 1]]
    )


def test_prompts_of_text_alone():
    prompts = [make_prompt(), make_prompt(seed=1)]
    vision = stack_vision(prompts, SLOTS)
    assert vision.patches.shape == (2, 4, 16, CONFIG.vision.patch)
    assert not np.any(vision.segments)
    batch = pack([make_group(p, 2) for p in prompts], *np.ones((2, 2, 1)), SOURCES, SLOTS)
    assert (batch.image_index == -1).all()


def test_split_batch_keeps_the_order(groups, batch):
    parts = split_batch(batch, 3)
    assert [len(part.ids) for part in parts] == [2, 2, 2]
    again = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    assert parts[1].vision.patches.shape[0] == 2
    with pytest.raises(UserError, match="minibatches=4 does not divide the 6 rows of a batch"):
        split_batch(batch, 4)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (
            {"prompt_tokens": 9},
            "sample row-0: the prompt has 10 tokens, its slot 9; raise batch.prompt_tokens",
        ),
        (
            {"completion_tokens": 4},
            "sample row-0: the completion has 5 tokens, its slot 4; raise batch.completion_tokens",
        ),
        (
            {"windows": 0},
            "sample row-0: its images fill 1 windows, batch.windows=0; raise batch.windows",
        ),
    ],
)
def test_what_does_not_fit_is_named(slots, message):
    group = make_group(make_prompt((4, 4)), 5)
    with pytest.raises(UserError, match=message):
        pack([group], *np.ones((2, 1, 1)), SOURCES, dataclasses.replace(SLOTS, **slots))
    with pytest.raises(UserError, match=message):
        check_fits(group.prompt, 5, dataclasses.replace(SLOTS, **slots))
    full = dataclasses.replace(SLOTS, prompt_tokens=10, completion_tokens=5, windows=1)
    check_fits(group.prompt, 5, full)
    assert pack([group], *np.ones((2, 1, 1)), SOURCES, full).segments.all()
