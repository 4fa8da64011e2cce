"""What the engine hands over is what the trainer would compute: on the real server (marker
`sglang`), and on the fake one with our model behind it (marker `slow`)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.conftest import make_sample, png
from tests.rollout.fake_sglang import FakeServer
from vtriune_jax import models
from vtriune_jax.data import images
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.models import layout
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.rollout.sglang import SGLangEngine

SAMPLES = [
    make_sample("How many?", [], id="text"),
    make_sample("<image>How many?", [png(101, 75, seed=4)], id="resized"),
    make_sample("Is <image> as <image>?", [png(56, 56, seed=2), png(150, 60, seed=3)], id="two"),
]
SAMPLING = Sampling(max_tokens=24, n=3, temperature=0.7)
WINDOWS, PROMPT_TOKENS = 8, 160


@pytest.fixture(scope="module")
def first(served_versions):
    return served_versions[0]


@pytest.fixture(scope="module")
def prompter(first):
    return Prompter(load_processor(first.folder), first.config, cot=False)


@pytest.fixture(scope="module")
def prompts(prompter):
    return [prompter(sample) for sample in SAMPLES]


@pytest.fixture(
    params=[
        pytest.param("real", marks=pytest.mark.sglang),
        pytest.param("fake", marks=pytest.mark.slow),
    ]
)
def address(request, first):
    if request.param == "real":
        yield request.getfixturevalue("real_server").addresses[0]
    else:
        with FakeServer(model_path=first.folder, responder="checkpoint") as server:
            yield server.address


@pytest.fixture
def engine(address, prompter):
    with Fleet([address]) as fleet:
        fleet.wait_ready(60)
        yield SGLangEngine(
            fleet,
            stop_ids=prompter.stop_ids,
            banned_ids=prompter.banned_ids,
            image_id=prompter.banned_ids[0],
            decode_text=prompter.decode,
            pictures=prompter.pictures,
            deadline=120,
        )


def teacher_forced(first, prompter, prompt, ids):
    """Log-probs of a completion under the trainer's weights, temperature and ban."""
    inputs = {"input_ids": np.concatenate([prompt.ids, ids])[None]}
    if len(prompt.grid_thw):
        processor = load_processor(first.folder).image_processor
        pixels, grid = images.patches(prompt.sample.images, processor, "test")
        inputs |= {"pixel_values": pixels, "image_grid_thw": grid}
    model = models.merge(first.graphdef, first.params)
    logits = models.forward(model, inputs)[0, len(prompt.ids) - 1 : -1] / SAMPLING.temperature
    logits = logits.at[:, jnp.array(prompter.banned_ids)].set(-jnp.inf)
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))[np.arange(len(ids)), ids]


def assert_close(found, expected):
    """The test's model has large matrices, so that its text varies; single tokens are then so
    ill-conditioned that even our own sampler differs from itself by 4e-3 with other padding."""
    differences = np.abs(found - expected)
    assert np.quantile(differences, 0.75) < 1e-4
    assert differences.max() < 0.05


def check(first, prompter, groups):
    for group in groups:
        assert len({drawn.ids.tobytes() for drawn in group.completions}) == SAMPLING.n
        for drawn in group.completions:
            expected = teacher_forced(first, prompter, group.prompt, drawn.ids)
            assert_close(drawn.logps, expected)
            assert drawn.finish in ("stop", "length")
            assert drawn.versions[0][1:] == (0, len(drawn.ids))


def test_log_probs_are_the_trainers(engine, first, prompter, prompts):
    check(first, prompter, engine.generate(None, prompts, None, SAMPLING, None, PROMPT_TOKENS))
    assert engine.stats()["retries"] == 0


def test_greedy_completions_are_the_local_engines(engine, first, prompter, prompts):
    greedy = replace(SAMPLING, n=1, temperature=0.0)
    local = LocalEngine(
        first.graphdef,
        stop_ids=prompter.stop_ids,
        banned_ids=prompter.banned_ids,
        pad_id=prompter.pad_id,
        decode_text=prompter.decode,
    )
    visions = layout.stack_visions([prompt.vision for prompt in prompts], WINDOWS)
    features = models.encode(first.graphdef, first.params, visions)
    keys = jax.random.split(jax.random.key(0), len(prompts))
    ours = local.generate(first.params, prompts, features, greedy, keys, PROMPT_TOKENS)
    theirs = engine.generate(None, prompts, None, greedy, None, PROMPT_TOKENS)
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(their.completions[0].ids, our.completions[0].ids)
        assert_close(their.completions[0].logps, our.completions[0].logps)
        assert their.completions[0].text == our.completions[0].text


def test_interrupted_completions_go_on(engine, first, prompter, prompts):
    rollout = engine.submit([*prompts, *prompts], SAMPLING, needed=1).result()
    assert (len(rollout.groups), len(rollout.begun)) == (1, 5)
    rest = engine.submit([], SAMPLING, begun=rollout.begun).result()
    check(first, prompter, [*rollout.groups, *rest.groups])
