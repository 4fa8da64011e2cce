"""Several processes that train with one fleet: the run of one process, whatever goes wrong."""

import json
import signal
import threading
import time

import numpy as np
import pytest

from tests.e2e.runs import arguments, assert_near, learnt, records
from tests.e2e.several import ended, finish, run_all, started
from tests.rollout.fake_sglang import FakeServer
from vtriune_jax.main import main

KEYS = {
    "stages": "grpo",
    "grpo_steps": 3,
    "grpo_lr": 1e-4,
    "grpo_tis_cap": 2.0,
    "checkpoint_every": 2,
    "eval_rows_per_source": 0,
    "rollout_engine": "sglang",
    "rollout_ahead": 1,
    "rollout_weights_dtype": "float32",
    "rollout_probe_gap": 1e-3,
}
TOGETHER = 8 * 4
"""Completions of a step."""


@pytest.fixture(scope="module")
def start(warm):
    """A server of the checkpoint that the run starts from, which draws the same for whoever asks,
    and lets what is asked for be drawn before it takes new weights."""
    running = []

    def make(settle=0.5, **flags):
        server = FakeServer(
            model_path=warm / "final",
            responder="checkpoint",
            by_prompt=True,
            settle=settle,
            **flags,
        )
        server.start()
        running.append(server)
        return server

    yield make
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def keys(warm, data, start):
    addresses = (start().address, start().address)
    return {"model_path": warm / "final", "rollout_addresses": addresses, **KEYS, **data}


@pytest.fixture(scope="module")
def one(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


@pytest.fixture(scope="module")
def two(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    finish(2, workdir, keys)
    return workdir


def assert_equal(workdir, reference):
    for got, want in zip(records(workdir), records(reference), strict=True):
        assert learnt(got) == learnt(want)
    got, want = (path / "final" / "model.safetensors" for path in (workdir, reference))
    assert got.read_bytes() == want.read_bytes()


def test_two_processes_a_step_ahead_are_like_one(one, two):
    assert_near(two, one)
    lines = records(two)
    assert max(line["grad_norm"] for line in lines) > 0
    assert lines[0]["rollout_gap"] < 1e-4 < lines[1]["rollout_gap"]  # one step behind
    for step, line in enumerate(lines):
        assert line["sync/servers_updated"] == line["rollout/servers_ready"] == 2
        assert line["rollout/completions"] >= TOGETHER * (step + 1)


@pytest.mark.slow
@pytest.mark.parametrize("refill", [0, 1])
def test_two_processes_on_policy_are_like_one(refill, keys, tmp_path):
    keys = {**keys, "rollout_ahead": 0, "grpo_refill": refill, "grpo_steps": 2}
    keys |= {"eval_rows_per_source": 1}
    assert main(arguments(tmp_path / "one", **keys)) == 0
    finish(2, tmp_path / "two", keys)
    assert_near(tmp_path / "two", tmp_path / "one")
    assert all(line["rollout_gap"] < 1e-4 for line in records(tmp_path / "two"))


def kill(count, victim, workdir, keys):
    """kill -9 of one process, as soon as there is a checkpoint with completions that wait."""
    with started(count, arguments(workdir, **keys)) as processes:
        end = time.monotonic() + 240
        while not (workdir / "checkpoints" / "grpo" / "2" / "waiting").exists():
            assert time.monotonic() < end
            assert [process.poll() for process in processes] == [None] * count
            time.sleep(0.001)
        processes[victim].kill()
        results = ended(processes, limit=150)
    assert results[victim][0] == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    return [each for index, each in enumerate(results) if index != victim]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_ends_all_and_the_same_commands_continue(victim, two, keys, tmp_path):
    ((status, _, err),) = kill(2, victim, tmp_path / "run", keys)
    assert status in ((3,) if victim else (3, -signal.SIGABRT))
    assert "another process of this run is gone" in err or "another task died" in err
    finish(2, tmp_path / "run", keys)
    assert_equal(tmp_path / "run", two)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(before, after, one, keys, tmp_path):
    kill(before, 0, tmp_path / "run", keys)
    finish(after, tmp_path / "run", keys)
    assert_near(tmp_path / "run", one)


@pytest.mark.slow
def test_the_only_server_dies_and_comes_back(start, keys, tmp_path):
    """With its first weights: the first process gives it the newest, the others wait for that."""
    server = start(settle=0, token_seconds=0.01, process=True)
    workdir = tmp_path / "run"

    def disturb():
        timelines = [workdir / name for name in ("timeline.json", "timeline1.json")]
        while not all(t.exists() and '"update"' in t.read_text() for t in timelines):
            time.sleep(0.02)
        before = server.seen()["tokens"]
        while server.seen()["tokens"] < before + 50:
            time.sleep(0.01)
        server.kill()
        time.sleep(1.0)
        server.start()

    trouble = threading.Thread(target=disturb)
    trouble.start()
    finish(2, workdir, {**keys, "rollout_addresses": (server.address,)})
    trouble.join()
    lines = records(workdir)
    assert [line["step"] for line in lines] == list(range(3))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["rollout/quarantines"] >= 1
    assert lines[-1]["rollout/retries"] >= 1
    assert server.call("/model_info")["weight_version"].startswith("3-")


@pytest.mark.slow
def test_stragglers_stay_with_their_process_and_none_is_lost(start, keys, tmp_path):
    """A server dies, too; and half-way a single process goes on."""
    servers = [start(settle=0, token_seconds=0.002), start(settle=0, token_seconds=0.006)]
    keys = {**keys, "rollout_addresses": tuple(server.address for server in servers)}
    keys |= {"rollout_over_sampling": 0.25, "rollout_carry": 2, "rollout_ahead": 2}
    workdir = tmp_path / "run"
    for count, steps in ((2, 3), (1, 6)):
        finish(count, workdir, {**keys, "grpo_steps": steps})
        saved = workdir / "checkpoints" / "grpo" / str(steps) / "extra" / "metadata"
        extra = json.loads(saved.read_text())["extra"]
        numbers = [ticket["number"] for ticket in extra["left"]]
        assert len(set(numbers)) == len(numbers) == extra["taken"] - 8 * steps > 0
        assert max(numbers) < extra["taken"]
    assert [line["step"] for line in records(workdir)] == list(range(6))


@pytest.mark.slow
def test_what_goes_wrong_on_one_process_ends_all_with_the_reason(start, keys, tmp_path):
    """In the thread of one process, that is: the other has its completions."""
    server = start(settle=0)
    server.script(faults=[{"kind": "status", "status": 400, "body": "no pictures today"}])
    keys |= {"rollout_addresses": (server.address,)}
    keys |= {"rollout_probe_prompts": 0}
    results = run_all(2, tmp_path / "run", **keys)
    assert [status for status, _, _ in results] == [2, 2]
    for _, _, err in results:
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "cannot be completed" in line
        assert "no pictures today" in line
    assert sum("error: process " in err for _, _, err in results) == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_weights_that_one_process_cannot_write_end_all(victim, keys, tmp_path):
    flags = arguments(tmp_path / "run", **keys)
    with started(2, flags, module="tests.e2e.full_disk", FULL=str(victim)) as processes:
        results = ended(processes)
    assert [status for status, _, _ in results] == [2, 2]
    for _, _, err in results:
        assert "cannot write weights to " in err
        assert "No space left on device" in err
    assert f"error: process {victim}: cannot write" in results[1 - victim][2]
