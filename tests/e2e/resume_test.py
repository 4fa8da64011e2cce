"""A run that is killed again and again ends as the one that was left alone."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.runs import arguments, command, environment, records, summary, timeless
from vtriune_jax.main import main

STEPS = {"sft_steps": 6, "grpo_steps": 8, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {"model_path": warm / "final", **STEPS, **data}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """The workdir of the run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


def start(workdir: Path, keys: dict) -> subprocess.Popen:
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    return subprocess.Popen(command(workdir, **keys), env=environment(), **quiet)


def kill_when(process: subprocess.Popen, ready: Callable[[], bool], wait: float = 0.0) -> None:
    """SIGKILL, `wait` seconds after `ready` began to hold."""
    while not ready():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.0005)
    time.sleep(wait)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def steps_done(workdir: Path) -> int:
    """By this run and by those before it that were killed, so some of them counted again."""
    path = workdir / "progress.log"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_saved(folder: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return [path for path in folder.glob("*") if not path.name.isdigit()]


@pytest.fixture(scope="module")
def killed(keys, tmp_path_factory):
    """The workdir of a run that was killed while it imitated, in a save, and in a step of GRPO."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    stage = workdir / "checkpoints" / "grpo"
    kill_when(start(workdir, keys), lambda: steps_done(workdir) == 3, random.uniform(0, 0.1))
    assert not stage.exists()

    for _ in range(3):  # the save may be complete before the kill arrives
        kill_when(start(workdir, keys), lambda: bool(half_saved(stage)))
        if half_saved(stage):
            break
    assert half_saved(stage)
    before = (workdir / "heldout_before.json").stat().st_mtime_ns

    done = steps_done(workdir)
    kill_when(start(workdir, keys), lambda: steps_done(workdir) == done + 3, random.uniform(0, 0.1))
    assert not (workdir / "summary.json").exists()
    assert start(workdir, keys).wait() == 0
    assert (workdir / "heldout_before.json").stat().st_mtime_ns == before
    return workdir


def assert_same(workdir: Path, whole: Path) -> None:
    """Bit for bit, as far as both runs do the same."""
    for got, want in zip(records(workdir), records(whole), strict=True):
        assert timeless(got) == timeless(want)
    got, want = (path / "final" / "model.safetensors" for path in (workdir, whole))
    assert got.read_bytes() == want.read_bytes()
    got, want = summary(workdir), summary(whole)
    for key in ("before", "after", "steps", "devices"):
        assert got[key] == want[key]


def test_all_is_as_if_it_had_not_been_killed(whole, killed):
    assert [line["step"] for line in records(whole)] == list(range(14))
    assert_same(killed, whole)


def test_the_command_of_a_finished_run_only_tells_its_end_again(whole, keys):
    before = (whole / "metrics.jsonl").read_bytes()
    assert main(arguments(whole, **keys)) == 0
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_end(whole, keys, tmp_path_factory):
    """What is learnt does not depend on where the run was first meant to end."""
    workdir = tmp_path_factory.mktemp("longer") / "run"
    assert main(arguments(workdir, **{**keys, "sft_steps": 3}, stages="sft")) == 0
    assert main(arguments(workdir, **{**keys, "sft_steps": 6}, stages="sft")) == 0
    for got, want in zip(records(workdir), records(whole)[:6], strict=True):
        assert timeless(got) == timeless(want)


@pytest.mark.slow
def test_killed_at_any_moment(whole, keys, tmp_path):
    """Two minutes of kills, from the import of JAX to the last line of the report."""
    began = time.monotonic()
    assert start(tmp_path / "first", keys).wait() == 0
    longest = time.monotonic() - began
    finished, kills = 0, 0
    while kills < 20:
        workdir = tmp_path / f"run{finished}"
        process = start(workdir, keys)
        try:
            code = process.wait(timeout=random.uniform(0.3, 1) * longest)
            assert code == 0
            assert_same(workdir, whole)
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            assert process.wait() == -signal.SIGKILL
            kills += 1
    assert start(workdir, keys).wait() == 0
    assert_same(workdir, whole)
