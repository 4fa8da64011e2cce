"""Real SGLang servers on the CPU, for tests with the marker `sglang`.

`launch/test_sglang.sh` installs what they need and runs these tests. They are started by
`launch/rollouts.sh`, as a user would, and end with the `with` block: whole process groups, by force
where asking does not help, and after `LIFETIME` seconds in any case.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "rollouts.sh"
LIFETIME = 1800
"""Seconds after which servers end even if the tests were killed and cannot end them."""
START_LIMIT = 600
"""Seconds for all servers to answer; 30 to 130 are usual, 270 at a load of 28."""


@dataclass(frozen=True)
class Fleet:
    """Servers that answered when the block was entered."""

    addresses: tuple[str, ...]
    folder: Path
    """Holds server-N.log, and addresses: the list as the launcher keeps it."""

    def pid(self, server: int) -> int:
        """Its present process, which leads a process group of its own."""
        return int((self.folder / f"server-{server}.pid").read_text())


@contextlib.contextmanager
def serve(model: Path, folder: Path, servers: int = 1, *flags: str) -> Iterator[Fleet]:
    """Runs servers of the checkpoint `model`, with everything about them in `folder`.

    `flags` are further ones of launch/rollouts.sh (`--restart`; `--` and then SGLang's own).
    """
    require_installation()
    command = ["timeout", "--kill-after=60", str(LIFETIME), str(SCRIPT), "--cpu"]
    command += [f"--model={model}", f"--servers={servers}", f"--workdir={folder}"]
    command += [f"--timeout={START_LIMIT}", "--grace=5", *flags]
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "rollouts.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield Fleet(_wait(process, folder / "addresses", log), folder)
    finally:
        _end(process, folder)


def require_installation() -> None:
    """Skips the test where SGLang is not installed."""
    venv = Path(os.environ.get("SGLANG_VENV") or ROOT / ".cache" / "sglang" / "venv")
    if not (venv / "bin" / "python").exists():
        pytest.skip(f"SGLang is not in {venv}; launch/test_sglang.sh installs it and runs this")


def _wait(process: subprocess.Popen, addresses: Path, log: Path) -> tuple[str, ...]:
    deadline = time.monotonic() + START_LIMIT + 30
    while not addresses.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"launch/rollouts.sh started no servers:\n{log.read_text()}")
        time.sleep(0.1)
    return tuple(addresses.read_text().split())


def _end(process: subprocess.Popen, folder: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        groups = [int(file.read_text()) for file in folder.glob("server-*.pid")]
        for group in [process.pid, *groups]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.wait(timeout=30)
