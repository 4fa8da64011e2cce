"""The probe tells servers that have the trainer's model from those that do not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.conftest import make_sample, png
from tests.rollout.syncing import UPDATE, moved, publisher_of, until
from vtriune_jax import sharding
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.errors import UserError
from vtriune_jax.probing import choose, completion_logps
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.probe import Probe
from vtriune_jax.rollout.sync import WeightSync


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


@pytest.mark.sglang
def test_a_real_server_has_the_trainers_model(real_server, served, probe, tmp_path):
    with Fleet(list(real_server.addresses)) as fleet:
        fleet.wait_ready(60)
        sync = WeightSync(fleet, publisher_of(served, tmp_path), probe=probe)
        for version, by in enumerate((0.1, 0.05, 0.0)):  # the last are its own
            metrics = sync.push(moved(served.params, by), version)
            assert metrics["sync/servers_updated"] == 1
            assert 0 < metrics["sync/logp_gap"] < 1e-4
            assert metrics["sync/logp_gap_max"] < 1e-3  # of tokens that are most unlikely


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
