"""The engine against fake servers that fail in every way: nothing lost or twice, no hanging."""

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import PAD, make_prompt
from tests.rollout.rig import PICTURES, PROMPTS, SAMPLING, check, engine, wait_for
from vtriune_jax.errors import UserError


def test_completions_and_their_logps(pair, oracle):
    with engine(*pair) as (made, _):
        groups = made.generate(None, PROMPTS, None, SAMPLING, None, 100)
        check(groups, PROMPTS, oracle)
        drawn = [drawn for group in groups for drawn in group.completions]
        assert len({drawn.ids.tobytes() for drawn in drawn}) == len(drawn)
        assert {drawn.versions for drawn in drawn} >= {(("v0", 0, 12),)}
        stats, seen = made.stats(), [each.seen() for each in pair]
        assert stats["completions"] == 21
        assert stats["retries"] == 0
        assert stats["tokens"] == sum(each["tokens"] for each in seen)
        assert stats["tokens"] == sum(len(each.ids) for each in drawn)
        assert min(each["counts"]["/generate"] for each in seen) >= 2
        encoded = 3 * 4 / 3 * len(PICTURES[0])  # once a prompt, in base64
        assert sum(each["image_bytes"] for each in seen) < encoded
        greedy = replace(SAMPLING, n=1, temperature=0.0)
        once, again = (made.generate(None, PROMPTS, None, greedy, None, 100) for _ in range(2))
        check(once, PROMPTS, oracle, greedy)
        for one, other in zip(once, again, strict=True):
            np.testing.assert_array_equal(one.completions[0].ids, other.completions[0].ids)
        with pytest.raises(
            UserError, match=r"sample 6 of .*: the prompt has 16 tokens, more than the 15 allowed"
        ):
            made.generate(None, PROMPTS, None, SAMPLING, None, 15)


def test_several_steps_at_once_from_several_threads(pair, oracle):
    with engine(*pair) as (made, _):
        found = {}

        def ask(k):
            found[k] = made.submit(PROMPTS[k:], SAMPLING).result().groups

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k in range(4):
            check(found[k], PROMPTS[k:], oracle)
        assert made.submit([], SAMPLING).result().groups == ()


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "body": ""},
        {"kind": "drop"},
        {"kind": "drop", "after": 5},
        {"kind": "json"},
        {"kind": "lengths"},
        {"kind": "tokens"},
        {"kind": "ids"},
        {"kind": "missing"},
    ],
    ids=lambda fault: "-".join(map(str, fault.values())),
)
def test_what_fails_is_done_again(pair, oracle, fault):
    for server in pair:
        server.script(faults=[{**fault, "times": 2}], token_seconds=0.002)
    with engine(*pair) as (made, _):
        groups = made.generate(None, PROMPTS, None, SAMPLING, None, 100)
        check(groups, PROMPTS, oracle)
        stats = made.stats()
        assert stats["retries"] == 4
        assert stats["requests"] == len(PROMPTS) + 4
        assert stats["completions"] == 21
        rids = [rid for server in pair for rid in server.seen()["rids"]]
        assert len(set(rids)) == len(rids)
        assert (stats["pending_prompts"], stats["in_flight"]) == (0, 0)


def test_completions_that_came_before_a_failure_are_kept(server, oracle):
    """The server goes when the shortest are there already: those are not drawn again."""
    sampling = replace(SAMPLING, n=8, max_tokens=400, temperature=1.0)
    server.script(faults=[{"kind": "drop", "after": 1600}], token_seconds=0.001)
    with engine(server) as (made, _):
        groups = made.generate(None, PROMPTS[:1], None, sampling, None, 100)
        check(groups, PROMPTS[:1], oracle, sampling)
        stats = made.stats()
        assert stats["retries"] == 1
        assert stats["completions"] == 8
        lengths = sorted(len(drawn.ids) for drawn in groups[0].completions)
        assert stats["tokens"] == sum(lengths)


def test_killed_while_it_draws_and_back_again(made_up_folders, oracle):
    flags = {"model_path": made_up_folders[0], "token_seconds": 0.03}
    with (
        FakeServer(process=True, **flags) as one,
        FakeServer(**flags) as other,
        engine(one, other) as (made, _),
    ):
        ahead = made.submit(PROMPTS, SAMPLING)
        wait_for(lambda: one.seen()["tokens"])
        one.kill()
        groups = ahead.result().groups
        check(groups, PROMPTS, oracle)
        stats = made.stats()
        assert stats["retries"] >= 1
        assert stats["servers_ready"] == 1
        one.start()
        wait_for(lambda: made.stats()["servers_ready"] == 2)
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        assert one.seen()["counts"]["/generate"] > 0


def test_frozen_while_it_draws_and_back_again(made_up_folders, oracle):
    flags = {"model_path": made_up_folders[0], "token_seconds": 0.03}
    with (
        FakeServer(process=True, **flags) as one,
        FakeServer(**flags) as other,
        engine(one, other) as (made, _),
    ):
        ahead = made.submit(PROMPTS, SAMPLING)
        wait_for(lambda: one.seen()["tokens"])
        one.freeze()
        check(ahead.result().groups, PROMPTS, oracle)
        assert made.stats()["quarantines"] == 1
        one.thaw()
        wait_for(lambda: made.stats()["servers_ready"] == 2)


def test_a_fleet_that_does_not_answer_ends_with_a_word_to_the_user(server):
    server.script(faults=[{"kind": "hang", "times": -1}])
    with engine(server, deadline=0.5) as (made, _):
        began = time.monotonic()
        with pytest.raises(
            UserError, match="7 of 7 prompts, the first sample 0 of made up"
        ) as said:
            made.generate(None, PROMPTS, None, SAMPLING, None, 100)
        assert time.monotonic() - began < 5
        assert server.address in str(said.value)
        server.kill()
        with pytest.raises(UserError, match=r"quarantined .*[Cc]onnect"):
            made.generate(None, PROMPTS, None, SAMPLING, None, 100)


def test_a_prompt_that_no_server_takes_is_named(pair):
    with engine(*pair) as (made, _):
        for server in pair:
            server.script(faults=[{"kind": "status", "status": 500, "times": -1}])
        with pytest.raises(UserError, match=r"sample 3 of made up .* 500 Inter"):
            made.generate(None, PROMPTS[3:4], None, SAMPLING, None, 100)
        for server in pair:
            server.script(faults=[{"kind": "tokens", "times": -1}])
        with pytest.raises(UserError, match=r"counted .* preprocessor_config\.json .*max_pixels"):
            made.generate(None, PROMPTS[5:6], None, SAMPLING, None, 100)
        for server in pair:
            server.script(faults=[])
        broken = make_prompt(9, [(b"no picture", 1, 1)])
        with pytest.raises(UserError, match=r"sample 9 .* refuses it: HTTP 400 .*IMAGE"):
            made.generate(None, [broken], None, SAMPLING, None, 100)


def test_stragglers_are_aborted_and_go_on_later(pair, oracle):
    """Every prompt comes out once, complete, and the parts fit together."""
    slow, fast = pair
    slow.script(token_seconds=0.02)
    fast.script(token_seconds=0.005)  # nearly always through while the slow one draws
    sampling = replace(SAMPLING, max_tokens=60)
    with engine(*pair) as (made, _):
        rollout = made.submit(PROMPTS, sampling, needed=3).result()
        assert (len(rollout.groups), len(rollout.begun)) == (3, 4)
        begun = [drawn for group in rollout.begun for drawn in group.completions]
        assert "abort" in {drawn.finish for drawn in begun}
        assert sum(len(drawn.ids) for drawn in begun) > 0
        stats = made.stats()
        # the server counts those too of which it had no token yet
        assert 0 < stats["aborted"] <= sum(server.seen()["aborted"] for server in pair)
        assert [server.seen()["running"] for server in pair] == [0, 0]
        before = {g.prompt.sample.id: g for g in rollout.begun}
        rest = made.submit(PROMPTS[:1], sampling, begun=rollout.begun).result()
        assert [group.prompt.sample.id for group in rest.groups] == [*before, "0"]
        for group in rest.groups[:-1]:
            for old, new in zip(
                before[group.prompt.sample.id].completions, group.completions, strict=True
            ):
                np.testing.assert_array_equal(new.ids[: len(old.ids)], old.ids)
                np.testing.assert_array_equal(new.logps[: len(old.ids)], old.logps)
        done = [*rollout.groups, *rest.groups[:-1]]
        assert Counter(g.prompt.sample.id for g in done) == Counter(map(str, range(7)))
        done.sort(key=lambda group: int(group.prompt.sample.id))
        check(done, PROMPTS, oracle, sampling)
        whole = made.submit([], sampling, begun=rest.groups).result()  # nothing is left to do
        assert whole.groups == rest.groups


def test_what_waits_for_a_server_is_interrupted_too(server):
    server.script(token_seconds=0.005)
    with engine(server, tokens_per_completion=16384 // 3) as (made, _):  # one prompt at a time
        rollout = made.submit(PROMPTS, SAMPLING, needed=2).result()
        assert (len(rollout.groups), len(rollout.begun)) == (2, 5)
        assert server.seen()["most"] <= 3
        assert sum(len(c.ids) == 0 for group in rollout.begun for c in group.completions) >= 12


def test_a_banned_id_that_comes_all_the_same(server, oracle):
    server.script(faults=[{"kind": "banned", "id": PAD, "at": 4}, {"kind": "banned", "id": PAD}])
    sampling = replace(SAMPLING, n=1, max_tokens=8)
    with engine(server) as (made, _):
        (cut,) = made.generate(None, PROMPTS[:1], None, sampling, None, 100)
        (drawn,) = cut.completions
        assert (drawn.finish, len(drawn.ids), drawn.versions) == ("length", 4, (("v0", 0, 4),))
        np.testing.assert_allclose(drawn.logps, oracle(PROMPTS[0], drawn.ids), atol=1e-5)
        groups = made.generate(None, PROMPTS[:1], None, sampling, None, 100)
        check(groups, PROMPTS[:1], oracle, sampling)
        assert made.stats()["banned"] == 2  # of the second, nothing was left: another was drawn
