"""A model with adapters against transformers, which gets the merged folder."""

import jax
import numpy as np
import pytest

from tests.parity.oracle import Oracle, as_prompt
from vtriune_jax import models
from vtriune_jax.models import LoRAConfig, layout, lora, weights
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine

pytestmark = pytest.mark.usefixtures("optimised")

IMAGES = ((1, 6, 10),)


@pytest.fixture(scope="module")
def adapted(talkative, tmp_path_factory):
    """Our model with adapters that do something, and the oracle of its saved folder."""
    model = models.load_pretrained(talkative.path, lora=LoRAConfig(rank=4, alpha=8.0))
    graphdef, params = models.split(model)
    rng = np.random.default_rng(0)
    flat = {
        path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) if lora.is_adapter(path) else leaf
        for path, leaf in weights.flatten(params).items()
    }
    model = models.merge(graphdef, weights.unflatten(flat))
    folder = tmp_path_factory.mktemp("merged")
    models.save_pretrained(model, folder)
    return model, Oracle(talkative.reload(folder), models.load_pretrained(folder), folder)


def test_logits(talkative, adapted):
    model, merged = adapted
    inputs = talkative.inputs([IMAGES, ()], "left")
    real = inputs["attention_mask"].astype(bool)
    expected = merged.logits(inputs)[real]
    assert np.abs(expected - talkative.logits(inputs)[real]).max() > 0.5
    np.testing.assert_allclose(models.forward(model, inputs)[real], expected, rtol=0, atol=2e-4)


def test_greedy_tokens(talkative, adapted):
    model, merged = adapted
    inputs = talkative.inputs([IMAGES])
    prompt = as_prompt(inputs, IMAGES, model.config)

    def greedy(model):
        graphdef, params = models.split(model)
        vision = layout.stack_visions([prompt.vision], windows=10)
        engine = LocalEngine(graphdef, stop_ids=(), banned_ids=(), pad_id=0, decode_text=str)
        sampling, keys = Sampling(64, n=2, temperature=0.0), jax.random.split(jax.random.key(0), 1)
        features = models.encode(graphdef, params, vision)
        [group] = engine.generate(params, [prompt], features, sampling, keys, 64)
        return [completion.ids for completion in group.completions]

    expected = merged.generate(inputs, 64)
    assert not np.array_equal(expected, talkative.generate(inputs, 64))
    for ids in (*greedy(model), *greedy(merged.model)):
        np.testing.assert_array_equal(ids, expected)


def test_the_folder_has_no_trace_of_adapters(talkative, adapted, tmp_path):
    models.save_pretrained(talkative.model, tmp_path)
    written = (adapted[1].path / "config.json").read_text()
    assert written == (tmp_path / "config.json").read_text()
