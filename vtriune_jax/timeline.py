"""When each part of a step ran, and in which thread: seconds for the metrics, a trace for the eye.

`workdir/timeline.json` is in Chrome's trace event format; ui.perfetto.dev or chrome://tracing draw
it. It is the array form, whose closing bracket may be missing, so a run adds to it line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtriune_jax.writers import writing


class Timeline:
    """Writes the spans of all threads of this process to a file, each as it ends."""

    def __init__(self, path: Path):
        self._path = path
        self._lock = threading.Lock()
        self._threads: dict[str, int] = {}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            if not self._file.tell():
                self._file.write("[\n")

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._file.close()

    def clock(self, stage: str, step: int) -> Clock:
        """What times the parts of one step."""
        return Clock(self, f"{stage} {step + 1}")

    def add(self, part: str, whose: str, start: float, end: float) -> None:
        """A span between two times of `time.time()`, of the calling thread."""
        name = threading.current_thread().name
        with self._lock:
            if self._file.closed:  # a thread that outlived an error
                return
            if name not in self._threads:
                self._threads[name] = len(self._threads)
                self._write(
                    {"ph": "M", "name": "thread_name", "args": {"name": name}}, self._threads[name]
                )
            span = {"ph": "X", "name": part, "ts": start * 1e6, "dur": (end - start) * 1e6}
            self._write(span | {"args": {"step": whose}}, self._threads[name])
            self._file.flush()

    def _write(self, event: dict[str, Any], thread: int) -> None:
        with writing(self._path):
            self._file.write(json.dumps(event | {"pid": os.getpid(), "tid": thread}) + ",\n")


class Clock:
    """Wall seconds per part of a step, for the metrics `time/<part>` and the timeline."""

    def __init__(self, timeline: Timeline, whose: str):
        self.seconds: dict[str, float] = {}
        self._timeline, self._whose = timeline, whose

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times a `with` block."""
        start, began = time.time(), time.monotonic()
        yield
        spent = time.monotonic() - began
        self.seconds[part] = self.seconds.get(part, 0.0) + spent
        self._timeline.add(part, self._whose, start, start + spent)
