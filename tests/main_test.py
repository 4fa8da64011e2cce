import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from vtriune_jax import config as configs
from vtriune_jax.errors import UserError
from vtriune_jax.main import disk_full, main
from vtriune_jax.workdir import held

QUICKSTART = str(configs.REPOSITORY / "configs" / "quickstart.py")


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Stands in for the trainer: `train.result` is what it raises, `train.calls` what it got."""
    double = SimpleNamespace(calls=[], result=None)

    def run(config, workdir):
        double.calls.append((config, workdir))
        if double.result:
            raise double.result

    monkeypatch.setitem(sys.modules, "vtriune_jax.train", SimpleNamespace(run=run))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.values["jax_compilation_cache_dir"]
    yield double
    jax.config.update("jax_compilation_cache_dir", before)


def command(tmp_path, *more: str) -> list[str]:
    return [f"--config={QUICKSTART}", f"--workdir={tmp_path / 'run'}", *more]


def one_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_the_trainer_gets_the_config_and_the_workdir(train, tmp_path):
    assert main(command(tmp_path, "--config.grpo.lr=2e-4", "--config.seed", "3")) == 0
    (config, workdir), *_ = train.calls
    assert (config.grpo.lr, config.seed) == (2e-4, 3)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3


@pytest.mark.parametrize(("cores", "name"), [({3}, "jax-1-cores"), ({2, 5}, "jax-2-cores")])
def test_programs_for_other_cores_stay_elsewhere(cores, name, train, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    assert main(command(tmp_path)) == 0
    assert jax.config.values["jax_compilation_cache_dir"] == str(
        tmp_path / "cache" / "vtriune_jax" / name
    )


def test_the_last_workdir_counts(train, tmp_path):
    assert main(command(tmp_path, f"--workdir={tmp_path / 'mine'}")) == 0
    assert train.calls[0][1] == tmp_path / "mine"


def test_a_run_with_other_settings_is_not_resumed(train, tmp_path, capsys):
    assert main(command(tmp_path)) == 0
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert main(command(tmp_path, "--config.seed=1")) == 2
    assert "seed 0 → 1" in one_line(capsys)
    assert len(train.calls) == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--workdir=x"], "--config=configs/quickstart.py is missing"),
        ([f"--config={QUICKSTART}"], "--workdir=runs/NAME is missing"),
        (["--confg=x"], "Did you mean: config"),
        (["quickstart"], "'quickstart' is not a flag"),
        (
            ["--confg=x", f"--config={QUICKSTART}", "--config.seed=x", "--config.grpo.lr=-1"],
            f"Did you mean: config ? (--help shows them all); besides, {QUICKSTART} has 2 mistakes",
        ),
        (["quickstart", f"--config={QUICKSTART}", "--config.sed=1"], "besides, "),
        ([f"--config={QUICKSTART}", "--config.sed=1"], "--workdir=runs/NAME is missing (--help sh"),
        ([f"--config={QUICKSTART}", "--config.sed=1"], "sed is not a key: did you mean"),
        (["--config.seed"], "--config.seed needs a value"),
        ([f"--config={QUICKSTART}", "--workdir=gs://b/x"], "is not a local folder"),
    ],
)
def test_flags_that_are_wrong(argv, expected, capsys):
    assert main(argv) == 2
    assert expected in one_line(capsys)


def test_a_workdir_that_cannot_be_written(train, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert main(command(tmp_path)) == 2
    assert "cannot be written" in one_line(capsys)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("/proc/run", "/proc/run cannot be written: No such file or directory; choose a folder"),
        ("/dev/full/run", "cannot be written: Not a directory"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_a_workdir_where_nothing_can_be_made(where, expected, train, capsys):
    assert main([f"--config={QUICKSTART}", f"--workdir={where}"]) == 2
    assert expected in one_line(capsys)


def test_a_workdir_on_a_disk_that_is_read_only(train, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(command(tmp_path)) == 2
    assert "cannot be written: Read-only file system" in one_line(capsys)


def test_a_workdir_has_one_run_at_a_time(train, tmp_path, capsys):
    with held(tmp_path / "run"):
        assert main(command(tmp_path)) == 2
        told = one_line(capsys)
    assert (
        f"{tmp_path / 'run'} is in use by process {os.getpid()} on {socket.gethostname()}" in told
    )
    assert train.calls == []
    assert main(command(tmp_path)) == 0
    assert main(command(tmp_path)) == 0


def test_the_run_has_the_workdir_until_it_ends(train, tmp_path, monkeypatch):
    def run(config, workdir):
        with pytest.raises(UserError, match="in use by"), held(workdir):
            pass
        train.calls.append(workdir)

    monkeypatch.setattr(sys.modules["vtriune_jax.train"], "run", run)
    assert main(command(tmp_path)) == 0
    assert train.calls


def test_a_user_error_is_one_line(train, tmp_path, capsys):
    train.result = UserError("rows.parquet has no column `images`;\n  add it")
    assert main(command(tmp_path)) == 2
    assert one_line(capsys) == "error: rows.parquet has no column `images`; add it\n"


def test_a_full_disk_is_one_line(train, tmp_path, capsys):
    train.result = OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")
    assert main(command(tmp_path)) == 2
    assert "run/metrics.jsonl" in one_line(capsys)


def test_a_full_disk_is_seen_behind_other_errors():
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.EDQUOT, "quota")
    assert disk_full(error)
    assert disk_full(ValueError("RESOURCE_EXHAUSTED: No space left on device"))
    assert not disk_full(OSError(errno.EIO, "broken"))


def test_other_errors_keep_their_traceback(train, tmp_path):
    train.result = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        main(command(tmp_path))


def test_an_interruption_says_how_to_go_on(train, tmp_path, capsys):
    train.result = KeyboardInterrupt()
    assert main(command(tmp_path)) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_the_module_as_a_program():
    """Typos, a wrong type and a broken relation at once; and that it does not wait for JAX."""
    ended = subprocess.run(
        [
            *(sys.executable, "-X", "importtime", "-m", "vtriune_jax.main"),
            *(f"--config={QUICKSTART}", "--workdir=/nonexistent"),
            *("--config.data.tarin=x", "--config.grpo.lr=fast"),
            *("--config.sft.prompts=7", "--config.batch.micro_batches=2"),
        ],
        cwd=configs.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stderr.splitlines()
    (error,) = [line for line in lines if not line.startswith("import time:")]
    assert ended.returncode == 2
    assert error.startswith(f"error: {QUICKSTART} has 3 mistakes: ")
    for part in (
        "did you mean data.train?",
        "grpo.lr='fast' must be of type float",
        "choose 6 or 8",
    ):
        assert part in error
    assert not [line for line in lines if line.split("|")[-1].strip() in ("jax", "transformers")]


def test_help_describes_every_flag(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--config=", "--config.KEY=", "--workdir=", "--help"))
