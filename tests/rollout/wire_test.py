import base64

import numpy as np
import orjson
import pytest

from tests.rollout.made_up import BANNED, END, PAD, START, make_prompt
from vtriune_jax.errors import UserError
from vtriune_jax.rollout import wire
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.types import Completion

PROMPT = make_prompt(1, [(b"one", 2, 3), (b"two", 1, 1)])
SAMPLING = Sampling(max_tokens=50, n=3)


def make(ids, finish="length", version="v1"):
    ids = np.array(ids, np.int32)
    return Completion(ids, -ids.astype(np.float32), "", finish, ((version, 0, len(ids)),))


def output(ids=(3, 4), **changes):
    meta = {
        "finish_reason": {"type": "length", "length": len(ids)},
        "prompt_tokens": 9,
        "output_token_logprobs": [[-float(i), i, None] for i in ids],
        "weight_version": "v1",
        "weight_versions": [{"version": "v1", "start": 0, "end": len(ids)}],
    }
    return {"output_ids": list(ids), "meta_info": meta | changes}


def test_one_placeholder_an_image_and_their_bytes_as_the_model_sees_them():
    sent = wire.wire_prompt(
        PROMPT, PAD, lambda prompt: [b"seen " + i for i in prompt.sample.images]
    )
    assert sent.ids == [21, 21, 23, START, PAD, END, 23, START, PAD, END, 23]
    texts = orjson.loads(orjson.dumps(sent.images))
    assert [base64.b64decode(text) for text in texts] == [b"seen one", b"seen two"]
    assert sent.tokens == len(PROMPT.ids) == len(sent.ids) + 5


def body(images, *begun):
    prompt = wire.WirePrompt([1, 2], images, 2)
    begun = [np.array(ids, np.int32) for ids in begun]
    return orjson.loads(wire.request_body("rid", prompt, begun, SAMPLING, [7], BANNED))


def test_new_completions_share_one_prompt():
    sent = body(["a", "b"], [], [], [])
    assert (sent["rid"], sent["input_ids"]) == (["rid-0"], [[1, 2]])
    assert sent["image_data"] == [["a", "b"]]
    (params,) = sent["sampling_params"]
    assert (params["n"], params["max_new_tokens"], params["temperature"]) == (3, 50, 1.0)
    assert (params["top_p"], params["top_k"], params["stop_token_ids"]) == (1.0, -1, [7])
    assert params["logit_bias"] == {str(i): -1e9 for i in BANNED}
    assert body([], [])["image_data"] is None


def test_continued_completions_are_prompts_of_their_own():
    sent = body(["a"], [5, 6], [])
    assert (sent["rid"], sent["input_ids"]) == (["rid-0", "rid-1"], [[1, 2, 5, 6], [1, 2]])
    assert sent["image_data"] == "a"  # once for all
    assert [(p["n"], p["max_new_tokens"]) for p in sent["sampling_params"]] == [(1, 48), (1, 50)]
    assert body(["a", "b"], [5], [6])["image_data"] == [["a", "b"]] * 2


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(max_tokens=1, top_p=0.9), "top_p=0.9"),
        (Sampling(max_tokens=1, top_k=5), "top_k=5"),
        (Sampling(max_tokens=1, n=2, temperature=0.0), "temperature=0, n=2"),
        (Sampling(max_tokens=1, n=1, temperature=-1.0), "temperature=-1"),
    ],
)
def test_sampling_is_by_temperature_alone(sampling, words):
    with pytest.raises(UserError, match=words):
        wire.check_sampling(sampling)


def test_a_good_answer():
    wire.check_sampling(Sampling(max_tokens=1, n=1, temperature=0.0))
    drawn = wire.completion(output(), 9, 2)
    np.testing.assert_array_equal(drawn.ids, [3, 4])
    np.testing.assert_array_equal(drawn.logps, np.array([-3, -4], np.float32))
    assert (drawn.finish, drawn.versions) == ("length", (("v1", 0, 2),))
    stopped = wire.completion(output(finish_reason={"type": "stop", "matched": 4}), 9, 2)
    assert stopped.finish == "stop"
    aborted = {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
    nothing = wire.completion({"output_ids": [], "meta_info": aborted}, 9, 2)
    assert (nothing.finish, len(nothing.ids), nothing.versions) == ("abort", 0, ())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (output(output_token_logprobs=[[-1.0, 3, None]]), "log-probs of 1 tokens"),
        (output(output_token_logprobs=[[-1.0, 3, None], [-1.0, 5, None]]), "not the 2 drawn"),
        (output(output_token_logprobs=[[None, 3, None], [-1.0, 4, None]]), "cannot be read|nan"),
        (output(output_token_logprobs=[[0.1, 3, None], [-1.0, 4, None]]), "log-probs from"),
        (output((3, 4, 5)), "3 tokens where 2"),
        (output(()), "no token"),
        (output(finish_reason={"type": "stop", "matched": 3}), "not the last token"),
        (output(finish_reason={"type": "stop", "matched": "x"}), "not the last token"),
        (output(finish_reason={"type": "odd"}), "finish reason 'odd'"),
        (output(finish_reason=None), "cannot be read"),
        (output(prompt_tokens=10), "counted 10 tokens in a prompt of 9"),
        (output(weight_versions=[{"version": "v1", "start": 0, "end": 1}]), "weight versions"),
        (output(weight_versions=[{"version": "v1", "start": 1, "end": 2}]), "weight versions"),
        ({"output_ids": ["x"], "meta_info": output()["meta_info"]}, "cannot be read"),
        ({"output_ids": [3]}, "cannot be read"),
    ],
)
def test_a_wrong_answer_is_told(answer, words):
    with pytest.raises(wire.WrongAnswer, match=words):
        wire.completion(answer, 9, 2)


def test_parts_are_joined_with_their_versions():
    whole = wire.joined(make([1, 2], "abort"), make([3, 4, 5]))
    np.testing.assert_array_equal(whole.ids, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(whole.logps, [-1, -2, -3, -4, -5])
    assert (whole.versions, whole.finish) == ((("v1", 0, 5),), "length")
    whole = wire.joined(make([1, 2], "abort"), make([3], "stop", "v2"))
    assert (whole.versions, whole.finish) == ((("v1", 0, 2), ("v2", 2, 3)), "stop")


def test_a_banned_id_ends_a_completion():
    drawn = wire.joined(make([1, 2], "abort"), make([PAD, 4], "stop", "v2"))
    cut, hit = wire.without_banned(drawn, BANNED)
    assert hit
    np.testing.assert_array_equal(cut.ids, [1, 2])
    np.testing.assert_array_equal(cut.logps, [-1, -2])
    assert (cut.finish, cut.versions) == ("length", (("v1", 0, 2),))
    assert wire.without_banned(make([1, 2]), BANNED)[1] is False


def test_events_arrive_in_pieces():
    text = b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'
    for cut in range(len(text)):
        first, rest = wire.split_events(text[:cut])
        more, rest = wire.split_events(rest + text[cut:])
        assert (first + more, rest) == ([b'{"a":1}', b'{"b":2}'], b"")
