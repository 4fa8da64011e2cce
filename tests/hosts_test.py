"""What several processes tell each other, and what each says when something is wrong."""

import os
import subprocess
import sys

import pytest

from tests.e2e.runs import CONFIG, ROOT, environment
from tests.e2e.several import ended, free_port, started
from vtriune_jax import hosts
from vtriune_jax.errors import UserError
from vtriune_jax.main import main
from vtriune_jax.workdir import held

FLAGS = f"--config={CONFIG}"


@pytest.mark.parametrize(("count", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_several_processes_meet(count, devices, tmp_path):
    port = str(free_port())
    variables = environment(JAX_NUM_CPU_DEVICES=str(devices))
    command = [sys.executable, "-m", "tests.meeting", port, str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        for status, _, err in ended(processes):
            assert status == 0, err
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_alone_a_process_talks_to_nobody(tmp_path):
    assert hosts.gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert hosts.from_first(lambda: 3) == 3
    with pytest.raises(UserError, match="mine"), hosts.together():
        raise UserError("mine")
    hosts.check_same("settings", {"a": 1})
    hosts.check_shared(tmp_path / "nothing")
    assert not hosts.is_lost(ValueError("Gloo failed"))
    hosts.leave(1)  # does not end it
    assert list(range(5))[hosts.share().slice] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--process=1"], "--coordinator=…, --processes=… is missing: --coordinator, --processes"),
        (["--coordinator=a", "--processes=2", "--process=0"], "--coordinator=a is not HOST:PORT"),
        (["--coordinator=a:1", "--processes=2", "--process=2"], "--process=2 is not in 0 … 1"),
        (["--coordinator=a:1", "--processes=0", "--process=0"], "--processes=0 must be above 0"),
        (["--coordinator=a:1", "--processes=x", "--process=0"], "--processes"),
        (["--wait=0"], "--wait"),
    ],
)
def test_flags_that_do_not_go_together(flags, expected, tmp_path, capsys):
    assert main([FLAGS, f"--workdir={tmp_path}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("process", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_somebody_who_does_not_come_is_not_waited_for_for_ever(process, tmp_path):
    command = [sys.executable, "-m", "vtriune_jax.main", FLAGS, f"--workdir={tmp_path / 'run'}"]
    command += [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--process={process}"]
    done = subprocess.run(
        [*command, "--wait=1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert f"error: process {process} of 2 has waited 1 s at 127.0.0.1:" in done.stderr
    assert not (tmp_path / "run").exists()


def test_other_settings_on_another_host_are_noticed_by_all(tmp_path):
    flags = [[FLAGS, f"--workdir={tmp_path / 'run'}", f"--config.seed={seed}"] for seed in (0, 1)]
    with started(2, *flags) as processes:
        for status, _, err in ended(processes):
            assert status == 2
            assert (
                "error: the processes have different settings: seed is 0 for process 0 and 1 for "
                "process 1; start all of them with the same\n"
            ) in err
    assert not (tmp_path / "run").exists()


def test_a_workdir_in_use_ends_all_processes_of_another_run(tmp_path):
    with held(tmp_path / "run"), started(2, [FLAGS, f"--workdir={tmp_path / 'run'}"]) as processes:
        for status, _, err in ended(processes):
            assert status == 2
            assert f"/run is in use by process {os.getpid()} on " in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
