"""Completions that a checkpoint holds come back as they were."""

from types import SimpleNamespace

import numpy as np

from vtriune_jax.types import Completion, Group
from vtriune_jax.waiting import first_from, from_arrays, to_arrays


def decode(ids):
    return " ".join(map(str, ids))


def completion(ids, finish):
    ids = np.array(ids, np.int32)
    text = decode((ids[:-1] if finish == "stop" else ids).tolist())
    return Completion(ids, -0.5 * ids.astype(np.float32), text, finish)


GROUPS = [
    Group(SimpleNamespace(number=0), (completion([3, 1], "stop"), completion([4, 4, 4], "length"))),
    Group(SimpleNamespace(number=1), (completion([1], "stop"), completion([2, 1], "stop"))),
]


def assert_same(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.logps, other.logps)
        assert (one.text, one.finish) == (other.text, other.finish)


def test_there_and_back():
    got = from_arrays(to_arrays(GROUPS), decode)
    for one, other in zip(got, GROUPS, strict=True):
        assert_same(one, other.completions)


def test_none():
    assert to_arrays([]) == {}
    assert from_arrays({}, decode) == []


def test_a_step_is_answered_from_what_waits_and_then_anew():
    waiting = [group.completions for group in GROUPS]
    asked = []

    def respond(params, prompts, features, drawn):
        asked.append((prompts, drawn))
        return ["new"]

    answer = first_from(waiting, respond)
    prompts = [group.prompt for group in GROUPS]
    got = answer(None, prompts, None, 0)
    assert [group.prompt for group in got] == prompts
    assert [group.completions for group in got] == waiting
    assert not asked
    assert answer(None, ["later"], None, 2) == ["new"]
    assert asked == [(["later"], 2)]
