import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from vtriune_jax import config as configs
from vtriune_jax.errors import UserError
from vtriune_jax.workdir import begun, held, record, settle

BASE = "configs/base.py"


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "runs" / "a"


def load(*overrides):
    return configs.load(BASE, overrides)


def noted(workdir) -> dict:
    return json.loads((workdir / "config.json").read_text())


def fails(config, workdir) -> str:
    with pytest.raises(UserError) as caught:
        settle(config, workdir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_that_has_begun_keeps_its_settings(workdir):
    settle(load(), workdir)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    (workdir / "metrics.jsonl").write_text('{"step": 0}\n')
    settle(load(("grpo.steps", "9"), ("log.seconds", "3")), workdir)
    message = fails(load(("grpo.lr", "2e-6"), ("grpo.steps", "9")), workdir)
    assert "grpo.lr 1e-06 → 2e-06" in message
    assert "new --workdir" in message
    assert noted(workdir)["grpo"] == json.loads(json.dumps(load().grpo.to_dict()))
    record(load(("grpo.steps", "9")), workdir)
    assert noted(workdir)["grpo"]["steps"] == 9


@pytest.mark.parametrize("trace", ["checkpoints/sft/2", "checkpoints/grpo/unreadable-3-1"])
def test_a_checkpoint_is_a_beginning_and_a_draft_of_one_is_none(trace, workdir):
    settle(load(), workdir)
    (workdir / "checkpoints" / "sft" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    (workdir / "metrics.jsonl").touch()
    assert not begun(workdir)
    (workdir / trace).mkdir(parents=True)
    assert begun(workdir)
    assert "seed 0 → 1" in fails(load(("seed", "1")), workdir)


def test_before_anything_was_trained_other_settings_take_over(workdir):
    """And what was made by the old ones goes: rewards before, and a tiny model of another seed."""
    settle(load(), workdir)
    (workdir / "model").mkdir()
    (workdir / "heldout_before.json").write_text("{}")
    settle(load(("log.seconds", "3")), workdir)
    assert (workdir / "heldout_before.json").exists()
    settle(load(("grpo.lr", "2e-6")), workdir)
    assert noted(workdir)["grpo"]["lr"] == 2e-6
    assert [path.name for path in workdir.iterdir() if path.name != "config.json"] == ["model"]
    settle(load(("grpo.lr", "2e-6"), ("seed", "1")), workdir)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    (workdir / "model").mkdir()
    settle(load(("model.path", str(workdir / "model"))), workdir)
    settle(load(("model.path", str(workdir / "model")), ("seed", "2")), workdir)
    assert (workdir / "model").exists()


def test_fewer_steps_than_were_trained(workdir):
    settle(load(), workdir)
    for step in (9, 30):
        (workdir / "checkpoints" / "grpo" / str(step)).mkdir(parents=True)
    message = fails(load(("grpo.steps", "20")), workdir)
    assert message.startswith(f"grpo.steps=20, but the run in {workdir} has trained 30 steps")
    settle(load(("grpo.steps", "30")), workdir)


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"hidden_size": 8}', "is not of a run"), ("[]", "is not of a run"), ("{", "is not JSON")],
)
def test_what_is_no_run_is_not_touched(text, expected, workdir):
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(text)
    assert expected in fails(load(), workdir)
    assert (workdir / "config.json").read_text() == text


def test_it_is_noted_where_a_run_was_started_and_it_may_go_on_elsewhere(tmp_path, monkeypatch):
    config, file = load(), tmp_path / "run" / "config.json"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        settle(config, file.parent)
        content = noted(file.parent)
        assert content.pop("started_in") == str(tmp_path / name)
    file.write_text(json.dumps(content))  # as it was before there was such a note
    (file.parent / "metrics.jsonl").write_text("{}\n")
    settle(config, file.parent)


def test_a_folder_is_of_one_process_until_that_ends(workdir):
    script = (
        "import sys; from pathlib import Path; from vtriune_jax.workdir import held\n"
        "with held(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(workdir)],
        cwd=configs.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "has it\n"
        expected = rf"{re.escape(str(workdir))} is in use by process {other.pid} on \S+; wait for"
        for _ in range(2):
            with pytest.raises(UserError, match=expected), held(workdir):
                pass
        other.kill()
    assert other.returncode == -signal.SIGKILL
    with held(workdir):
        assert f"process {os.getpid()} on" in (workdir / ".lock").read_text()


def test_a_file_system_without_locks_keeps_nobody_out(workdir, monkeypatch):
    codes = [errno.ENOLCK, errno.ENOTSUP, errno.EIO]

    def flock(*_):
        code = codes.pop(0)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(workdir), held(workdir):
        pass
    with pytest.raises(UserError, match=r"cannot be written: .*; choose"), held(workdir):
        pass
