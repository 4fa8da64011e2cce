"""Runs on two real servers that are killed, hang, get slow or answer wrongly (marker `sglang`).

The run goes on, and every prompt is trained exactly once: those that an undisturbed run with the
sampler in this process trains, step by step, in the same order, with as many whole completions.
"""

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest

from tests.e2e.runs import arguments, records
from tests.e2e.several import finish
from tests.rollout import real_sglang
from tests.rollout.garbler import garbler
from vtriune_jax import served, train
from vtriune_jax.main import main
from vtriune_jax.rollout import fleet as rollout_fleet
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.sglang import key
from vtriune_jax.rollout.sync import WeightSync
from vtriune_jax.rollout.trouble import ADMIN_KEY, KEY

pytestmark = pytest.mark.sglang

STEPS, SAMPLES, DEADLINE = 4, 4, 150.0
UPDATE = "/update_weights_from_disk"
SYNC = {"deadline": 15.0, "recovery": 10.0}


@pytest.fixture(scope="module")
def real(warm, tmp_path_factory):
    """Two servers that are started again when they die, and want keys."""
    folder = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "one word")
        patch.setenv(ADMIN_KEY, "another word")
        with real_sglang.serve(warm / "final", folder, 2, "--restart") as fleet:
            yield fleet


class Run:
    """A run of a few steps, in this process, and what it has trained on."""

    def __init__(self, monkeypatch, keys, real):
        self.real, self.keys = real, keys
        self.trained: list[list] = []
        """Step → groups."""
        self.before = {}
        """Step → what is called when its completions are there, before it is trained on them."""
        self.fleet: Fleet | None = None
        packed = train.packed

        def watched(stage, got, *more):
            self.before.get(len(self.trained), lambda: None)()
            self.trained.append(got.groups)
            return packed(stage, got, *more)

        def impatient(addresses, **settings):
            self.fleet = Fleet(addresses, patience=4.0, health_timeout=8.0, **settings)
            return self.fleet

        monkeypatch.setattr(train, "packed", watched)
        monkeypatch.setattr(served, "Fleet", impatient)
        monkeypatch.setattr(served, "WeightSync", functools.partial(WeightSync, **SYNC))

    def go(self, workdir, **keys):
        """The records of a run that comes to its end."""
        began = time.monotonic()
        assert main(arguments(workdir, **self.keys | keys)) == 0
        assert time.monotonic() - began < 2 * DEADLINE
        return records(workdir)

    def samples(self):
        """Step → the samples, in order."""
        return [[key(group.prompt) for group in groups] for groups in self.trained]

    def server(self, k):
        """The k-th server of the fleet, if it is in the list just now."""
        known = {server.address: server for server in self.fleet.servers()} if self.fleet else {}
        return known.get(self.real.addresses[k])

    def signal(self, k, number):
        """To the processes of the k-th server."""
        os.killpg(self.real.pid(k), number)

    def when_it_draws(self, k, do):
        """Calls `do` in the background as soon as the k-th server has drawn a little."""

        def wait():
            until(lambda: (one := self.server(k)) and one.in_flight and self.fleet.version)
            time.sleep(0.05)
            do()

        return background(wait)

    def wait_for_return(self, k):
        """Until the k-th server is there again and has the newest weights."""
        until(lambda: (one := self.server(k)) and one.works)
        assert self.server(k).version == self.fleet.version


@contextlib.contextmanager
def background(work):
    """A thread that has come to its end, without an error, when the block ends."""
    failed = []

    def guarded():
        try:
            work()
        except AssertionError as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    assert not failed


def until(true, seconds=300.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def keys(warm, data):
    return {
        "stages": "grpo",
        "model_path": warm / "final",
        "grpo_steps": STEPS,
        "grpo_samples": SAMPLES,
        "grpo_tis_cap": 2.0,
        "eval_rows_per_source": 0,
        "checkpoint_every": 100,
        **data,
    }


@pytest.fixture(scope="module")
def expected(keys, tmp_path_factory):
    """Step → the samples that a run without servers trains on."""
    with pytest.MonkeyPatch.context() as patch:
        run = Run(patch, keys, None)
        run.go(tmp_path_factory.mktemp("local") / "run")
    return run.samples()


@pytest.fixture
def run(monkeypatch, keys, real):
    """On the two servers, of which both are well at first."""
    served_keys = {
        "rollout_engine": "sglang",
        "rollout_addresses": real.folder / "addresses",
        "rollout_weights_dtype": "float32",
        "rollout_probe_gap": 1e-3,
        "rollout_deadline_seconds": DEADLINE,
    }
    until(lambda: len((real.folder / "addresses").read_text().split()) == 2)
    return Run(monkeypatch, keys | served_keys, real)


def check(run, lines, expected):
    """Nothing was lost or trained twice, and every completion is a whole one."""
    assert run.samples() == expected
    assert [line["step"] for line in lines] == list(range(STEPS))
    for groups, line in zip(run.trained, lines, strict=True):
        assert np.isfinite(line["loss"])
        for group in groups:
            assert len(group.completions) == SAMPLES
            for drawn in group.completions:
                assert drawn.finish in ("stop", "length")
                assert len(drawn.ids) == len(drawn.logps) == drawn.versions[-1][2] > 0
    assert lines[-1]["rollout/pending_prompts"] == 0


def test_without_a_key(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(ADMIN_KEY)
    assert main(arguments(tmp_path / "run", **run.keys)) == 2
    assert "wants a key" in capsys.readouterr().err


def test_undisturbed(run, expected, tmp_path):
    lines = run.go(tmp_path / "run")
    check(run, lines, expected)
    for line in lines:
        assert line["rollout_gap"] < 1e-4
        assert line["sync/servers_updated"] == 2
        assert line["rollout/retries"] == line["rollout/quarantines"] == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_killed_while_it_draws_and_started_again(run, expected, tmp_path, ahead):
    run.before[1] = lambda: run.wait_for_return(0)  # in time to draw the last step's completions
    with run.when_it_draws(0, lambda: run.signal(0, signal.SIGKILL)):
        lines = run.go(tmp_path / "run", rollout_ahead=ahead)
    check(run, lines, expected)
    assert lines[0]["rollout/retries"] > 0
    assert lines[-1]["sync/servers_updated"] == 2
    assert run.server(0).tokens > 0  # of the new process: the list had forgotten the old one


@pytest.mark.parametrize("then", ["killed", "stopped"])
def test_lost_during_a_sync_and_back_again(run, expected, tmp_path, monkeypatch, then):
    """In the midst of loading the weights of the second update."""
    post, hit = Fleet.post, []

    async def posted(fleet, server, path, body=None, **more):
        asked = asyncio.ensure_future(post(fleet, server, path, body, **more))
        chosen = server.address == run.real.addresses[0]
        if path == UPDATE and chosen and body["weight_version"] == "2" and not hit:
            hit.append(server)
            await asyncio.sleep(0.005)
            run.signal(0, signal.SIGKILL if then == "killed" else signal.SIGSTOP)
        return await asked

    def back():
        if then == "stopped":
            assert not run.server(0).works
            run.signal(0, signal.SIGCONT)
        run.wait_for_return(0)

    monkeypatch.setattr(Fleet, "post", posted)
    run.before[2] = back
    lines = run.go(tmp_path / "run")
    check(run, lines, expected)
    assert hit
    quarantined = [line["sync/servers_quarantined"] for line in lines]
    assert quarantined[1] == 1 or lines[1]["sync/servers_updated"] == 2  # it was quick
    assert lines[-1]["sync/servers_updated"] == 2


def test_stopped_while_it_draws_and_going_on(run, expected, tmp_path):
    def back():
        assert not run.server(0).works
        run.signal(0, signal.SIGCONT)
        run.wait_for_return(0)

    run.before[1] = back
    with run.when_it_draws(0, lambda: run.signal(0, signal.SIGSTOP)):
        lines = run.go(tmp_path / "run")
    check(run, lines, expected)
    assert lines[0]["rollout/quarantines"] == 1
    assert lines[-1]["sync/servers_updated"] == 2


def test_a_slow_one_does_less(run, expected, tmp_path, monkeypatch):
    """One server stands still nine tenths of the time; it is not taken for a sick one."""
    over = threading.Event()
    one_prompt = SAMPLES
    monkeypatch.setattr(rollout_fleet, "capacity_of", lambda *_: one_prompt)

    def brake():
        until(lambda: run.fleet and run.fleet.version)
        while not over.is_set():
            run.signal(0, signal.SIGSTOP)
            over.wait(0.45)
            run.signal(0, signal.SIGCONT)
            over.wait(0.05)

    with background(brake):
        try:
            lines = run.go(tmp_path / "run")
        finally:
            over.set()
    check(run, lines, expected)
    assert lines[-1]["rollout/quarantines"] == 0
    assert 0 < run.server(0).tokens < run.server(1).tokens


def test_stragglers_of_a_slow_one_are_left_to_later_steps(run, expected, tmp_path):
    """With over-sampling: no prompt twice, and those that are not trained are in the checkpoint."""
    run.before[1] = lambda: run.signal(0, signal.SIGCONT)
    more = {"rollout_over_sampling": 0.5, "rollout_carry": 2, "rollout_ahead": 1}
    with run.when_it_draws(0, lambda: run.signal(0, signal.SIGSTOP)):
        lines = run.go(tmp_path / "run", **more)
    trained = Counter(sample for step in run.samples() for sample in step)
    assert sum(trained.values()) == STEPS * 8
    assert max(trained.values()) == 1
    first = Counter(sample for step in expected for sample in step)
    assert (trained & first).total() > STEPS * 4
    assert lines[-1]["rollout/aborted"] > 0


WRONG = ["no JSON", "no log-prob", "other ids", "wrong prompt", "cut off", "error", "old weights"]


def test_wrong_answers_are_asked_again(run, expected, tmp_path):
    """Every second request gets one, whichever server it goes to, until each kind has come."""
    faults = [fault for kind in WRONG for fault in ("", kind)]
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(garbler(each, faults)) for each in run.real.addresses]
        lines = run.go(tmp_path / "run", rollout_addresses=tuple(proxies), rollout_probe_prompts=0)
    check(run, lines, expected)
    assert faults == []
    assert lines[-1]["rollout/retries"] >= len(WRONG)
    assert all(line["rollout_gap"] < 1e-4 for line in lines)


def test_a_server_of_another_model_ends_the_run(run, tmp_path, capsys):
    """Answers that are right in form: only the probe can tell."""
    one, other = run.real.addresses
    with garbler(one, ["other log-probs"] * 1000) as address:
        keys = run.keys | {"rollout_addresses": (address, other)}
        assert main(arguments(tmp_path / "run", **keys)) == 2
    said = capsys.readouterr().err
    assert f"{address} does not have the trainer's model" in said
    assert "off by 0.5000 in the mean" in said


def test_two_trainer_processes_share_the_servers(run, tmp_path):
    keys = run.keys | {"grpo_steps": 2}
    finish(2, tmp_path / "run", keys)
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["rollout_gap"] < 1e-4
        assert line["sync/servers_updated"] == line["rollout/servers_ready"] == 2
        assert line["grad_norm"] > 0
        assert line["rollout/pending_prompts"] == 0
