"""Weights to a fleet: every server has them, or gets no work until it has."""

import time

import pytest

from tests.rollout.syncing import UPDATE, moved, until
from vtriune_jax.errors import UserError

PAUSE, CONTINUE = "/pause_generation", "/continue_generation"


def test_all_servers_get_the_version(fleet_of, sync_of, served, tmp_path):
    fleet, servers = fleet_of()
    (tmp_path / "seen").symlink_to(tmp_path / "out")
    sync = sync_of(fleet, server_dir=f"{tmp_path}/seen/")
    for version in (1, 2):
        metrics = sync.push(moved(served.params, 0.1 * version), version)
        for server in servers:
            info = server.call("/model_info")
            assert info["weight_version"] == str(version)
            assert info["model_path"] == f"{tmp_path}/seen/version-{version:08d}"
            assert server.seen()["paused"] == ""
    assert {server.version for server in fleet.servers()} == {"2"} == {fleet.version}
    assert metrics["sync/servers_updated"] == 2
    assert metrics["sync/servers_quarantined"] == 0
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*2/*.safetensors")]
    assert 0 <= sum(sizes) - metrics["sync/bytes"] < 20_000  # headers
    assert 0 < metrics["sync/update_seconds"] < metrics["sync/seconds"]
    assert metrics["sync/gb_per_second"] > 0
    sync.push(served.params, 3)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_completion_under_way_goes_on_with_the_new_weights(fleet_of, sync_of, served):
    fleet, (server,) = fleet_of(1, token_seconds=0.01)
    sync = sync_of(fleet)
    sync.push(served.params, 1)
    body = {
        "input_ids": [20, 21],
        "sampling_params": {"max_new_tokens": 400, "ignore_eos": True},
        "return_logprob": True,
    }
    answer = fleet.run(fleet.post(fleet.servers()[0], "/generate", body, admin=False))
    until(lambda: server.seen()["tokens"] > 20)
    sync.push(moved(served.params, 0.1), 2)
    assert not answer.done()
    meta = answer.result(60)["meta_info"]
    assert [span["version"] for span in meta["weight_versions"]] == ["1", "2"]
    assert meta["weight_versions"][-1]["end"] == meta["completion_tokens"] == 400
    assert meta["num_retractions"] == 1


@pytest.mark.parametrize("path", [PAUSE, UPDATE, "/model_info", CONTINUE])
@pytest.mark.parametrize("fault", ["status", "hang", "drop", "json"])
def test_a_server_that_fails_comes_back_with_the_newest_weights(
    path, fault, fleet_of, sync_of, served
):
    fleet, (good, bad) = fleet_of()
    sync = sync_of(fleet, deadline=2.0 if fault == "hang" else 30.0)
    sync.push(served.params, 1)
    times = 2 if (fault, path) == ("drop", "/model_info") else 1  # aiohttp itself asks again
    bad.script(faults=[{"path": path, "kind": fault, "times": times}])
    metrics = sync.push(moved(served.params, 0.1), 2)
    assert (metrics["sync/servers_updated"], metrics["sync/servers_quarantined"]) == (1, 1)
    states = {server.address: server for server in fleet.servers()}
    assert states[good.address].works
    until(lambda: states[bad.address].works)
    assert states[bad.address].version == "2"
    assert bad.call("/model_info")["weight_version"] == "2"
    assert bad.seen()["paused"] == ""
    metrics = sync.push(served.params, 3)
    assert metrics["sync/servers_updated"] == 2


def test_a_server_that_says_no(fleet_of, sync_of, served):
    fleet, (_good, bad) = fleet_of()
    sync = sync_of(fleet)
    said = '{"success": false, "message": "Failed to get weights iterator"}'
    for status in (200, 400):
        fault = {"path": UPDATE, "kind": "status", "status": status, "body": said, "times": 3}
        bad.script(faults=[fault])
        sync.push(served.params, status)
        (sick,) = [server for server in fleet.servers() if server.address == bad.address]
        assert not sick.works
        assert "Failed to get weights iterator" in sick.reason
        bad.script(faults=[])
        until(lambda sick=sick: sick.works)
        assert bad.call("/model_info")["weight_version"] == str(status)


@pytest.mark.parametrize("path", [PAUSE, UPDATE, CONTINUE])
def test_a_server_that_dies(path, start, fleet_of, sync_of, served):
    dying = start(process=True)
    fleet, (_good, _) = fleet_of(servers=[start(), dying])
    sync = sync_of(fleet, deadline=5.0)
    sync.push(served.params, 1)
    dying.script(faults=[{"path": path, "kind": "die"}])
    metrics = sync.push(moved(served.params, 0.1), 2)
    assert (metrics["sync/servers_updated"], metrics["sync/servers_quarantined"]) == (1, 1)
    sync.push(served.params, 3)
    dying.kill()  # it is dead: only its process is left
    dying.start()  # with the checkpoint's weights, at the same address
    until(lambda: all(server.works for server in fleet.servers()))
    assert dying.call("/model_info")["weight_version"] == "3"


def test_a_server_that_stands_still_and_goes_on(start, fleet_of, sync_of, served):
    frozen = start(process=True)
    fleet, _ = fleet_of(servers=[start(), frozen])
    sync = sync_of(fleet, deadline=1.0)
    sync.push(served.params, 1)
    frozen.freeze()
    began = time.monotonic()
    metrics = sync.push(moved(served.params, 0.1), 2)
    assert time.monotonic() - began < 10
    assert metrics["sync/servers_quarantined"] == 1
    frozen.thaw()
    until(lambda: all(server.works for server in fleet.servers()))
    assert frozen.call("/model_info")["weight_version"] == "2"
    assert frozen.seen()["paused"] == ""


def test_one_that_returns_during_a_push_gets_the_newer_version(fleet_of, sync_of, served):
    fleet, (_good, late) = fleet_of()
    sync = sync_of(fleet)
    sync.push(served.params, 1)
    (server,) = [each for each in fleet.servers() if each.address == late.address]
    late.script(faults=[{"path": UPDATE, "kind": "slow", "seconds": 1.0}])

    async def sicken():
        sync._given.clear()  # as after a restart
        fleet.quarantine(server, "a test")

    fleet.run(sicken()).result()
    until(lambda: late.seen()["counts"].get(UPDATE, 0) == 2)  # on its way back, with version 1
    metrics = sync.push(moved(served.params, 0.1), 2)
    assert metrics["sync/servers_updated"] == 1
    until(lambda: server.works)
    assert server.version == "2"
    assert late.call("/model_info")["weight_version"] == "2"


def test_versions_of_an_earlier_run_do_not_count(fleet_of, sync_of, served, tmp_path):
    fleet, (server,) = fleet_of(1)
    server.call("/update_weight_version", {"new_version": "1"})
    sync_of(fleet).push(served.params, 1)
    assert server.call("/model_info")["model_path"] == f"{tmp_path}/out/version-00000001"


def test_no_server_is_left(fleet_of, sync_of, served):
    fleet, servers = fleet_of()
    for server in servers:
        server.script(faults=[{"path": UPDATE, "kind": "status", "times": -1}])
    sync = sync_of(fleet, recovery=0.5)
    with pytest.raises(UserError, match=r"new weights: .*no server .*HTTP 500"):
        sync.push(served.params, 1)
    for server in servers:
        server.script(faults=[])
    until(lambda: all(server.works for server in fleet.servers()))
    assert {server.seen()["paused"] for server in servers} == {""}


def test_one_that_is_back_in_time_is_enough(fleet_of, sync_of, served):
    fleet, (server,) = fleet_of(1)
    server.script(faults=[{"path": UPDATE, "kind": "status", "times": 2}])
    metrics = sync_of(fleet).push(served.params, 1)
    assert metrics["sync/servers_updated"] == 0
    assert server.call("/model_info")["weight_version"] == "1"
