"""Greedy decoding against transformers' generate, token for token."""

import jax
import numpy as np
import pytest

from vtriune_jax import models
from vtriune_jax.models import layout
from vtriune_jax.rollout.local import LocalEngine, Sampling
from vtriune_jax.types import Prompt, RewardConfig, Sample

TOKENS, PROMPT_TOKENS = 40, 64
ROWS = {"text": (), "one image": ((1, 6, 10),), "two images": ((1, 4, 4), (1, 18, 6))}


def as_prompt(inputs, config):
    ids = inputs["input_ids"][0].astype(np.int32)
    grids = inputs.get("image_grid_thw", np.zeros((0, 3), np.int32))
    patches = inputs.get("pixel_values", np.zeros((0, config.vision.patch), np.float32))
    vision, unit_index = layout.pack_vision(patches, grids, config)
    return Prompt(
        sample=Sample("test", "0", (), (), RewardConfig("none", "")),
        ids=ids,
        positions=layout.mrope_positions(ids, grids, config),
        image_index=layout.image_index(ids, unit_index, config),
        vision=vision,
        grid_thw=grids,
    )


@pytest.fixture(scope="module")
def batch(talkative):
    """All rows in one batch, so that padding on both axes takes part."""
    inputs = {
        name: talkative.inputs([grids], seed=number)
        for number, (name, grids) in enumerate(ROWS.items())
    }
    graphdef, params = models.split(talkative.model)
    prompts = [as_prompt(row, talkative.model.config) for row in inputs.values()]
    features = models.encode(
        graphdef, params, layout.stack_visions([prompt.vision for prompt in prompts], windows=10)
    )
    engine = LocalEngine(graphdef, stop_ids=(), banned_ids=(), pad_id=0, decode_text=str)
    groups = engine.generate(
        params,
        prompts,
        features,
        Sampling(max_tokens=TOKENS, n=2, temperature=0.0),
        jax.random.split(jax.random.key(0), len(prompts)),
        PROMPT_TOKENS,
    )
    return inputs, dict(zip(inputs, groups, strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_greedy(talkative, batch, name):
    inputs, groups = batch
    expected = talkative.generate(inputs[name], TOKENS)
    assert len(set(expected.tolist())) > 5
    for completion in groups[name].completions:
        np.testing.assert_array_equal(completion.ids, expected)
