"""A run of several processes is the run of one, rounding aside, and goes on after a kill."""

import signal
import time

import pytest

from tests.e2e.runs import arguments, assert_near, records, summary, timeless
from tests.e2e.several import LIMIT, ended, finish, started
from vtriune_jax.data import digits
from vtriune_jax.data.schema import to_row
from vtriune_jax.data.sources import write_parquet
from vtriune_jax.main import main

KEYS = {
    "sft_steps": 1,
    "sft_lr": 1e-4,
    "grpo_steps": 2,
    "grpo_lr": 1e-4,
    "grpo_minibatches": 2,
    "grpo_refill": 1,
    "grpo_advantage": "reinforce++_baseline",
    "data_on_bad_row": "skip",
    "checkpoint_every": 1,
    "log_samples": 2,
}

IN_PIECES = {"rollout_pieces": 2, "eval_batch": 7}
"""What one process samples at once, two do in two pieces; they evaluate 8 prompts at a time."""


@pytest.fixture(scope="module")
def keys(warm, data, tmp_path_factory):
    """Of a run that needs all of a step's parts, with a source whose every third row is broken."""
    path = tmp_path_factory.mktemp("bad") / "train_bad.parquet"
    rows = [to_row(sample) for sample in digits.samples("counting", "train", 12)]
    for row in rows[::3]:
        whole = row["images"][0]["bytes"]
        row["images"] = [{"bytes": whole[: len(whole) * 2 // 3], "path": None}]
    write_parquet(rows, path)
    train = (*data["data_train"], (str(path), 1.0))
    return {"model_path": warm / "final", **KEYS, **data, "data_train": train}


@pytest.fixture(scope="module")
def one(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


@pytest.fixture(scope="module")
def two(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    finish(2, workdir, keys | IN_PIECES)
    return workdir


def test_two_processes_are_like_one(one, two):
    assert_near(two, one)
    assert len(summary(two)["devices"]) == 2
    lines = records(one)
    assert lines[0]["skipped_rows"] > 0
    assert max(line["dropped_groups"] for line in lines[1:]) > 0
    assert max(line["grad_norm"] for line in lines[1:]) > 0


def test_one_of_them_writes_and_it_writes_all(one, two):
    """The report's samples too, though the other process has half of them."""
    files = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir()} == files | {"timeline1.json"}
    assert (two / "progress.log").read_text().count("\n") == 3
    pictures = [
        [path.read_bytes() for path in sorted((w / "samples").iterdir())] for w in (one, two)
    ]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_four_processes_are_like_one(one, keys, tmp_path):
    finish(4, tmp_path / "run", keys)
    assert_near(tmp_path / "run", one)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_ends_all_and_the_same_commands_continue(victim, two, keys, tmp_path):
    workdir = tmp_path / "run"
    keys = keys | IN_PIECES
    with started(2, arguments(workdir, **keys)) as processes:
        end = time.monotonic() + LIMIT
        while not (workdir / "checkpoints" / "grpo" / "1").exists():
            assert time.monotonic() < end
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.01)
        processes[victim].kill()
        results = ended(processes, limit=LIMIT / 3)
    assert results[victim][0] == -signal.SIGKILL
    status, _, err = results[1 - victim]
    if victim == 1:
        assert status == 3
        assert "error: another process of this run is gone" in err
    else:  # JAX's own thread may be quicker than ours to notice that the coordinator is gone
        assert status in (3, -signal.SIGABRT)
        assert "another process of this run is gone" in err or "another task died" in err
    assert len(records(workdir)) < 3 or not (workdir / "summary.json").exists()
    finish(2, workdir, keys)
    for got, want in zip(records(workdir), records(two), strict=True):
        assert timeless(got) == timeless(want)
    got, want = (path / "final" / "model.safetensors" for path in (workdir, two))
    assert got.read_bytes() == want.read_bytes()
