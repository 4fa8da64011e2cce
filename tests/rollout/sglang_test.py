"""The real SGLang server against our own sampler: same weights, same tokens, same log-probs."""

import base64
import json
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from tests.data.conftest import make_sample, png
from vtriune_jax import models
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.models import layout
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine

pytestmark = pytest.mark.sglang

TOKENS, PROMPT_TOKENS, WINDOWS = 24, 160, 8
SAMPLES = {
    "text": make_sample("How many?", []),
    "one image": make_sample("<image>How many?", [png(112, 84, seed=1)]),
    "two images": make_sample(
        "Is <image> as <image>?", [png(56, 56, seed=2), png(140, 56, seed=3)]
    ),
}
ODD = make_sample("<image>How many?", [png(101, 75, seed=4)])
"""With a picture whose sides are no multiples of 28: somebody must resize it."""


def post(address, path, body, timeout=60.0):
    """(status, answer) of a POST with JSON."""
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def version(address):
    with urllib.request.urlopen(f"{address}/model_info", timeout=60) as answer:
        return json.loads(answer.read())["weight_version"]


def request(prompt, banned, **sampling):
    """What /generate is asked: one placeholder an image, whose bytes come beside the tokens."""
    pad = banned[0]
    kept = [i for i, t in enumerate(prompt.ids) if t != pad or i == 0 or prompt.ids[i - 1] != pad]
    images = [base64.b64encode(data).decode() for data in prompt.sample.images]
    how = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": TOKENS}
    return {
        "input_ids": prompt.ids[kept].tolist(),
        **({"image_data": images} if images else {}),
        "sampling_params": how | {"ignore_eos": True, "skip_special_tokens": False} | sampling,
        "return_logprob": True,
    }


def generated(address, body):
    """Token ids, log-probs and meta_info of one answer."""
    status, answer = post(address, "/generate", body)
    assert status == 200, answer
    pairs = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in pairs] == answer["output_ids"]
    return answer["output_ids"], [logp for logp, _, _ in pairs], answer["meta_info"]


@pytest.fixture(scope="module")
def prompts(served_versions):
    first = served_versions[0]
    prompter = Prompter(load_processor(first.folder), first.config, cot=False)
    return {name: prompter(sample) for name, sample in (SAMPLES | {"odd": ODD}).items()}


def ours(served, prompts, banned=(), temperature=0.0):
    """The completion of each prompt by the local engine."""
    engine = LocalEngine(served.graphdef, stop_ids=(), banned_ids=banned, pad_id=0, decode_text=str)
    visions = layout.stack_visions([prompt.vision for prompt in prompts], WINDOWS)
    groups = engine.generate(
        served.params,
        prompts,
        models.encode(served.graphdef, served.params, visions),
        Sampling(max_tokens=TOKENS, n=1, temperature=temperature),
        jax.random.split(jax.random.key(0), len(prompts)),
        PROMPT_TOKENS,
    )
    return [group.completions[0] for group in groups]


@pytest.fixture(scope="module")
def expected(served_versions, prompts):
    """version → name → the greedy completion, nothing banned."""
    return [
        dict(zip(prompts, ours(served, list(prompts.values())), strict=True))
        for served in served_versions
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_greedy_tokens_and_log_probs_are_ours(
    name, real_server, served_versions, prompts, expected
):
    (address,) = real_server.addresses
    prompt, completion = prompts[name], expected[0][name]
    ids, logps, meta = generated(address, request(prompt, served_versions[0].config.banned_ids))
    assert meta["prompt_tokens"] == len(prompt.ids)
    assert len(set(ids)) > 5
    np.testing.assert_array_equal(ids, completion.ids)
    np.testing.assert_allclose(logps, completion.logps, atol=1e-4)


def test_the_server_resizes_pictures_in_its_own_way(
    real_server, served_versions, prompts, expected
):
    """Why rollouts send pictures that have been resized already: log-probs differ otherwise."""
    (address,) = real_server.addresses
    body = request(prompts["odd"], served_versions[0].config.banned_ids)
    _, logps, meta = generated(address, body)
    assert meta["prompt_tokens"] == len(prompts["odd"].ids)
    assert np.abs(logps - expected[0]["odd"].logps).max() > 1e-3


def test_a_disk_update_changes_the_answers_and_the_version(
    real_server, served_versions, prompts, expected
):
    """Also of a picture that the server has seen before, whose features must not be old ones."""
    (address,) = real_server.addresses
    banned = served_versions[0].config.banned_ids

    def answers():
        return {name: generated(address, request(prompts[name], banned)) for name in SAMPLES}

    def update(served, name):
        body = {"model_path": str(served.folder), "weight_version": name, "flush_cache": True}
        return post(address, "/update_weights_from_disk", body)

    before = version(address)
    answers()
    try:
        status, told = update(served_versions[1], "step-1")
        assert (status, told["success"]) == (200, True)
        assert version(address) == "step-1"
        for name, (ids, logps, meta) in answers().items():
            assert meta["weight_version"] == "step-1"
            assert ids != expected[0][name].ids.tolist()
            np.testing.assert_array_equal(ids, expected[1][name].ids)
            np.testing.assert_allclose(logps, expected[1][name].logps, atol=3e-4)
    finally:
        update(served_versions[0], before)
    assert version(address) == before
    for name, (ids, _, _) in answers().items():
        np.testing.assert_array_equal(ids, expected[0][name].ids)


def test_a_missing_folder_is_refused_and_the_weights_stay(real_server, served_versions, prompts):
    (address,) = real_server.addresses
    body = {"model_path": "/nowhere", "weight_version": "step-9"}
    status, told = post(address, "/update_weights_from_disk", body)
    assert (status, told["success"]) == (400, False)
    assert version(address) != "step-9"
