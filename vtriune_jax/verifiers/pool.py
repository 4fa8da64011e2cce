"""A pool of worker processes with a hard time limit per completion.

What waits is handed out in chunks, one message each, and answered task by task; a task is one
completion, or several for a verifier that judges whole batches. When a task overruns its limit or
kills its worker, the process is replaced and blame is settled: completions judged together go back
into the queue to be judged alone, one that was alone is at fault (a death may also have come from
outside, so it gets a second chance), and those behind it in the chunk just wait for another worker.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtriune_jax.verifiers.pipe import receive, send
from vtriune_jax.verifiers.worker import Call

CHUNK = 64
"""Completions in one message to a worker, if there are no more for every worker."""
LARGEST_CHUNK = 512
"""Completions in one message to a worker at most. Judging many together costs less for each."""
_IMPORT_LIMIT = 120.0
"""Seconds for a worker to start and import a verifier on a machine busy with other things."""

_CLOSED = "the verifiers were closed"

Answer = Mapping[str, Any] | str | Exception
"""Parts of the reward, the reason why there are none, or `TimeoutError` or `WorkerDied`."""


def child_environment() -> dict[str, str]:
    """Our environment, in which a child finds this package wherever its working directory is."""
    here = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([here, known] if known else [here])}


class WorkerDied(RuntimeError):
    """The process ended while it was judging (a crash in C code, or the kernel's memory killer)."""


class _Submission:
    """What was submitted together and is answered together: one future costs less than many."""

    def __init__(self, size: int) -> None:
        self.future: Future[list[Answer]] = Future()
        self._answers: list[Any] = [None] * size
        self._missing = size
        self._lock = threading.Lock()
        if not size:
            self.future.set_result([])

    def finish(self, place: int, answer: Answer) -> None:
        """Take one answer; the last one completes the future, unless it was cancelled."""
        self._answers[place] = answer
        with self._lock:
            self._missing -= 1
            last = not self._missing
        if last and self.future.set_running_or_notify_cancel():
            self.future.set_result(self._answers)


@dataclass(eq=False, slots=True)
class _Job:
    """One completion in the queue."""

    module: str
    function: str
    call: Call
    submission: _Submission
    place: int
    alone: bool = False
    """Not to be judged together with others any more."""
    deaths: int = 0

    def finish(self, answer: Answer) -> None:
        """Give the answer."""
        self.submission.finish(self.place, answer)


class Worker:
    """One process and our end of the socket to it. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # not multiprocessing: fork would copy JAX's locks, spawn would import the user's main
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vtriune_jax.verifiers.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                # the accelerator is the trainer's, the other cores are the other workers'
                env={**child_environment(), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
            )
        self._loaded: dict[str, bool | str] = {}

    def load(self, module: str) -> bool | str:
        """Import a verifier: whether it judges whole batches; the reason if that fails."""
        if module not in self._loaded:
            self.send(("load", module), _IMPORT_LIMIT)
            self._loaded[module] = self.receive(_IMPORT_LIMIT)
        return self._loaded[module]

    def send(self, message: Any, limit: float) -> None:
        """`TimeoutError`, `WorkerDied`: it is of no use any more and must be closed."""
        try:
            self._socket.settimeout(limit)
            send(self._socket, message)
        except TimeoutError:
            raise TimeoutError(f"took longer than {limit:g} s") from None
        except OSError as error:
            raise self._died() from error

    def receive(self, limit: float) -> Any:
        """The next message; errors as for `send`."""
        try:
            self._socket.settimeout(limit)
            return receive(self._socket)
        except TimeoutError:
            raise TimeoutError(f"took longer than {limit:g} s") from None
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> WorkerDied:
        return WorkerDied(f"the verifier process died (exit status {self._process.wait()})")

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        self._socket.close()


class Pool:
    """`size` workers, started when they are first needed, replaced when they had to be killed."""

    def __init__(self, size: int, limit: float) -> None:
        self.size, self.limit = size, limit
        self.replaced = 0
        """Workers that overran their limit, died or grew too large so far."""
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._idle = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"verifier-{k}", daemon=True)
            for k in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, calls: Sequence[tuple[str, Sequence[Any]]]) -> Future[list[Answer]]:
        """Judge by `verify`, or `verify_batch` where there is one, each `(module, arguments)`.

        The answers come in order and all at once. Until then they may be cancelled; what no worker
        has yet is then not judged.
        """
        return self._add([(module, "verify", (tuple(args), {})) for module, args in calls])

    def call(self, module: str, function: str, *args: Any, **keywords: Any) -> Future[list[Answer]]:
        """The same for any other function of a module: one answer."""
        return self._add([(module, function, (args, keywords))])

    @property
    def waiting(self) -> int:
        """Completions that no worker has yet."""
        return len(self._jobs)

    def _add(self, calls: Sequence[tuple[str, str, Call]]) -> Future[list[Answer]]:
        submission = _Submission(len(calls))
        self._put(_Job(*call, submission, place) for place, call in enumerate(calls))
        return submission.future

    def _put(self, jobs: Iterable[_Job], back: bool = False) -> None:
        """Add to the end of the queue, or put back at its beginning."""
        with self._changed:
            if self._closed:
                for job in jobs:
                    job.finish(_CLOSED)
            elif back:
                self._jobs.extendleft(reversed(list(jobs)))
            else:
                self._jobs.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what is being judged, refuse what waits, end the workers."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.finish(_CLOSED)
            self._jobs.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """A thread's life: its own worker judges chunk by chunk."""
        worker: Worker | None = None
        while not self._closed:
            if jobs := self._take():
                worker = self._judge(worker, jobs)
        if worker:
            worker.close()

    def _take(self) -> list[_Job]:
        """A fair share of what waits; blocks until there is something; empty when closed."""
        with self._changed:
            self._idle += 1
            while not self._jobs and not self._closed:
                self._changed.wait()
            most = min(max(len(self._jobs) // self.size, CHUNK), LARGEST_CHUNK)
            share = min(-(-len(self._jobs) // self._idle), most)
            self._idle -= 1
            jobs = [self._jobs.popleft() for _ in range(share)]
        return [job for job in jobs if not job.submission.future.cancelled()]

    def _judge(self, worker: Worker | None, jobs: list[_Job]) -> Worker | None:
        """Answer the jobs or put them back; the worker to go on with, if it still lives."""
        try:
            worker = worker or Worker()
        except OSError as error:  # no memory or processes left
            for job in jobs:
                job.finish(error)
            return None
        tasks, worn = self._prepare(worker, jobs)
        try:
            if not worn:
                worker.send(("judge", [_message(task) for task in tasks], self.limit), self.limit)
            while tasks and not worn:
                answers, worn = worker.receive(self.limit)
                for job, answer in zip(tasks.pop(0), answers, strict=True):
                    job.finish(answer)
        except (TimeoutError, WorkerDied) as error:
            self._blame(tasks.pop(0), error)
            worn = True
        self._put((job for task in tasks for job in task), back=True)
        if not worn:
            return worker
        worker.close()
        self.replaced += 1
        return None

    def _prepare(self, worker: Worker, jobs: Sequence[_Job]) -> tuple[list[list[_Job]], bool]:
        """Import the verifiers; what is left to judge, as tasks, and whether the worker died."""
        tasks: list[list[_Job]] = []
        broken = False
        for module in {job.module: None for job in jobs}:
            mine = [job for job in jobs if job.module == module]
            if broken:
                tasks.append(mine)
                continue
            try:
                loaded = worker.load(module)
            except (TimeoutError, WorkerDied) as error:
                for job in mine:
                    self._blame([job], error)
                broken = True
                continue
            if isinstance(loaded, str):
                for job in mine:
                    job.finish(loaded)
            else:
                tasks += _tasks(mine, batched=loaded)
        return tasks, broken

    def _blame(self, task: Sequence[_Job], error: TimeoutError | WorkerDied) -> None:
        """Judge one by one what was judged together; one that was alone gets the error."""
        for job in task:
            first_death = isinstance(error, WorkerDied) and job.deaths == 0
            if len(task) > 1 or first_death:
                job.deaths += first_death and len(task) == 1
                job.alone = True
                self._put([job], back=True)
            else:
                job.finish(error)


def _tasks(jobs: Sequence[_Job], batched: bool) -> list[list[_Job]]:
    """Those that may be judged together first, then the others one by one."""
    if not batched:
        return [[job] for job in jobs]
    together = [job for job in jobs if job.function == "verify" and not job.alone]
    alone = [[job] for job in jobs if job.function != "verify" or job.alone]
    return [together, *alone] if together else alone


def _message(task: Sequence[_Job]) -> tuple[str, str, list[Call]]:
    function = "verify_batch" if len(task) > 1 else task[0].function
    return task[0].module, function, [job.call for job in task]
