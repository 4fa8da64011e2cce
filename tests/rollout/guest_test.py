"""Two processes with the same servers: the first changes their weights, the other is a guest."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from tests.pretend import Processes
from tests.rollout.syncing import UPDATE, until
from vtriune_jax.errors import UserError
from vtriune_jax.hosts import Share
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.probe import Expected, Finding
from vtriune_jax.rollout.sync import WeightSync

GENERATE = {
    "input_ids": [20, 21],
    "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
    "return_logprob": True,
}


class Folder:
    """A publisher whose versions are all the checkpoint that the servers have started with."""

    def __init__(self, folder):
        self.folder = folder.parent
        self._published = SimpleNamespace(
            folder=folder, seconds=1.0, gather_seconds=0.0, write_seconds=1.0, bytes=1
        )

    def publish(self, params, version):
        return self._published

    def collect(self, in_use):
        self.in_use = in_use


class Two:
    """Each with a fleet of the same servers and a sync."""

    def __init__(self, servers, folder, monkeypatch, **changes):
        self.processes = Processes(2, monkeypatch)
        quick = {"patience": 0.3, "health_timeout": 2.0, "backoff": 0.05}
        addresses = [server.address for server in servers]
        self.fleets = [Fleet(addresses, share=Share(i, 2), **quick) for i in range(2)]
        self.syncs = [
            WeightSync(fleet, Folder(folder), mark="-run", **changes) for fleet in self.fleets
        ]
        for fleet in self.fleets:
            until(lambda fleet=fleet: all(server.works for server in fleet.servers()))

    def push(self, version):
        return self.processes.run(lambda index: self.syncs[index].push(None, version))

    def states(self, address):
        return [
            server
            for fleet in self.fleets
            for server in fleet.servers()
            if server.address == address
        ]


@pytest.fixture
def two(start, served, monkeypatch):
    made = []

    def make(count=2, flags=None, **changes):
        servers = [start(**(flags or {})) for _ in range(count)]
        made.append(Two(servers, served.folder, monkeypatch, **changes))
        return made[-1], servers

    yield make
    for each in made:
        for fleet in each.fleets:
            fleet.close()


def test_one_gives_the_weights_and_both_know_it(two):
    pair, servers = two(flags={"capacity": 10})
    for version in (1, 2):
        metrics, others = pair.push(version)
        assert metrics["sync/servers_updated"] == others["sync/servers_updated"] == 2
        for server in servers:
            assert server.call("/model_info")["weight_version"] == f"{version}-run"
            assert server.seen()["counts"][UPDATE] == version
            assert all(each.works for each in pair.states(server.address))
            assert {s.version for s in pair.states(server.address)} == {f"{version}-run"}
            assert {s.capacity for s in pair.states(server.address)} == {5}
    assert [fleet.lag("1-run") for fleet in pair.fleets] == [1, 1]
    assert [sync._publisher.in_use for sync in pair.syncs] == [{2}, {2}]


def test_what_a_guest_has_asked_for_goes_on_with_the_new_weights(two):
    pair, (server,) = two(1, {"token_seconds": 0.01})
    pair.push(1)
    guest = pair.fleets[1]
    answer = guest.run(guest.post(guest.servers()[0], "/generate", GENERATE, admin=False))
    until(lambda: server.seen()["tokens"] > 20)
    pair.push(2)
    assert not answer.done()
    meta = answer.result(60)["meta_info"]
    assert [span["version"] for span in meta["weight_versions"]] == ["1-run", "2-run"]
    assert guest.quarantines == 0


def test_a_guest_sends_nothing_while_a_server_is_given_them(two):
    pair, (server,) = two(1)
    pair.push(1)
    server.script(faults=[{"path": UPDATE, "kind": "slow", "seconds": 0.5}])
    push = threading.Thread(target=pair.push, args=[2])
    push.start()
    until(lambda: server.seen()["paused"])
    guest = pair.states(server.address)[1]
    assert not guest.works
    push.join()
    assert guest.works


def test_a_guest_sends_nothing_to_a_server_that_has_not_got_them(two):
    pair, (good, bad) = two()
    pair.push(1)
    bad.script(faults=[{"path": UPDATE, "kind": "status", "times": -1}])
    metrics, _ = pair.push(2)
    assert (metrics["sync/servers_updated"], metrics["sync/servers_quarantined"]) == (1, 1)
    assert all(server.works for server in pair.states(good.address))
    assert not any(server.works for server in pair.states(bad.address))
    bad.script(faults=[])
    until(lambda: all(server.works for server in pair.states(bad.address)))
    assert {server.version for server in pair.states(bad.address)} == {"2-run"}


def test_a_server_that_only_the_guest_works_with_dies_and_comes_back(two):
    """The first process looks after it all the same, and the guest waits for that."""
    pair, (server,) = two(1, {"process": True})
    pair.push(1)
    server.kill()
    server.start()
    assert server.call("/model_info")["weight_version"] == "default"
    guest = pair.fleets[1]
    guest.run(_fail(guest)).result()
    until(lambda: all(each.works for each in pair.states(server.address)))
    assert server.call("/model_info")["weight_version"] == "1-run"
    assert pair.states(server.address)[1].version == "1-run"
    assert server.seen()["counts"][UPDATE] == 1


async def _fail(fleet):
    fleet.quarantine(fleet.servers()[0], "dropped the connection")


def test_a_guest_lets_a_paused_server_be(two):
    pair, (server,) = two(1)
    pair.push(1)
    before = server.seen()["counts"]["/continue_generation"]
    server.call("/pause_generation", {"mode": "in_place"})
    pair.fleets[0].close()  # nobody looks after it
    guest = pair.fleets[1]
    guest.run(_fail(guest)).result()
    until(lambda: "503" in guest.servers()[0].reason)
    assert server.seen()["counts"]["/continue_generation"] == before
    server.call("/continue_generation", {})
    until(lambda: guest.servers()[0].works)


class Probe:
    """Finds a server off when it is told to."""

    off = False

    def expect(self, params, version, before):
        return Expected(version, (np.zeros(1),))

    async def ask(self, fleet, server, expected):
        return Finding(server, expected, (np.ones(1),))

    def is_off(self, finding):
        return self.off

    def metrics(self, findings):
        return {}

    def report(self, finding):
        return "it has another model"


def test_what_the_first_finds_ends_both(two):
    probe = Probe()
    pair, _ = two(1, probe=probe)
    pair.push(1)
    probe.off = True
    with pytest.raises(UserError, match="it has another model"):
        pair.push(2)


def test_a_guest_probes_a_server_that_comes_back(two):
    probes = [Probe(), Probe()]
    pair, _ = two(1)
    for sync, probe in zip(pair.syncs, probes, strict=True):
        sync._probe = probe
    pair.push(1)
    guest = pair.fleets[1]
    pair.syncs[1]._given.clear()
    probes[1].off = True
    guest.run(_fail(guest)).result()
    until(lambda: "it has another model" in guest.servers()[0].reason)
    probes[1].off = False
    until(lambda: guest.servers()[0].works)


def test_no_server_is_left(two):
    pair, (server,) = two(1, {"process": True}, recovery=0.5)
    pair.push(1)
    server.kill()
    with pytest.raises(UserError, match="no rollout server could be given the new weights"):
        pair.push(2)
