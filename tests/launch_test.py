"""The shell scripts, with a Python and a pip that only write down what they are asked."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUB = """#!/bin/bash
case "$*" in
  '-m venv --clear .venv') mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  '-m pip install'*) echo installed >>pip.log; exit "${PIP_STATUS:-0}" ;;
  '-m vtriune_jax.main'*) printf '%s\\n' "${@:3}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A repository with the scripts and nothing else, in a folder whose name has a space."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (root / name).write_text(f"# {name}\n")
    stub = tmp_path / "python-stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return root


def launch(script: Path, *flags: str, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [script, *flags],
        cwd="/",
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def test_quickstart_sets_up_once_and_passes_flags_through(clone):
    script, python = clone / "launch" / "quickstart.sh", clone.parent / "python-stub"
    ended = launch(script, "--workdir=my run", "--config.seed=1", PYTHON=python)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[2:] == [
        "--config=configs/quickstart.py",
        "--workdir=runs/quickstart",
        "--workdir=my run",
        "--config.seed=1",
    ]
    assert "set-up: installing" not in launch(script).stdout
    (clone / "requirements.txt").write_text("numpy\n")
    assert "set-up: installing" in launch(script).stdout
    assert (clone / "pip.log").read_text() == "installed\n" * 2


def test_quickstart_helps_before_it_installs_anything(clone):
    for flag in ("--help", "-h"):
        ended = launch(clone / "launch" / "quickstart.sh", "--workdir=x", flag, PYTHON="/none")
        assert ended.returncode == 0
        assert "launch/quickstart.sh [--workdir=FOLDER] [--config.KEY=VALUE …]" in ended.stdout
    assert not (clone / ".venv").exists()


def test_an_installation_that_fails_is_tried_again(clone):
    script, python = clone / "launch" / "quickstart.sh", clone.parent / "python-stub"
    ended = launch(script, PYTHON=python, PIP_STATUS=1)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: pip could not install requirements.txt")
    assert launch(script).returncode == 0


def test_without_a_python_it_says_so(clone):
    ended = launch(clone / "launch" / "quickstart.sh", PYTHON="/nonexistent/python")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no Python from 3.11 on")
    assert ended.stderr.count("\n") == 1


TPU = ("--name=t", "--zone=z", "--type=v6e-8", "--workdir=gs://bucket/my run", "--dry-run")


def test_tpu_vm_prints_its_commands_in_order_and_quotes_them():
    sources = "--config.data.train=(('a b', 1.0),)"
    ended = launch(ROOT / "launch" / "tpu_vm.sh", *TPU, "--spot", "--", sources)
    assert (ended.returncode, ended.stderr) == (0, "")
    words = shlex.split(ended.stdout)
    verbs = [words[i + 1] for i, word in enumerate(words) if word == "tpu-vm"]
    assert verbs == ["create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert "--spot" in words
    scripts = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    (training,) = [script for script in scripts if "vtriune_jax.main" in script]
    flags = shlex.split(training)
    assert flags[flags.index("vtriune_jax.main") + 1 :] == [
        "--config=configs/quickstart.py",
        "--workdir=runs/bucket/my run",
        sources,
    ]
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_tpu_vm_keeps_the_machine_on_request():
    ended = launch(ROOT / "launch" / "tpu_vm.sh", *TPU, "--keep", "--project=p")
    assert " delete " not in ended.stdout
    assert ended.stdout.count("--project=p") == ended.stdout.count("tpu-vm")


def test_tpu_vm_mounts_the_bucket_for_several_hosts():
    ended = launch(ROOT / "launch" / "tpu_vm.sh", *TPU, "--mount")
    assert (ended.returncode, ended.stderr) == (0, "")
    words = shlex.split(ended.stdout)
    scripts = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    mount, training, last = scripts[2:]
    assert mount.endswith(" bucket runs/bucket")
    assert '"deb [signed-by=' in mount
    assert "gcsfuse-$(lsb_release -cs) main" in mount
    assert shlex.split(training)[-1] == "--workdir=runs/bucket/my run"
    assert "fusermount -u runs/bucket" in last
    assert "rsync" not in ended.stdout


def test_tpu_vm_takes_the_keys_of_a_fleet_along_and_shows_them_to_nobody(tmp_path):
    env = tmp_path / "fleet keys"
    env.write_text("VTRIUNE_ROLLOUT_KEY='a secret'\n")
    ended = launch(ROOT / "launch" / "tpu_vm.sh", *TPU, "--mount", f"--env={env}")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "secret" not in ended.stdout
    words = shlex.split(ended.stdout)
    scripts = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
    (training,) = [script for script in scripts if "vtriune_jax.main" in script]
    home = tmp_path / "home" / "vtriune_jax"
    home.mkdir(parents=True)
    (closed,) = [script for script in scripts if script.endswith("../vtriune_jax.env")]
    subprocess.run(["bash", "-c", closed], cwd=home.parent, check=True)
    copy = home.parent / "vtriune_jax.env"
    assert copy.stat().st_mode & 0o777 == 0o600
    copy.write_bytes(env.read_bytes())
    shown = training.replace("exec .venv", "env; exit; exec .venv")
    done = subprocess.run(
        ["bash", "-c", shown], cwd=home.parent, capture_output=True, text=True, check=True
    )
    assert "VTRIUNE_ROLLOUT_KEY=a secret\n" in done.stdout
    places = [words[i + 1] for i, word in enumerate(words) if word == "scp"]
    assert places[-1] == str(env)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--nme=x"], "--nme=x is no flag"),
        ([*TPU, "--env=no/file"], "there is no file no/file"),
        (["--name=t"], "--zone=… is missing"),
        ([*TPU, "--workdir=runs/a"], "is not gs://BUCKET/FOLDER"),
        ([*TPU, "--config=configs/none.py"], "there is no config file configs/none.py"),
    ],
)
def test_tpu_vm_refuses_in_one_line(flags, expected):
    ended = launch(ROOT / "launch" / "tpu_vm.sh", *flags)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert expected in ended.stderr


def test_the_scripts_pass_shellcheck():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tool = shutil.which("shellcheck", path=path)
    if tool is None:
        pytest.skip("shellcheck is not installed; requirements-dev.txt has it")
    scripts = [*sorted((ROOT / "launch").rglob("*.sh")), ROOT / ".ci" / "run"]
    subprocess.run([tool, "--external-sources", *scripts], cwd=ROOT, check=True)


def test_ci_runs_the_test_scripts_and_nothing_else():
    _, *lines = (ROOT / ".ci" / "run").read_text().splitlines()
    said = [line for line in lines if line and not line.startswith("#")]
    real = "launch/test_sglang.sh"
    assert said == [
        "set -euo pipefail",
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."',
        "launch/test.sh",
        "launch/test_tpu.sh",
        f"{real} || {real} --last-failed",
    ]
