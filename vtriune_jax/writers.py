"""A run on disk and on the terminal: metrics.jsonl, TensorBoard, progress lines, summary.json.

Everything lies in the workdir and is plain to read. A process that is killed at any moment leaves
at worst a torn last line, which the next start removes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vtriune_jax.errors import UserError
from vtriune_jax.metrics import SourceMean, mean_over_sources

# protobuf makes these classes at import time, out of a type checker's sight
Event, SessionLog = event_pb2.Event, event_pb2.SessionLog  # pyright: ignore


class MetricsWriter:
    """Writes one line per step to `workdir/metrics.jsonl`, and the same scalars for TensorBoard.

    `step` counts on over the stages of a run. Both files are flushed with every line. TensorBoard's
    events are written in the caller's thread: tensorboardX's usual writer has a thread of its own,
    which a full disk kills silently, whereupon the training blocks on a queue nobody empties.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._path = Path(workdir) / "metrics.jsonl"
        self._events: EventsWriter | None = None
        self._purge: int | None = None
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open_repaired(self._path)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, step: int) -> None:
        """Forgets the lines of `step` and later: a run that goes on at `step` writes them anew."""
        self._file.close()
        with writing(self._path):
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] < step]
            if len(kept) < len(lines):
                write_atomic(self._path, "".join(kept))
            self._file = _open_repaired(self._path)
        self._purge = step

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Adds a line; a value that is not finite becomes `null`, as JSON knows no NaN."""
        line = {"step": step, "stage": stage}
        line |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._write_events(step, metrics)

    def close(self) -> None:
        """Closes the files."""
        with writing(self._path):
            self._file.close()
            if self._events:
                self._events.close()

    def _write_events(self, step: int, metrics: Mapping[str, float]) -> None:
        events = self._events = self._events or self._open_events()
        for name, value in metrics.items():
            scalar = summary.scalar(name, value)
            events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
        events.flush()

    def _open_events(self) -> EventsWriter:
        folder = self._path.parent / "tensorboard"
        folder.mkdir(exist_ok=True)
        events = EventsWriter(str(folder / f"events.{os.getpid()}"))
        if self._purge is not None:  # TensorBoard then drops what older files say from here on
            start = SessionLog(status=SessionLog.START)
            events.write_event(Event(wall_time=time.time(), step=self._purge, session_log=start))
        return events


class Progress:
    """Progress for a person: at most one line every `every` seconds, and one at a stage's end.

        grpo   40/120 · 0.84 steps/s · 1m35s left · reward 0.41 (count 0.50, ocr 0.33) · loss 0.02

    The numbers are means over the steps since the line before. Lines go to `stream` (None: stdout)
    and are added to `workdir/progress.log`; no terminal codes, so that both read well anywhere.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        every: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path = Path(workdir) / "progress.log"
        self._every, self._stream, self._clock = every, stream, clock
        self._stage = ""
        self._start = (0, 0.0)
        self._shown = 0.0
        self._seen: dict[str, list[float]] = {}

    def __call__(self, stage: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Reports that `step` of `total` steps of the stage are done (so the first call says 1)."""
        now = self._clock()
        if stage != self._stage:  # the speed is counted from here: the first step compiles
            self._stage, self._start, self._shown, self._seen = stage, (step, now), -math.inf, {}
        for name, value in metrics.items():
            if name.split("/")[0] in ("reward", "loss", "verifier_failed"):
                self._seen.setdefault(name, []).append(value)
        if now - self._shown < self._every and step < total:
            return
        self._say(
            " · ".join([f"{stage}  {step:>{len(str(total))}}/{total}", *self._facts(step, total)])
        )
        self._shown, self._seen = now, {}

    def _facts(self, step: int, total: int) -> Iterator[str]:
        start, since = self._start
        elapsed = self._clock() - since
        if step > start and elapsed > 0:
            speed = (step - start) / elapsed
            yield f"{speed:.3g} steps/s"
            yield f"{duration((total - step) / speed)} left"
        means = {name: sum(values) / len(values) for name, values in self._seen.items()}
        sources = [f"{n[7:]} {v:.2f}" for n, v in sorted(means.items()) if n.startswith("reward/")]
        failed = [mean for name, mean in means.items() if name.startswith("verifier_failed/")]
        if any(failed):
            yield f"verifier failed {sum(failed) / len(failed):.0%}"
        if "reward" in means:
            yield f"reward {means['reward']:.3f}" + (f" ({', '.join(sources)})" if sources else "")
        if "loss" in means:
            yield f"loss {means['loss']:.3g}"

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
        with writing(self._path), self._path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def write_summary(
    workdir: str | os.PathLike[str],
    before: Mapping[str, SourceMean],
    after: Mapping[str, SourceMean],
    steps: int,
    seconds: float,
    devices: Sequence[str],
) -> None:
    """Writes `workdir/summary.json`, atomically: the held-out rewards of a finished run.

    A source of which nothing could be judged is left out.
    """
    write_atomic(
        Path(workdir) / "summary.json",
        json.dumps(
            {
                "before": {s: mean.reward for s, mean in before.items() if mean.count},
                "after": {s: mean.reward for s, mean in after.items() if mean.count},
                "steps": steps,
                "seconds": round(seconds, 1),
                "devices": list(devices),
            },
            indent=2,
        )
        + "\n",
    )


def summary_table(before: Mapping[str, SourceMean], after: Mapping[str, SourceMean]) -> str:
    """Held-out reward per source before and after, for the terminal; sources weigh the same."""
    rows = [("source", "before", "after", "change", "judged", "failed")]
    for source, b, a in paired(before, after):
        rows.append((source, *changes(b.reward, a.reward), str(a.count), str(a.failed)))
    last = changes(mean_over_sources(before), mean_over_sources(after))
    judged, failed = (sum(getattr(m, what) for m in after.values()) for what in ("count", "failed"))
    rows.append(("mean", *last, str(judged), str(failed)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    rule = "  ".join("─" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def paired(
    before: Mapping[str, SourceMean], after: Mapping[str, SourceMean]
) -> Iterator[tuple[str, SourceMean, SourceMean]]:
    """Source by source, with an empty mean where one side lacks it."""
    for source in sorted(before.keys() | after.keys()):
        yield source, before.get(source, _NOTHING), after.get(source, _NOTHING)


def changes(before: float | None, after: float | None) -> tuple[str, str, str]:
    """The two numbers and their difference as text; – for what is not known."""
    change = None if before is None or after is None else after - before
    return _number(before), _number(after), _number(change, "+.3f")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file such that a reader or a kill sees the old content or the new one, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a disk that is full, or that we may not write to, into one line a user can act upon."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {os.fspath(path)} ({os.strerror(error.errno)}); choose a --workdir "
                "that this user may write to"
            ) from error
        raise


def no_space(path: str | os.PathLike[str], detail: str = "") -> UserError:
    """The error for a full disk or quota."""
    return UserError(
        f"no space left to write {os.fspath(path)}{detail}; free some space (a lower "
        "checkpoint.keep helps), then start the same command again: it goes on where it can"
    )


_NOTHING = SourceMean(None, 0)


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    head, *numbers = (
        text.ljust(width) if index == 0 else text.rjust(width)
        for index, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return [head, *numbers]


def _open_repaired(path: Path) -> TextIO:
    """Opens for appending, after cutting off a last line that a kill left without its end."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    return path.open("a", encoding="utf-8")
