import dataclasses

import jax
import numpy as np
import pytest

from vtriune_jax.data.packing import check_fits, minibatch, pack, padding, stack_vision
from vtriune_jax.data.rows import Rows, Slots, choose, needs
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
    np.testing.assert_array_equal(batch.mask[:, 0], inside * np.array(weights)[:, None])
    assert batch.mask.dtype == batch.advantages.dtype == np.float32
    np.testing.assert_array_equal(
        batch.advantages[:, 0], np.repeat([[1.0], [-1.0], [0.5], [0.25], [2.0], [-2.0]], 5, axis=1)
    )
    np.testing.assert_array_equal(batch.rollout_logps[:, 0], inside * -np.arange(1.0, 6.0))
    assert batch.source[:, 0].tolist() == [0, 0, 1, 1, 0, 0]


def test_images_travel_once_per_row(groups, batch):
    assert batch.features is None
    assert batch.vision.segments.shape == (6, 1, 4, 16)
    for row, (prompt, _) in enumerate(rows_of(groups)):
        windows = len(prompt.vision.segments)
        got = batch.vision.patches[row, 0, :windows]
        np.testing.assert_array_equal(got, prompt.vision.patches)
        assert not batch.vision.segments[row, 0, windows:].any()
    assert batch.vision.segments.max(axis=(1, 2, 3)).tolist() == [1, 1, 0, 0, 2, 2]


def test_or_as_features_for_each_prompt_of_a_row(groups):
    ones = np.ones((3, 2))
    filled_up = np.arange(5 * 16 * 8, dtype=np.float32).reshape(5, 16, 8)  # two prompts too many
    batch = pack(groups, ones, ones, SOURCES, SLOTS, filled_up)
    assert batch.vision is None
    np.testing.assert_array_equal(batch.features[:, 0], filled_up[[0, 0, 1, 1, 2, 2]])
    batch = pack(groups, ones, ones, SOURCES, SLOTS, filled_up, Rows("group", 2, 5, 30))
    np.testing.assert_array_equal(batch.features[:, 0], filled_up[:3])


def test_a_group_row_has_the_prompt_once(groups):
    ones = np.ones((3, 2))
    rows = Rows("group", 2, 5, 30)
    single, grouped = (pack(groups, ones, ones, SOURCES, SLOTS, None, r) for r in (None, rows))
    assert grouped.ids.shape == (3, 30)
    assert grouped.vision.segments.shape == (3, 1, 4, 16)
    for name in ("ids", "segments", "image_index", "positions"):
        one, both = getattr(single, name), getattr(grouped, name)
        np.testing.assert_array_equal(both[..., :20], one[::2, ..., :20])
        np.testing.assert_array_equal(both[..., 20:25], one[::2, ..., 20:])
        np.testing.assert_array_equal(both[..., 25:], one[1::2, ..., 20:])
    for name in ("mask", "advantages", "rollout_logps"):
        one, both = getattr(single, name), getattr(grouped, name)
        np.testing.assert_array_equal(both.reshape(6, 5), one[:, 0])


def test_packed_rows_hold_each_completion_once(groups):
    """In any order, every sequence whole, in a segment of its own, with what belongs to it."""
    groups = [make_group(make_prompt(text=2), 3, 1), *groups[:1], *groups[:2]]
    values = np.arange(8.0).reshape(4, 2)
    asked = needs(groups, SLOTS, parts=2, unit=1)
    rows = choose("packed", asked, SLOTS, 2, 2, 1, CONFIG, True)
    assert (rows.n, rows.tokens) == (2, 25)
    batch = pack(groups, values, values + 1, SOURCES, SLOTS, None, rows, parts=2)
    assert batch.ids.shape == (4, 25)
    seen = []
    for row, k in np.ndindex(batch.mask.shape[:2]):
        number = int(batch.advantages[row, k, 0])
        seen.append(number)
        prompt, completion = rows_of(groups)[number]
        length, here = len(completion.ids), batch.segments[row] == k + 1
        whole = np.concatenate([prompt.ids, completion.ids])
        np.testing.assert_array_equal(batch.ids[row, here], whole)
        want = layout.mrope_positions(whole, prompt.grid_thw, CONFIG)
        np.testing.assert_array_equal(batch.positions[row][:, here], want)
        image_index = batch.image_index[row, here]
        np.testing.assert_array_equal(image_index[: len(prompt.ids)], prompt.image_index)
        assert (image_index[len(prompt.ids) :] == -1).all()
        windows = len(prompt.vision.segments)
        got = batch.vision.patches[row, k, :windows]
        np.testing.assert_array_equal(got, prompt.vision.patches)
        targets = batch.ids[row, batch.predictors[row, k] + 1][:length]
        np.testing.assert_array_equal(targets, completion.ids)
        np.testing.assert_array_equal(batch.rollout_logps[row, k, :length], completion.logps)
        np.testing.assert_array_equal(batch.mask[row, k], (np.arange(5) < length) * (number + 1))
        assert batch.source[row, k] == SOURCES[prompt.sample.data_source]
    assert sorted(seen[:4]) == [0, 1, 2, 3]  # a group stays in its minibatch
    assert sorted(seen) == list(range(8))
    with pytest.raises(ValueError, match="do not fit"):
        pack(groups, values, values, SOURCES, SLOTS, None, dataclasses.replace(rows, n=8))


def test_padding_is_counted(groups, batch):
    prompts = [group.prompt for group in groups]
    found = padding(batch, prompts, SLOTS)
    tokens = sum(2 * len(g.prompt.ids) + sum(len(c.ids) for c in g.completions) for g in groups)
    assert found["pad/tokens"] == (6 * 25 - tokens, 6 * 25)
    patches = 2 * (16 + 24 + 4)
    assert found["pad/vision"] == (6 * 4 * 16 - patches, 6 * 4 * 16)
    frozen = dataclasses.replace(batch, vision=None)
    assert padding(frozen, prompts, SLOTS)["pad/vision"] == (3 * 64 - patches / 2, 3 * 64)


def test_prompts_of_text_alone():
    prompts = [make_prompt(), make_prompt(seed=1)]
    vision = stack_vision(prompts, SLOTS)
    assert vision.patches.shape == (2, 4, 16, CONFIG.vision.patch)
    assert not np.any(vision.segments)
    batch = pack([make_group(p, 2) for p in prompts], *np.ones((2, 2, 1)), SOURCES, SLOTS)
    assert (batch.image_index == -1).all()


def test_minibatches_keep_the_order(groups, batch):
    parts = [minibatch(batch, 3, k) for k in range(3)]
    assert [len(part.ids) for part in parts] == [2, 2, 2]
    again = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    assert parts[1].vision.patches.shape[0] == 2
    with pytest.raises(UserError, match="minibatches=4 does not divide the 6 rows of a batch"):
        minibatch(batch, 4, 0)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (
            {"prompt_tokens": 9},
            "sample row-0 of \\w+: the prompt has 10 tokens, its slot 9; raise batch.prompt_tokens",
        ),
        (
            {"completion_tokens": 4},
            "sample row-0 of \\w+: the .* has 5 tokens, its slot 4; raise batch.completion_tokens",
        ),
        (
            {"windows": 0},
            "sample row-0 of \\w+: its images fill 1 windows, batch.windows=0; raise batch.windows",
        ),
    ],
)
def test_what_does_not_fit_is_named(slots, message):
    group = make_group(make_prompt((4, 4)), 5)
    with pytest.raises(UserError, match=message):
        pack([group], *np.ones((2, 1, 1)), SOURCES, dataclasses.replace(SLOTS, **slots))
    with pytest.raises(UserError, match=message):
        check_fits(group.prompt, 5, dataclasses.replace(SLOTS, **slots))
    placed = dataclasses.replace(group.prompt.sample, where="mine.parquet row 3")
    found = dataclasses.replace(group.prompt, sample=placed)
    with pytest.raises(UserError, match=rf"^mine.parquet row 3: {message.split(': ')[1]}"):
        check_fits(found, 5, dataclasses.replace(SLOTS, **slots))
    full = dataclasses.replace(SLOTS, prompt_tokens=10, completion_tokens=5, windows=1)
    check_fits(group.prompt, 5, full)
    assert pack([group], *np.ones((2, 1, 1)), SOURCES, full).segments.all()
