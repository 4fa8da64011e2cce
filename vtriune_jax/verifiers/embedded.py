"""A verifier server of the training's own, as a child process that is watched over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Self

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers.pool import child_environment
from vtriune_jax.verifiers.router import TIME_LIMIT


class VerifierServer:
    """The verifier service as a child process, started again when it is found dead or hanging.

    It lives until `close`, or until this process ends in whatever way. It prints to `log`.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        workers: int = 0,
        limit: float = TIME_LIMIT,
        log: Path | None = None,
        start_timeout: float = 60.0,
        patience: float = 10.0,
    ) -> None:
        """Start the service and wait for it; `UserError` when it does not come up.

        `patience`: seconds in which it must answer a question after its health, which is asked as
        often as that at most, or it is killed.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="vtriune_verifiers_")
        self._ready = Path(self._folder.name) / "address"
        self._log = log or Path(self._folder.name) / "log"
        self._command = [
            *(sys.executable, "-m", "vtriune_jax.verifiers.server", "--host", host),
            *("--port", str(port), "--workers", str(workers), "--limit", str(limit)),
            *("--ready-file", str(self._ready), "--parent", str(os.getpid())),
        ]
        self._start_timeout, self._patience = start_timeout, patience
        self._lock = threading.Lock()
        self._closed = False
        self._was_well = 0.0
        try:
            self._process = self._start()
        except UserError:
            self._folder.cleanup()
            raise

    def addresses(self) -> tuple[str, ...]:
        """Where it listens now, after a restart if it was dead or did not answer.

        May be called from any thread.
        """
        with self._lock:
            if self._closed:
                raise UserError("the verifier server was closed; start another one")
            if not self._is_well():
                self._process.kill()
                self._process.wait()
                self._process = self._start()
            return (self._ready.read_text(),)

    def close(self) -> None:
        """Let requests in flight finish, then end it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_well(self) -> bool:
        """Whether it lives and, if it was not asked lately, answers."""
        if self._process.poll() is not None:
            return False
        if time.monotonic() - self._was_well < self._patience:
            return True
        try:
            address = self._ready.read_text()
            with urllib.request.urlopen(f"{address}/health", timeout=self._patience):
                self._was_well = time.monotonic()
        except OSError:
            return False
        return True

    def _start(self) -> subprocess.Popen[bytes]:
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer, which may still want verdicts
                env=child_environment(),
            )
        deadline = time.monotonic() + self._start_timeout
        while not self._ready.exists():
            if process.poll() is not None:
                raise UserError(f"the verifier server did not start: {self._last_line()}")
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise UserError(
                    f"the verifier server was not ready after {self._start_timeout:g} s: "
                    f"{self._last_line()}"
                )
            time.sleep(0.02)
        self._was_well = time.monotonic()
        return process

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        return (
            f"{lines[-1]}; try `{' '.join(self._command[:3])}`, or verifiers.mode='in_process' "
            "to do without a server"
        )
