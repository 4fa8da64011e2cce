"""Greedy decoding against transformers' generate, token for token."""

import jax
import numpy as np
import pytest

from tests.parity.oracle import Video, as_prompt
from vtriune_jax import models
from vtriune_jax.models import layout
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine

pytestmark = pytest.mark.usefixtures("optimised")

TOKENS, PROMPT_TOKENS = 64, 64
ROWS = {
    "text": (),
    "one image": ((1, 6, 10),),
    "two images": ((1, 4, 4), (1, 18, 6)),
    "a long video": ((1, 4, 4), Video(3, 6, 4, 4.0)),
}


@pytest.fixture(scope="module")
def batch(talkative):
    """All rows in one batch, so that padding on both axes takes part."""
    config = talkative.model.config
    inputs = {
        name: talkative.inputs([media], seed=number)
        for number, (name, media) in enumerate(ROWS.items())
    }
    graphdef, params = models.split(talkative.model)
    prompts = [as_prompt(inputs[name], media, config) for name, media in ROWS.items()]
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
