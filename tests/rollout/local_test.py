"""The sampler against the model's own teacher-forced answers, and its promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig, layout
from vtriune_jax.rollout import local
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.types import Prompt, RewardConfig, Sample

CONFIG = ModelConfig(
    vision=VisionConfig(
        depth=2, embed=16, mlp=24, heads=2, out=32, full_attention=(1,), patch_size=2, window_size=8
    ),
    text=TextConfig(
        vocab=40, embed=32, mlp=48, layers=2, heads=4, kv_heads=2, mrope_section=(2, 1, 1)
    ),
    image_token_id=36,
    video_token_id=37,
    vision_start_token_id=38,
    vision_end_token_id=39,
    tied=False,
)
STOP, PAD, PROMPT_TOKENS, WINDOWS = 7, 0, 24, 3
SAMPLING = Sampling(max_tokens=16, n=4, temperature=0.7)


def make_prompt(seed, grids):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 36, 4).tolist()
    for grid in grids:
        ids += [38, *[36] * (np.prod(grid) // 4), 39, *rng.integers(0, 36, 2)]
    ids = np.array(ids, np.int32)
    grids = np.array(grids, np.int32).reshape(-1, 3)
    patches = rng.normal(size=(grids.prod(axis=1).sum(), CONFIG.vision.patch))
    vision, unit_index = layout.pack_vision(patches, grids, CONFIG)
    return Prompt(
        sample=Sample("test", f"row-{seed}", (), (), RewardConfig("none", "")),
        ids=ids,
        positions=layout.mrope_positions(ids, grids, CONFIG),
        image_index=layout.image_index(ids, unit_index, CONFIG),
        vision=vision,
        grid_thw=grids,
    )


PROMPTS = [make_prompt(0, []), make_prompt(1, [(1, 4, 6)]), make_prompt(2, [(1, 2, 2), (1, 4, 4)])]


@pytest.fixture(scope="module")
def split_model():
    return models.split(models.init(CONFIG, seed=0))


def engine_of(graphdef, **more):
    return LocalEngine(
        graphdef,
        stop_ids=[STOP],
        banned_ids=CONFIG.banned_ids,
        pad_id=PAD,
        decode_text=lambda ids: " ".join(map(str, ids)),
        **more,
    )


@pytest.fixture(scope="module")
def generate(split_model):
    """generate(prompts, keys, sampling) → groups"""
    graphdef, params = split_model
    plain = engine_of(graphdef)

    def run(prompts, keys, sampling=SAMPLING, engine=plain):
        visions = layout.stack_visions([prompt.vision for prompt in prompts], WINDOWS)
        features = models.encode(graphdef, params, visions)
        return engine.generate(params, prompts, features, sampling, keys, PROMPT_TOKENS)

    return run


@pytest.fixture(scope="module")
def groups(generate):
    return generate(PROMPTS, keys(3))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def completions(groups):
    return [completion for group in groups for completion in group.completions]


def assert_same(ours, others):
    for one, other in zip(completions(ours), completions(others), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_logps_are_those_of_teacher_forcing(groups, split_model):
    graphdef, params = split_model

    @jax.jit
    def logps_of(ids, positions, index, vision):
        model = models.merge(graphdef, params)
        hidden = model(ids, positions, jnp.int32(ids >= 0), model.encode(vision), index)
        logits = (hidden @ model.head() / SAMPLING.temperature).at[..., CONFIG.banned_ids]
        return jax.nn.log_softmax(logits.set(-jnp.inf), axis=-1)

    for group in groups:
        prompt = group.prompt
        vision = layout.stack_visions([prompt.vision], WINDOWS)
        for completion in group.completions[:2]:
            tokens, own = len(prompt.ids), len(completion.ids)
            ids = np.full(PROMPT_TOKENS + SAMPLING.max_tokens, -1, np.int32)
            index, positions = ids.copy(), np.zeros((3, len(ids)), np.int32)
            ids[: tokens + own] = [*prompt.ids, *completion.ids]
            index[:tokens] = prompt.image_index
            positions[:, :tokens] = prompt.positions
            positions[:, tokens:] = prompt.positions.max() + 1 + np.arange(len(ids) - tokens)
            logps = logps_of(ids[None], positions[None], index[None], vision)[0]
            expected = logps[np.arange(own) + tokens - 1, completion.ids]
            np.testing.assert_allclose(completion.logps, expected, atol=1e-4)


def test_pieces_change_neither_completions_nor_their_order(generate, split_model, monkeypatch):
    prompts, own = [*PROMPTS, *PROMPTS], keys(6)
    whole, asked, sample = generate(prompts, own), [], local.sample

    def counted(graphdef, ids, sampling, params, padded, features, keys):
        asked.append((len(padded.ids), len(features), len(keys)))
        return sample(graphdef, ids, sampling, params, padded, features, keys)

    monkeypatch.setattr(local, "sample", counted)
    for pieces, expected in ((3, [(2, 2, 2)] * 3), (4, [(3, 3, 3)] * 2)):  # 4 do not divide 6
        asked.clear()
        engine = engine_of(split_model[0], pieces=pieces)
        found = generate(prompts, own, engine=engine)
        assert asked == expected
        assert [group.prompt for group in found] == prompts
        assert_same(found, whole)


def test_stop_and_length(groups):
    finished = completions(groups)
    assert {completion.finish for completion in finished} == {"stop", "length"}
    for completion in finished:
        stopped = completion.finish == "stop"
        assert len(completion.ids) == len(completion.logps) <= SAMPLING.max_tokens
        assert (completion.ids == STOP).sum() == stopped == (completion.ids[-1] == STOP)
        assert stopped or len(completion.ids) == SAMPLING.max_tokens
        shown = completion.ids[:-1] if stopped else completion.ids
        assert completion.text == " ".join(map(str, shown))
        assert completion.ids.dtype == np.int32


def test_banned_ids_never_appear_and_completions_differ(groups):
    for group in groups:
        texts = [completion.text for completion in group.completions]
        assert len(set(texts)) == len(texts)
        for completion in group.completions:
            assert not np.isin(completion.ids, CONFIG.banned_ids).any()


def test_a_completion_depends_on_its_own_key_and_prompt_alone(generate, groups):
    assert_same(generate(PROMPTS, keys(3)), groups)
    order = np.array([2, 0, 1])
    shuffled = generate([PROMPTS[i] for i in order], keys(3)[order])
    assert_same([shuffled[i] for i in np.argsort(order)], groups)
    assert_same(generate(PROMPTS[1:2], keys(3)[1:2]), groups[1:2])
    fewer = generate(PROMPTS, keys(3), replace(SAMPLING, n=2))
    assert_same(fewer, [replace(group, completions=group.completions[:2]) for group in groups])
    others = generate(PROMPTS, keys(3, seed=1))
    assert [c.text for c in completions(others)] != [c.text for c in completions(groups)]


def test_completions_that_get_room_as_they_grow_are_the_same(generate, groups, monkeypatch):
    assert local.rooms(16) == [16]
    assert local.rooms(1000) == [250, 500, 1000]
    monkeypatch.setattr(local, "SHORT", 5)
    assert local.rooms(16) == [4, 8, 16]
    local.sample.clear_cache()  # what was compiled does not know of it
    others = generate(PROMPTS, keys(3))
    local.sample.clear_cache()
    assert_same(others, groups)


def test_greedy_logps_are_at_temperature_one(generate):
    sampling = replace(SAMPLING, n=1, temperature=0.0)
    (greedy,) = completions(generate(PROMPTS[1:2], keys(1), sampling))
    (narrow,) = completions(
        generate(PROMPTS[1:2], keys(1), replace(sampling, temperature=1.0, top_k=1))
    )
    np.testing.assert_array_equal(greedy.ids, narrow.ids)
    np.testing.assert_allclose(greedy.logps, narrow.logps, atol=1e-6)
    assert greedy.logps.max() < -1e-3


def test_text_without_features(split_model, generate, groups):
    graphdef, params = split_model
    engine = LocalEngine(
        graphdef, stop_ids=[STOP], banned_ids=CONFIG.banned_ids, pad_id=PAD, decode_text=str
    )
    text = engine.generate(params, PROMPTS[:1], None, SAMPLING, keys(3)[:1], PROMPT_TOKENS)
    assert_same(text, groups[:1])


def test_a_long_prompt_is_named():
    with pytest.raises(
        UserError, match=r"sample row-2 of .*: the prompt has 17 tokens, more than the 16 allowed"
    ):
        local.pad_prompts(PROMPTS, PAD, 16)
