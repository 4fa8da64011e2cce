"""launch/rollouts.sh and the installation of SGLang, with a stand-in for SGLang."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

import pytest

from tests.launch_test import ROOT, launch

SCRIPT = ROOT / "launch" / "rollouts.sh"
STUB = f"""#!{sys.executable}
# Plays SGLang: has a child, answers /health with 503 for a while, and may not hear SIGTERM.
import http.server, os, signal, subprocess, sys, time

flags = dict(zip(sys.argv[1:], sys.argv[2:]))
print("serving", *sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if flags["--port"] == os.environ.get("STUB_BROKEN"):
    sys.exit("out of memory")
if os.environ.get("STUB_DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "60"])
ready = time.monotonic() + float(os.environ.get("STUB_SLOW", "0"))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if time.monotonic() >= ready else 503)
        self.end_headers()


http.server.ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def stub(tmp_path):
    """An environment folder whose Python is the stand-in."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


@pytest.fixture
def model(tmp_path):
    (tmp_path / "my model").mkdir()
    (tmp_path / "my model" / "config.json").write_text("{}")
    return tmp_path / "my model"


AS_IN_A_TERMINAL = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])",
)
"""Ctrl-C is heard, though these tests may run in the background, where it is not."""


@contextmanager
def running(stub, model, *flags, **variables):
    """(process, folder) of a launcher with two servers; nothing is left behind."""
    folder = stub / "work dir"
    command = [
        *AS_IN_A_TERMINAL,
        SCRIPT,
        "--cpu",
        f"--model={model}",
        "--servers=2",
        f"--workdir={folder}",
        *flags,
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "SGLANG_VENV": str(stub), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process, folder
    finally:
        for group in [process.pid, *pids(folder)]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.communicate()


def pids(folder):
    return [int(file.read_text()) for file in sorted(folder.glob("server-*.pid"))]


def until(condition, seconds=20.0):
    """What the condition returns when it holds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def listed(folder):
    """The addresses in the list, if there is one."""
    file = folder / "addresses"
    return file.read_text().splitlines() if file.exists() else None


def group_lives(group):
    """Whether a process of the group does more than wait to be buried."""
    found = subprocess.run(
        ["ps", "-e", "-o", "pgid=,stat="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in found.stdout.splitlines()]
    return any(int(pgid) == group and not state.startswith("Z") for pgid, state in rows)


def health(address):
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        return answer.status


def test_the_list_appears_when_all_answer_and_goes_with_the_servers(stub, model):
    with running(stub, model, STUB_SLOW="1.5") as (process, folder):
        until(lambda: len(pids(folder)) == 2)
        started = time.monotonic()
        assert listed(folder) is None
        addresses = until(lambda: listed(folder))
        assert time.monotonic() - started > 0.5
        assert len(set(addresses)) == 2
        assert [health(address) for address in addresses] == [200, 200]
        groups = pids(folder)
        assert len({*groups, os.getpgid(process.pid)}) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert listed(folder) is None
        assert not any(map(group_lives, groups))


def test_ctrl_c_ends_servers_that_do_not_hear_sigterm(stub, model):
    with running(stub, model, "--grace=1", STUB_DEAF="1") as (process, folder):
        until(lambda: listed(folder))
        groups = pids(folder)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert not any(map(group_lives, groups))


def test_a_server_that_died_leaves_the_list_and_returns(stub, model):
    with running(stub, model, "--restart") as (_, folder):
        first, second = until(lambda: listed(folder))
        old, other = pids(folder)
        os.kill(old, signal.SIGKILL)
        until(lambda: listed(folder) == [second])
        assert not group_lives(old)
        assert until(lambda: listed(folder) == [first, second])
        new, same = pids(folder)
        assert (new != old, same) == (True, other)
        assert health(first) == 200


def test_without_restart_the_others_go_on_until_none_is_left(stub, model):
    with running(stub, model) as (process, folder):
        _, second = until(lambda: listed(folder))
        groups = pids(folder)
        os.kill(groups[0], signal.SIGKILL)
        until(lambda: listed(folder) == [second])
        os.kill(groups[1], signal.SIGKILL)
        assert process.wait(timeout=60) == 2
        errors = process.stderr.read()
        assert "server 0 has ended; the others go on" in errors
        assert errors.endswith("error: no server is left\n")
        assert listed(folder) is None


def test_a_server_that_does_not_start_ends_all_with_its_log(stub, model):
    port = free_ports()
    broken = {"STUB_BROKEN": str(port + 1), "STUB_SLOW": "60"}
    with running(stub, model, f"--port={port}", **broken) as (process, folder):
        assert process.wait(timeout=60) == 2
        assert process.stderr.read().endswith(
            "server-1.log: out of memory\n"
            "error: server 1 ended before it answered /health; its log is above\n"
        )
        assert not any(map(group_lives, pids(folder)))


def test_a_server_that_takes_too_long_ends_all_with_its_log(stub, model):
    with running(stub, model, "--timeout=1", STUB_SLOW="60") as (process, folder):
        assert process.wait(timeout=60) == 2
        errors = process.stderr.read()
        assert "server-0.log: serving launch/sglang_cpu/serve.py" in errors
        assert errors.splitlines()[-1] == (
            "error: server 0 did not answer /health within --timeout=1 s; its log is above"
        )
        assert not any(map(group_lives, pids(folder)))


def free_ports():
    """The first of two free neighbouring ports, as the script itself finds them."""
    ended = launch(SCRIPT, "--model=m", "--cpu", "--servers=2", "--dry-run")
    return int(value_of("--port", ended.stdout.splitlines()[0]))


def value_of(flag, line):
    words = shlex.split(line)
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(
    ("preset", "devices", "memory"),
    [("7b", list("01234567"), "0.80"), ("32b", ["0,1", "2,3", "4,5", "6,7"], "0.85")],
)
def test_presets_share_eight_gpus_out(preset, devices, memory):
    flags = (f"--preset={preset}", "--model=org/m", "--dry-run", "--", "--log-level", "debug it")
    ended = launch(SCRIPT, *flags, SGLANG_PYTHON="/venv/bin/python")
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert len(lines) == len(devices)
    for number, (line, device) in enumerate(zip(lines, devices, strict=True)):
        words = shlex.split(line)
        assert words[0] == "env"
        assert {"SGLANG_VLM_CACHE_SIZE_MB=0", f"CUDA_VISIBLE_DEVICES={device}"} < set(words)
        assert words[words.index("/venv/bin/python") + 1 :][:2] == ["-m", "sglang.launch_server"]
        assert words[-2:] == ["--log-level", "debug it"]
        for flag, value in {
            "--tp-size": str(len(device.split(","))),
            "--port": str(30000 + number),
            "--mem-fraction-static": memory,
            "--weight-version": "step-0",
            "--model-path": "org/m",
        }.items():
            assert value_of(flag, line) == value
        assert "--api-key" not in words


@pytest.mark.parametrize(("variables", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "4"}, 4)])
def test_servers_on_cpus_leave_cores_to_others(monkeypatch, variables, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = shlex.split(launch(SCRIPT, "--cpu", "--model=org/m", "--dry-run", **variables).stdout)
    assert f"OMP_NUM_THREADS={threads}" in words
    assert "--sleep-on-idle" in words


def test_keys_are_asked_of_clients_and_not_printed():
    keys = {"VTRIUNE_ROLLOUT_KEY": "secret one", "VTRIUNE_ROLLOUT_ADMIN_KEY": "secret two"}
    flags = ("--preset=7b", "--servers=1", "--model=org/m", "--host=10.0.0.2", "--dry-run")
    ended = launch(SCRIPT, *flags, **keys)
    assert (
        "--api-key $VTRIUNE_ROLLOUT_KEY --admin-api-key $VTRIUNE_ROLLOUT_ADMIN_KEY" in ended.stdout
    )
    assert "secret" not in ended.stdout


def test_keys_reach_the_servers(stub, model):
    keys = {"VTRIUNE_ROLLOUT_KEY": "secret one", "VTRIUNE_ROLLOUT_ADMIN_KEY": "secret two"}
    with running(stub, model, **keys) as (_, folder):
        until(lambda: listed(folder))
        log = (folder / "server-0.log").read_text()
        assert "--api-key secret one --admin-api-key secret two" in log


def test_the_router_knows_all_servers():
    flags = ("--cpu", "--servers=2", "--port=31000", "--model=org/m", "--router=31100", "--dry-run")
    ended = launch(SCRIPT, *flags, ROUTER_PYTHON="/router/python")
    *_, line = ended.stdout.splitlines()
    words = shlex.split(line)
    assert words[:3] == ["/router/python", "-m", "sglang_router.launch_router"]
    place = words.index("--worker-urls")
    assert words[place + 1 : place + 3] == ["http://127.0.0.1:31000", "http://127.0.0.1:31001"]


def test_taken_ports_are_refused(stub, model):
    with running(stub, model) as (_, folder):
        port = until(lambda: listed(folder))[1].rpartition(":")[2]
        ended = launch(SCRIPT, "--cpu", f"--model={model}", f"--port={port}", SGLANG_VENV=stub)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: port {port} of 127.0.0.1 is taken; choose another --port\n"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--modle=x"], "--modle=x is no flag"),
        (["--cpu"], "--model=FOLDER is missing"),
        (["--model=m"], "--preset=: choose one of"),
        (["--model=m", "--preset=70b"], "--preset=70b: choose one of"),
        (["--model=m", "--preset=7b", "--cpu"], "choose one of"),
        (["--model=m", "--preset=32b", "--servers=5"], "8 GPUs hold 4 servers"),
        (["--model=m", "--cpu", "--servers=two"], "--servers=two is not a whole number"),
        (["--model=m", "--cpu", "--servers=0"], "--servers=0: at least one"),
        (["--model=m", "--cpu", "--host=0.0.0.0"], "no address for the trainer"),
        (["--model=m", "--preset=7b", "--host=10.0.0.2"], "set VTRIUNE_ROLLOUT_KEY"),
        (["--model=m", "--cpu", "--router=31100"], "--router needs ROUTER_PYTHON"),
        (["--model=/none", "--cpu"], "--model=/none has no config.json"),
        (["--model=/none", "--cpu", "--dry-run"], "--model=/none has no config.json"),
        (["--model=./none", "--cpu", "--dry-run"], "--model=./none has no config.json"),
        (["--model=~/none", "--cpu", "--dry-run"], "--model=~/none has no config.json"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, expected):
    ended = launch(SCRIPT, *flags)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert expected in ended.stderr


INSTALLER = """#!/bin/bash
# Plays Python and pip: notes what is installed where.
case "$*" in
  '-c import ensurepip'*) exit "${NOT_311:-0}" ;;
  '-m venv --clear '*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  '-m pip install'*) echo "$0 ${*:6}" >>pip.log; exit "${PIP_STATUS:-0}" ;;
  '-m pytest'*) printf '%s\\n' "${@:3}" ;;
esac
"""
ENVIRONMENT = ".cache/sglang/venv/bin/python"


@pytest.fixture
def fresh(tmp_path):
    """launch/test_sglang.sh of a fresh clone, and variables that make it use the stand-in."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (root / name).write_text("")
    python = tmp_path / "python"
    python.write_text(INSTALLER)
    python.chmod(0o755)
    return root, {"PYTHON": python, "SGLANG_VENV": ""}


def test_sglang_is_installed_once_and_the_tests_are_run(fresh):
    root, variables = fresh
    script = root / "launch" / "test_sglang.sh"
    ended = launch(script, "-k", "greedy", **variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-5:] == ["--numprocesses=0", "-m", "sglang", "-k", "greedy"]
    installed = (root / "pip.log").read_text().splitlines()
    assert installed[1:] == [
        f"{ENVIRONMENT} --requirement launch/sglang_cpu/requirements.txt",
        f"{ENVIRONMENT} --requirement launch/sglang_cpu/requirements-alone.txt --no-deps",
    ]
    assert "installing" not in launch(script, **variables).stdout
    (root / "launch" / "sglang_cpu" / "requirements.txt").write_text("torch==2.14\n")
    assert "installing SGLang" in launch(script, **variables).stdout


def test_another_python_is_refused(fresh):
    root, variables = fresh
    script = root / "launch" / "rollouts.sh"
    (root / "config.json").write_text("{}")
    ended = launch(script, "--cpu", "--model=.", **variables, NOT_311=1)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: SGLang for CPUs needs Python 3.11 with venv")
    assert ended.stderr.count("\n") == 1


def test_an_installation_that_fails_is_tried_again(fresh):
    root, variables = fresh
    script = root / "launch" / "test_sglang.sh"
    launch(script, **variables)
    (root / "launch" / "sglang_cpu" / "requirements.txt").write_text("torch==2.14\n")
    ended = launch(script, **variables, PIP_STATUS=1)
    assert ended.returncode == 2
    assert "pip could not install launch/sglang_cpu/requirements.txt" in ended.stderr
    assert launch(script, **variables).returncode == 0


def test_an_environment_that_is_not_there(tmp_path, model):
    ended = launch(SCRIPT, "--cpu", f"--model={model}", SGLANG_VENV=tmp_path / "none")
    assert ended.returncode == 2
    assert "has no bin/python; unset it" in ended.stderr
