"""Servers that are updated, restarted, added, taken away and locked, and the engine on them."""

from dataclasses import replace

import pytest

from tests.rollout.fake_sglang import FakeServer
from tests.rollout.rig import PROMPTS, SAMPLING, check, engine, pictures_of, wait_for
from vtriune_jax.errors import UserError
from vtriune_jax.rollout.fleet import Fleet


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


def test_a_server_that_was_left_paused_goes_on(server, oracle):
    """By a trainer that was killed in the midst of an update, say."""
    server.call("/pause_generation", {"mode": "retract"})
    with engine(server) as (made, fleet):
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        server.call("/pause_generation", {"mode": "retract"})
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        assert server.seen()["counts"]["/continue_generation"] == 2
        assert fleet.quarantines == 1


def test_a_server_that_cannot_be_brought_up_to_date_gets_no_work(pair, oracle):
    async def on_return(server):
        if server.address == pair[0].address:
            raise UserError("it has other weights than the trainer")

    with engine(*pair, on_return=on_return) as (made, fleet):
        check(made.submit(PROMPTS, SAMPLING).result().groups, PROMPTS, oracle)
        wait_for(lambda: "quarantined (UserError it has other weights" in fleet.describe())
        assert "/generate" not in pair[0].seen()["counts"]
        assert "is ready" in fleet.describe()


def test_addresses_that_are_none(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.write_text("# none yet\n")
    for addresses, words in [
        (missing, "cannot read .*missing"),
        (empty, "found no address"),
        (["10.0.0.2:30000"], "found '10.0.0.2:30000'; expected servers like http://"),
        (lambda: [], "found no address"),
    ]:
        with pytest.raises(UserError, match=words):
            Fleet(addresses)


def test_a_server_with_old_weights_is_brought_up_to_date_first(made_up_folders, oracle):
    """One that was restarted has the weights of its start: what it draws with them is refused."""
    flags = {"process": True, "model_path": made_up_folders[1], "weight_version": "v0"}
    flags["no_vision_cache"] = True  # or images that were seen in between keep old features
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
    flags = {"model_path": folder, "capacity": 7, "token_seconds": 0.001}
    with FakeServer(**flags) as server, engine(server) as (made, _):
        check(made.submit(PROMPTS * 3, SAMPLING).result().groups, PROMPTS * 3, oracle)
        assert 4 <= server.seen()["most"] <= 7


def test_pictures_are_read_when_a_server_takes_their_prompt(made_up_folders, oracle):
    """Not before: those of a long queue would fill the memory."""
    prompts, read = PROMPTS[-1:] * 6, []

    def pictures(prompt):
        read.append(prompt)
        return pictures_of(prompt)

    flags = {"model_path": made_up_folders[0], "capacity": SAMPLING.n}
    with FakeServer(**flags) as server, engine(server, pictures=pictures) as (made, _):
        rollout = made.submit(prompts, SAMPLING, needed=2).result()
        check(rollout.groups, prompts[:2], oracle)
        assert len(rollout.begun) == 4
        assert 2 <= len(read) <= 3
