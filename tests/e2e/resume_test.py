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

KEYS = {"sft_steps": 6, "sft_lr": 1e-3, "grpo_steps": 8, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {"model_path": warm / "final", **KEYS, **data}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    """The workdir of the run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


def start(workdir: Path, keys: dict) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, **keys),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process: subprocess.Popen, ready: Callable[[], bool], wait: float = 0.0) -> None:
    """SIGKILL, `wait` seconds after `ready` began to hold."""
    while not ready():
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        time.sleep(0.0005)
    time.sleep(wait)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


def lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_saved(folder: Path) -> list[Path]:
    """Checkpoints that are being written."""
    return [path for path in folder.glob("*") if not path.name.isdigit()]


@pytest.fixture(scope="module")
def killed(keys, tmp_path_factory):
    """The workdir of a run killed in SFT, in mid-step and in mid-save, and the pieces of its way."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    grpo = workdir / "checkpoints" / "grpo"
    moment = random.Random().uniform(0, 0.1)
    kill_when(start(workdir, keys), lambda: lines(workdir) == 3, wait=moment)
    assert (workdir / "checkpoints" / "sft").exists()
    kill_when(start(workdir, keys), lambda: bool(half_saved(grpo)))
    before = (workdir / "heldout_before.json").stat().st_mtime_ns
    torn = half_saved(grpo)
    kill_when(start(workdir, keys), lambda: lines(workdir) == 6 + 5, wait=moment)
    last = start(workdir, keys)
    assert last.wait() == 0, last.communicate()[1]
    last.stderr.close()
    assert (workdir / "heldout_before.json").stat().st_mtime_ns == before
    print("torn", torn)
    return workdir


def test_the_metrics_are_those_of_the_run_without_kills(whole, killed):
    assert len(records(whole)) == 6 + 8
    for got, want in zip(records(killed), records(whole), strict=True):
        assert timeless(got) == timeless(want)


def test_the_model_is_the_same_bit_for_bit(whole, killed):
    got, want = (path / "final" / "model.safetensors" for path in (killed, whole))
    assert got.read_bytes() == want.read_bytes()


def test_the_summary_is_the_same(whole, killed):
    got, want = summary(killed), summary(whole)
    assert (got["before"], got["after"]) == (want["before"], want["after"])
    assert got["steps"] == want["steps"] == 14
