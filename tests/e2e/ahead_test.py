"""Completions begun a step ahead: a run is reproducible, and the same after a kill."""

import json
import signal
import subprocess
import time

import pytest

from tests.e2e.runs import arguments, assert_near, command, environment, records, timeless
from tests.e2e.several import finish
from vtriune_jax.main import main

KEYS = {
    "stages": "grpo",
    "grpo_steps": 5,
    "grpo_tis_cap": 2.0,
    "checkpoint_every": 2,
    "eval_rows_per_source": 1,
}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {"model_path": warm / "final", **KEYS, **data}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ahead") / "run"
    assert main(arguments(workdir, rollout_ahead=1, **keys)) == 0
    return workdir


def test_the_first_step_is_on_policy_and_the_next_one_a_step_behind(whole, keys, tmp_path):
    assert main(arguments(tmp_path / "run", **{**keys, "grpo_steps": 2})) == 0
    behind, now = records(whole), records(tmp_path / "run")
    assert timeless(behind[0]) == timeless(now[0])
    assert now[1]["rollout_gap"] < 1e-5 < behind[1]["rollout_gap"]


def test_killed_and_gone_on_it_is_the_same(whole, keys, tmp_path):
    """The kill is after a checkpoint with completions that wait, and before the end."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir, rollout_ahead=1, **keys),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    saved = workdir / "checkpoints" / "grpo" / "2" / "waiting"
    while not saved.exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main(arguments(workdir, rollout_ahead=1, **keys)) == 0
    for got, want in zip(records(workdir), records(whole), strict=True):
        assert timeless(got) == timeless(want)
    got, want = (path / "final" / "model.safetensors" for path in (workdir, whole))
    assert got.read_bytes() == want.read_bytes()


@pytest.mark.slow
def test_two_processes_are_like_one(keys, tmp_path):
    """Those of a fleet: `pod_test`."""
    keys = {**keys, "rollout_ahead": 1, "grpo_refill": 1, "grpo_lr": 1e-4, "grpo_steps": 3}
    assert main(arguments(tmp_path / "one", **keys)) == 0
    finish(2, tmp_path / "two", keys)
    assert_near(tmp_path / "two", tmp_path / "one")


def test_the_timeline_has_every_step(whole):
    spans = json.loads((whole / "timeline.json").read_text().rstrip().rstrip(",") + "]")
    for step in range(1, 6):
        names = {s["name"] for s in spans if s.get("args", {}).get("step") == f"grpo {step}"}
        assert names == {"encode", "rollout", "verify", "update"}
