"""A pool of worker processes with a hard time limit per completion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Pipe
from pathlib import Path
from queue import LifoQueue
from typing import Any

_IMPORT_LIMIT = 120.0
"""Seconds for a worker to start and import a verifier on a machine busy with other things."""


def child_environment() -> dict[str, str]:
    """Our environment, in which a child finds this package wherever its working directory is."""
    here = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, known] if known else [here])}


class WorkerDied(RuntimeError):
    """The process ended while it was judging (a crash in C code, or the kernel's memory killer)."""


class Worker:
    """One process and our end of the pipe to it. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            # not multiprocessing: fork would copy JAX's locks, spawn would import the user's main
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vtriune_jax.verifiers.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
            )
        self._loaded: set[str] = set()

    def judge(self, name: str, args: Sequence[Any], limit: float) -> Mapping[str, Any] | str:
        """Parts of the reward or the reason why there are none.

        `TimeoutError`, `WorkerDied`: the worker is of no use any more and must be closed.
        """
        if name not in self._loaded:
            if problem := self._ask((name, None, 0.0), _IMPORT_LIMIT):
                return problem
            self._loaded.add(name)
        return self._ask((name, tuple(args), limit), limit)

    def _ask(self, message: Any, limit: float) -> Any:
        try:
            self._connection.send(message)
            if not self._connection.poll(limit):
                raise TimeoutError(f"took longer than {limit:g} s")
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            code = self._process.wait()
            raise WorkerDied(f"the verifier process died (exit status {code})") from error

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


class Pool:
    """`size` workers, started when they are first needed, replaced when they had to be killed."""

    def __init__(self, size: int, limit: float) -> None:
        self.limit = limit
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="verifier")
        self._idle: LifoQueue[Worker | None] = LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        self._size = size

    def submit(self, name: str, args: Sequence[Any]) -> Future[Mapping[str, Any] | str | Exception]:
        """Judge `args` by the verifier `name`: its parts, the reason why there are none, or
        `TimeoutError` or `WorkerDied`, as the future's result."""
        return self._threads.submit(self._judge, name, args)

    def _judge(self, name: str, args: Sequence[Any]) -> Mapping[str, Any] | str | Exception:
        worker = self._idle.get()
        try:
            worker = worker or Worker()
            return worker.judge(name, args, self.limit)
        except (TimeoutError, WorkerDied) as error:
            if worker:
                worker.close()
            worker = None
            return error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Finish what is being judged, cancel what waits, end the workers."""
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self._size):
            if worker := self._idle.get():
                worker.close()
        for _ in range(self._size):
            self._idle.put(None)
