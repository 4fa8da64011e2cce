"""A run of several processes on this machine, each with the CPU as its device."""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.runs import arguments, environment

LIMIT = 900.0
"""Seconds after which such a run is not slow but stuck, on a machine busy with other things too."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(count: int, *each: list[str], module: str = "vtriune_jax.main", **variables: str):
    """`count` processes of main, with the flags of `each` (one list: the same for all).

    Whoever is left at the end is killed. Output goes to files beside each other, see `said`.
    """
    address = f"--coordinator=127.0.0.1:{free_port()}"
    flags = list(each) * (count if len(each) == 1 else 1)
    processes = []
    try:
        for index, words in enumerate(flags):
            command = [sys.executable, "-m", module, *words, address]
            command += [f"--processes={count}", f"--process={index}"]
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment(**variables),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def ended(processes: list[subprocess.Popen], limit: float = LIMIT) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each, when all have ended."""
    end = time.monotonic() + limit
    return [
        (process.returncode, *texts)
        for process in processes
        for texts in [process.communicate(timeout=max(end - time.monotonic(), 0.1))]
    ]


def run_all(count: int, workdir: Path, **values: object) -> list[tuple[int, str, str]]:
    """The same run on `count` processes to its end."""
    with started(count, arguments(workdir, **values)) as processes:
        return ended(processes)


def finish(count: int, workdir: Path, keys: Mapping[str, object]) -> None:
    """Such a run, which ends well."""
    for status, _, err in run_all(count, workdir, **keys):
        assert status == 0, err
