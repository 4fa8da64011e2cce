"""Weights to a fleet: every server has them or gets no work; the probe tells right from wrong."""

import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.conftest import make_sample, png
from tests.rollout.fake_sglang import FakeServer
from vtriune_jax import sharding
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.export import PROCESSOR_FILES
from vtriune_jax.models import weights
from vtriune_jax.probing import choose, completion_logps
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.probe import Probe
from vtriune_jax.rollout.publish import Publisher
from vtriune_jax.rollout.sync import WeightSync

PAUSE, UPDATE, CONTINUE = (
    "/pause_generation",
    "/update_weights_from_disk",
    "/continue_generation",
)


@pytest.fixture
def served(served_versions):
    return served_versions[0]


@pytest.fixture
def start(served):
    """Starts fake servers of the first version, and ends them."""
    running = []

    def one(**flags):
        server = FakeServer(model_path=served.folder, **flags)
        running.append(server)
        server.start()
        return server

    yield one
    for server in running:
        server.kill()


@pytest.fixture
def fleet_of(start):
    """A fleet of so many servers, all ready."""
    fleets = []

    def make(count=2, servers=None, **flags):
        servers = servers or [start(**flags) for _ in range(count)]
        fleet = Fleet([server.address for server in servers], backoff=0.05, health_timeout=2.0)
        fleets.append(fleet)
        until(lambda: all(server.works for server in fleet.servers()))
        return fleet, servers

    yield make
    for fleet in fleets:
        fleet.close()


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def publisher_of(served, folder, **changes):
    extras = [served.folder / name for name in PROCESSOR_FILES]
    return Publisher(
        folder,
        served.config,
        reference=served.folder,
        dtype="float32",
        extras=[file for file in extras if file.exists()],
        **changes,
    )


@pytest.fixture
def sync_of(served, tmp_path):
    def make(fleet, **changes):
        return WeightSync(fleet, publisher_of(served, tmp_path / "out"), **changes)

    return make


def moved(params, by, only=""):
    flat = weights.flatten(params)
    return weights.unflatten(
        {
            path: leaf * (1 + by) if path.startswith(only) and leaf.ndim > 1 else leaf
            for path, leaf in flat.items()
        }
    )


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
    assert {server.seen()["paused"] for server in servers} == {""}
    for server in servers:
        server.script(faults=[])
    until(lambda: all(server.works for server in fleet.servers()))


def test_one_that_is_back_in_time_is_enough(fleet_of, sync_of, served):
    fleet, (server,) = fleet_of(1)
    server.script(faults=[{"path": UPDATE, "kind": "status", "times": 2}])
    metrics = sync_of(fleet).push(served.params, 1)
    assert metrics["sync/servers_updated"] == 0
    assert server.call("/model_info")["weight_version"] == "1"


# ------------------------------------------------------------------------------------------ probe


@pytest.fixture(scope="module")
def prompter(served_versions):
    first = served_versions[0]
    return Prompter(load_processor(first.folder), first.config, cot=False)


SAMPLES = [
    make_sample("How many?", [], id="text"),
    make_sample("<image>How many?", [png(101, 75, seed=1)], id="one"),
    make_sample("Is <image> as <image>?", [png(56, 56, seed=2), png(140, 56)], id="two"),
    make_sample("And now?", [], id="more text"),
]


@pytest.fixture(scope="module")
def probe(served_versions, prompter):
    first = served_versions[0]
    groups = choose(SAMPLES, prompter, 4)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Probe(
        groups,
        completion_logps(first.graphdef, groups, prompter.pad_id, mesh),
        image_id=first.config.image_token_id,
        pictures=prompter.pictures,
        limit=1e-3,
    )


@pytest.fixture
def real_fleet(start, fleet_of):
    """Servers with the model itself behind them."""

    def make(count=1, **flags):
        return fleet_of(count, responder="checkpoint", **flags)

    return make


def test_the_probe_finds_nothing_where_all_is_right(real_fleet, sync_of, served, probe):
    fleet, servers = real_fleet(2, no_vision_cache=True)
    sync = sync_of(fleet, probe=probe)
    for version, params in enumerate((served.params, moved(served.params, 0.02))):
        metrics = sync.push(params, version)
        assert 0 < metrics["sync/logp_gap"] < metrics["sync/logp_gap_max"] < 1e-4
        for server in servers:
            name = server.address.removeprefix("http://")
            assert 0 < metrics[f"sync/logp_gap/{name}"] < metrics[f"sync/logp_gap_max/{name}"]
        assert metrics["sync/probe_seconds"] > 0


def test_the_probe_finds_old_image_features(real_fleet, sync_of, served, probe):
    """SGLang keeps the features of images that it has seen, whatever becomes of the tower."""
    fleet, (server,) = real_fleet()
    sync = sync_of(fleet, probe=probe)
    sync.push(served.params, 1)
    sync.push(moved(served.params, 0.02, only="language/"), 2)  # a frozen tower is safe
    with pytest.raises(UserError, match="SGLANG_VLM_CACHE_SIZE_MB=0") as error:
        sync.push(moved(served.params, 0.1, only="visual/"), 3)
    text = str(error.value)
    for part in (server.address, "version 3", "(image)", "text 0.000", "token 0 (id "):
        assert part in text


def test_the_probe_finds_old_weights(real_fleet, served, probe, tmp_path):
    fleet, _ = real_fleet(no_vision_cache=True)
    publisher = publisher_of(served, tmp_path / "out")
    sync = WeightSync(fleet, publisher, server_dir=str(tmp_path / "mirror"), probe=probe)
    first = publisher.publish(served.params, 1).folder
    for version in (1, 2):  # a mirror that does not follow
        shutil.copytree(first, tmp_path / "mirror" / f"version-{version:08d}")
    sync.push(served.params, 1)
    with pytest.raises(UserError, match="likely: it still has version 1"):
        sync.push(moved(served.params, 0.05), 2)


def test_the_probe_finds_another_dtype(real_fleet, sync_of, served, probe, monkeypatch):
    """Weights that were rounded on their way."""
    fleet, _ = real_fleet(no_vision_cache=True)
    expect = probe.expect
    monkeypatch.setattr(probe, "expect", lambda _, *rest: expect(served.params, *rest))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), served.params)
    with pytest.raises(UserError, match="likely: another dtype"):
        sync_of(fleet, probe=probe).push(rounded, 1)


def test_a_server_that_returns_wrong_gets_no_work(real_fleet, sync_of, served, probe):
    fleet, (server,) = real_fleet()
    sync = sync_of(fleet, probe=probe, recovery=0.1)
    sync.push(served.params, 1)
    server.script(faults=[{"path": UPDATE, "kind": "status"}])
    with pytest.raises(UserError, match="no rollout server could be given the new weights"):
        sync.push(moved(served.params, 0.1, only="visual/"), 2)
    (server,) = fleet.servers()
    asked = server.rests
    until(lambda: server.rests > asked + 2)
    assert not server.works
    assert "SGLANG_VLM_CACHE_SIZE_MB=0" in server.reason


@pytest.mark.parametrize("fault", ["status", "drop", "json"])
def test_a_server_that_does_not_answer_the_probe(fault, real_fleet, sync_of, served, probe):
    fleet, (server,) = real_fleet()
    sync = sync_of(fleet, probe=probe)
    server.script(faults=[{"path": "/generate", "kind": fault}])
    metrics = sync.push(served.params, 1)
    assert metrics["sync/servers_quarantined"] == 1
    assert "sync/logp_gap" not in metrics
    assert fleet.servers()[0].works  # it came back in time …
    assert server.seen()["counts"]["/generate"] > 4  # … and was asked again


def test_a_server_that_counts_other_tokens(real_fleet, sync_of, served, probe):
    fleet, (server,) = real_fleet()
    server.script(faults=[{"path": "/generate", "kind": "tokens", "times": -1}])
    with pytest.raises(UserError, match="resizes images otherwise"):
        sync_of(fleet, probe=probe, recovery=0.5).push(served.params, 1)


def test_a_gap_that_is_no_number_is_too_wide(real_fleet, sync_of, served, probe):
    fleet, _ = real_fleet()
    (server,) = fleet.servers()
    sync = sync_of(fleet, probe=probe)
    sync.push(served.params, 1)
    expected = sync._target.expected
    finding = fleet.run(probe.ask(fleet, server, expected)).result()
    assert not probe.is_off(finding)
    finding.logps[0][0] = np.nan
    assert probe.is_off(finding)
    assert "nan" in probe.report(finding)


def test_the_probe_needs_tokens(probe):
    with pytest.raises(UserError, match="no tokens"):
        Probe([], probe._logps, image_id=0, pictures=lambda _: [], limit=1.0)


def test_half_of_the_prompts_have_images(prompter):
    chosen = [group.prompt.sample.id for group in choose(SAMPLES, prompter, 3)]
    assert chosen == ["one", "two", "text"]
    assert [g.prompt.sample.id for g in choose(SAMPLES[:1] * 3, prompter, 2)] == ["text"] * 2
    assert len(choose(SAMPLES[1:3] * 3, prompter, 5)) == 5
