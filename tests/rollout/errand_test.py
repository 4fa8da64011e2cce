"""The engine against fake servers that fail in every way: nothing lost, nothing twice, no hanging."""

import contextlib
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.data.conftest import png
from tests.rollout.fake_models import Draw, Pseudo, Settings, expand
from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import BANNED, PAD, STOP, VOCAB, make_prompt
from vtriune_jax.errors import UserError
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.sglang import SGLangEngine
from vtriune_jax.rollout.wire import BAN, wire_prompt

SAMPLING = Sampling(max_tokens=12, n=3, temperature=0.8)
PICTURES = [png(84, 56, seed=1), png(56, 28, seed=2)]
PROMPTS = [
    *(make_prompt(k) for k in range(5)),
    make_prompt(5, [(PICTURES[0], 2, 3)]),
    make_prompt(6, [(PICTURES[0], 2, 3), (PICTURES[1], 1, 2)]),
]


@contextlib.contextmanager
def engine(*servers, deadline=20.0, addresses=None, **settings):
    quick = {"patience": 0.3, "health_timeout": 0.3, "backoff": 0.05, "reread": 0.1}
    addresses = addresses or [server.address for server in servers]
    with Fleet(addresses, **(quick | settings)) as fleet:
        made = SGLangEngine(
            fleet,
            stop_ids=[STOP],
            banned_ids=BANNED,
            image_id=PAD,
            decode_text=lambda ids: " ".join(map(str, ids)),
            pictures=lambda prompt: prompt.sample.images,
            deadline=deadline,
            backoff=0.02,
        )
        fleet.wait_ready(10)
        yield made, fleet


@pytest.fixture
def server(made_up_folders):
    with FakeServer(model_path=made_up_folders[0], weight_version="v0") as server:
        yield server


@pytest.fixture
def pair(made_up_folders, server):
    with FakeServer(model_path=made_up_folders[0], weight_version="v0", random_seed=1) as other:
        yield server, other


@pytest.fixture(scope="module")
def oracle(made_up_folders):
    """oracle(prompt, ids) → their log-probs under the first folder's weights."""
    settings = Settings(VOCAB, PAD, frozenset([STOP]), 28 * 28, 28 * 28 * 1280)
    source = Pseudo(settings)
    source.load(made_up_folders[0])
    bias = tuple((i, BAN) for i in BANNED)

    def logps(prompt, ids, temperature=SAMPLING.temperature):
        sent = wire_prompt(prompt, PAD, lambda prompt: prompt.sample.images)
        draw = Draw(temperature=temperature, bias=bias)
        (line,) = source.begin(expand(sent.ids, sent.images, settings), draw, 1)
        source._uniform = lambda: 0.5
        found = []
        for i in ids.tolist():
            source.step(line)
            state = source._states(line.prompt)[-1]
            for before in line.ids:
                state = source._mix(state, before)
            found.append(source._table(state, line.draw)[0][i])
            line.ids.append(i)
            line.state = None
        return np.array(found, np.float32)

    return logps


def check(groups, prompts, oracle, sampling=SAMPLING):
    """Every prompt once and in order, n whole completions of each, with the log-probs of their ids."""
    assert [group.prompt.sample.id for group in groups] == [p.sample.id for p in prompts]
    for group in groups:
        assert len(group.completions) == sampling.n
        for drawn in group.completions:
            ids, stopped = drawn.ids, drawn.finish == "stop"
            assert ids.dtype == np.int32
            assert drawn.logps.dtype == np.float32
            assert (ids == STOP).sum() == stopped == (ids[-1] == STOP)
            assert stopped or (drawn.finish, len(ids)) == ("length", sampling.max_tokens)
            assert not np.isin(ids, BANNED).any()
            assert drawn.text == " ".join(map(str, ids[:-1] if stopped else ids))
            assert [drawn.versions[0][1], drawn.versions[-1][2]] == [0, len(ids)]
            expected = oracle(group.prompt, ids, sampling.temperature or 1.0)
            np.testing.assert_allclose(drawn.logps, expected, atol=1e-5)


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
        with pytest.raises(UserError, match="sample '6' has 22 tokens, more than the 21 allowed"):
            made.generate(None, PROMPTS, None, SAMPLING, None, 21)


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
    flags = {"process": True, "model_path": made_up_folders[0], "token_seconds": 0.03}
    with FakeServer(**flags) as one, FakeServer(**flags) as other, engine(one, other) as (made, _):
        ahead = made.submit(PROMPTS, SAMPLING)
        while not one.seen()["tokens"]:
            time.sleep(0.01)
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
    flags = {"process": True, "model_path": made_up_folders[0], "token_seconds": 0.03}
    with FakeServer(**flags) as one, FakeServer(**flags) as other, engine(one, other) as (made, _):
        ahead = made.submit(PROMPTS, SAMPLING)
        while not one.seen()["tokens"]:
            time.sleep(0.01)
        one.freeze()
        check(ahead.result().groups, PROMPTS, oracle)
        assert made.stats()["quarantines"] == 1
        one.thaw()
        wait_for(lambda: made.stats()["servers_ready"] == 2)


def wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


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
        with pytest.raises(UserError, match="quarantined: .*refused|Connect"):
            made.generate(None, PROMPTS, None, SAMPLING, None, 100)


def test_a_prompt_that_no_server_takes_is_named(pair):
    with engine(*pair) as (made, _):
        for server in pair:
            server.script(faults=[{"kind": "status", "status": 500, "times": -1}])
        with pytest.raises(
            UserError, match="sample 3 of made up cannot be completed: .* 500 Inter"
        ):
            made.generate(None, PROMPTS[3:4], None, SAMPLING, None, 100)
        for server in pair:
            server.script(faults=[{"kind": "tokens", "times": -1}])
        with pytest.raises(UserError, match=r"counted .* preprocessor_config\.json .*max_pixels"):
            made.generate(None, PROMPTS[5:6], None, SAMPLING, None, 100)
        for server in pair:
            server.script(faults=[])
        broken = make_prompt(9, [(b"no picture", 1, 1)])
        with pytest.raises(UserError, match="sample 9 .* refuses it: HTTP 400 .*IMAGE"):
            made.generate(None, [broken], None, SAMPLING, None, 100)


def test_stragglers_are_aborted_and_go_on_later(pair, oracle):
    """Every prompt comes out once, complete, and the parts fit together."""
    slow, _fast = pair
    slow.script(token_seconds=0.02)
    sampling = replace(SAMPLING, max_tokens=60)
    with engine(*pair) as (made, _):
        rollout = made.submit(PROMPTS, sampling, needed=3).result()
        assert (len(rollout.groups), len(rollout.begun)) == (3, 4)
        begun = [drawn for group in rollout.begun for drawn in group.completions]
        assert "abort" in {drawn.finish for drawn in begun}
        assert sum(len(drawn.ids) for drawn in begun) > 0
        stats = made.stats()
        assert stats["aborted"] == slow.seen()["aborted"] > 0
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
        check(
            made.generate(None, PROMPTS[:1], None, sampling, None, 100),
            PROMPTS[:1],
            oracle,
            sampling,
        )
        assert made.stats()["banned"] == 2  # of the second, nothing was left: another was drawn


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_an_update_in_the_midst(server, made_up_folders, mode):
    """Completions go on with the new weights, and tell which token is of which."""
    server.script(token_seconds=0.01)
    sampling = replace(SAMPLING, max_tokens=40, temperature=1.0)
    with engine(server) as (made, fleet):
        fleet.published("v0")
        ahead = made.submit(PROMPTS, sampling)
        wait_for(lambda: server.seen()["tokens"] > 100)
        fleet.published("v1")

        async def update():
            (one,) = fleet.servers()
            await fleet.post(one, "/pause_generation", {"mode": mode})
            body = {"model_path": str(made_up_folders[1]), "weight_version": "v1"}
            body["flush_cache"] = mode != "in_place"
            await fleet.post(one, "/update_weights_from_disk", body)
            assert one.version == "v1"
            time.sleep(0)
            await fleet.post(one, "/continue_generation")

        fleet.run(update()).result()
        groups = ahead.result().groups
        versions = {drawn.versions for group in groups for drawn in group.completions}
        assert any([v for v, _, _ in spans] == ["v0", "v1"] for spans in versions)
        for group in groups:
            for drawn in group.completions:
                assert drawn.finish in ("stop", "length")
                assert [0, *(end for _, _, end in drawn.versions)][:-1] == [
                    start for _, start, _ in drawn.versions
                ]
        stats = made.stats()
        assert stats["quarantines"] == stats["retries"] == 0
        assert 0 <= stats["version_lag"] < 1


def test_a_server_with_old_weights_is_brought_up_to_date_first(made_up_folders, oracle):
    """One that was restarted has the weights of its start: what it draws with them is refused."""
    flags = {"process": True, "model_path": made_up_folders[1], "weight_version": "v0"}
    updated = []

    async def on_return(server):
        body = {"model_path": str(made_up_folders[0]), "weight_version": "v1"}
        await fleet.post(server, "/update_weights_from_disk", body)
        updated.append(server.address)

    with FakeServer(**flags) as server, engine(server) as (made, fleet):
        fleet.published("v1")
        fleet.on_return = on_return
        fleet.run(on_return(fleet.servers()[0])).result()
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        server.kill()  # between two steps, so that nobody notices
        server.start()
        groups = made.submit(PROMPTS, SAMPLING).result().groups
        check(groups, PROMPTS, oracle)
        assert {v for g in groups for c in g.completions for v, _, _ in c.versions} == {"v1"}
        assert len(updated) == 2


def test_servers_join_and_leave_during_a_run(pair, tmp_path, oracle):
    one, other = pair
    one.script(token_seconds=0.005)
    addresses = tmp_path / "servers.txt"
    addresses.write_text(f"# rollouts\n{one.address}/\n")
    small = 16384 // 3
    with engine(addresses=addresses, tokens_per_completion=small) as (made, fleet):
        ahead = made.submit(PROMPTS * 4, SAMPLING)
        addresses.write_text(f"{one.address}\n{other.address}  # new\n")
        wait_for(lambda: other.seen()["tokens"])
        addresses.write_text(other.address)
        check(ahead.result().groups, PROMPTS * 4, oracle)
        wait_for(lambda: [server.address for server in fleet.servers()] == [other.address])
        count = one.seen()["counts"]["/generate"]
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        assert one.seen()["counts"]["/generate"] == count
        addresses.unlink()  # the list stays as it was
        wait_for(lambda: "cannot read" in fleet.describe())
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)


def test_keys_come_from_the_environment(made_up_folders, monkeypatch):
    folder = made_up_folders[0]
    with FakeServer(model_path=folder, api_key="user", admin_api_key="admin") as server:
        with (
            Fleet([server.address], patience=0.2, backoff=0.05) as fleet,
            pytest.raises(UserError, match="VTRIUNE_ROLLOUT_KEY and VTRIUNE_ROLLOUT_ADMIN_KEY"),
        ):
            fleet.wait_ready(0.5)
        monkeypatch.setenv("VTRIUNE_ROLLOUT_KEY", "user")
        monkeypatch.setenv("VTRIUNE_ROLLOUT_ADMIN_KEY", "admin")
        server.script(token_seconds=0.01)
        with engine(server) as (made, _):
            rollout = made.submit(PROMPTS, SAMPLING, needed=0).result()
            assert len(rollout.begun) == 7


def test_a_load_is_never_above_a_servers_capacity(made_up_folders, oracle):
    folder = made_up_folders[0]
    with FakeServer(model_path=folder, capacity=7, token_seconds=0.001) as server:
        with engine(server) as (made, _):
            check(made.submit(PROMPTS * 3, SAMPLING).result().groups, PROMPTS * 3, oracle)
            assert 4 <= server.seen()["most"] <= 7
