"""The folder of a run: one run at a time has it, and what has begun there keeps its settings."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from vtriune_jax.config import STARTED_IN, flatten
from vtriune_jax.config_tables import FREE
from vtriune_jax.errors import UserError

LOCK = ".lock"
"""Who has the folder; the lock on it ends with the process, the file stays."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that has no locks."""


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Has the folder, which is made if need be, for this process alone.

    Where the file system has no locks nobody is kept out. Raises UserError if another process has
    it, or if it cannot be written.
    """
    with _locked(workdir):
        yield


def settle(config: Any, workdir: Path) -> None:
    """Checks that what has begun in the folder had these settings; else the run begins with them.

    Raises UserError, with the old and the new values, if a key outside of FREE changed: a resumed
    run would then not be the run that it continues. Nothing is written into a folder where a run
    has begun: that is left to `record`, when it really goes on.
    """
    with _writable(workdir):
        old = _recorded(workdir)
        changed = _changed(old, flatten(_noted(config)), config.stages[-1]) if old else []
        if not begun(workdir):
            if changed:
                ours = not (old["model.path"] or config.model.path)
                _forget(workdir, [key for key, _, _ in changed], ours)
            record(config, workdir)
            return
    if changed:
        values = "; ".join(f"{key} {before} → {now}" for key, before, now in changed)
        raise UserError(
            f"{workdir} holds a run with other settings ({values}): "
            "choose a new --workdir, or the old settings to resume it"
        )
    last = config.stages[-1]
    steps, done = config[last].steps, max(saved_steps(workdir / "checkpoints" / last), default=0)
    if steps < done:
        raise UserError(
            f"{last}.steps={steps}, but the run in {workdir} has trained {done} steps already: "
            f"choose {done} or more, or a new --workdir (vtriune_jax.export gives the model of an "
            "earlier checkpoint)"
        )


def record(config: Any, workdir: Path) -> None:
    """Writes `config.json` into the folder: the settings, and where the run was started."""
    with _writable(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        scratch = workdir / "config.json.part"
        scratch.write_text(json.dumps(_noted(config), indent=2) + "\n")
        scratch.replace(workdir / "config.json")


def begun(workdir: Path) -> bool:
    """Whether there is something that training has made: a checkpoint, or a line of metrics."""
    metrics = workdir / "metrics.jsonl"
    checkpoints = workdir.glob("checkpoints/*/*")
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(
        re.fullmatch(r"\d+|unreadable-.*", path.name) for path in checkpoints
    )


def saved_steps(directory: Path) -> list[int]:
    """The steps that are complete in a directory, which may be missing or in use by a run."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def is_of_a_run(settings: Any) -> bool:
    """Whether they are what `record` writes, and not the `config.json` of a model, say."""
    return (
        isinstance(settings, dict) and "stages" in settings and "path" in settings.get("model", {})
    )


def _locked(workdir: Path) -> TextIO:
    with _writable(workdir), ExitStack() as stack:
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((workdir / LOCK).open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            whose = file.read().strip() or "another process"
            raise UserError(
                f"--workdir={workdir} is in use by {whose}; wait for it, or choose another "
                "--workdir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        stack.pop_all()
        return file


def _noted(config: Any) -> dict[str, Any]:
    """As it is written and read: tuples are lists in JSON."""
    return json.loads(json.dumps({**config.to_dict(), STARTED_IN: str(Path.cwd())}))


def _recorded(workdir: Path) -> dict[str, Any]:
    """The flat settings of the run that is or was here, {} if there is none."""
    file = workdir / "config.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); choose another --workdir") from None
    if not is_of_a_run(found):
        raise UserError(f"{file} is not of a run, but of a model perhaps: choose another --workdir")
    return flatten(found)


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], last_stage: str
) -> list[tuple[str, str, str]]:
    """(key, old, new) of the settings that a run must keep."""
    free = rf"{FREE}|{last_stage}\.steps|{STARTED_IN}"
    return [
        (key, json.dumps(old.get(key)), json.dumps(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not re.fullmatch(free, key)
    ]


def _forget(workdir: Path, changed: Collection[str], ours: bool) -> None:
    """Removes what other settings made before training; `model` only if `ours`, a tiny one."""
    (workdir / "heldout_before.json").unlink(missing_ok=True)
    if ours and any(re.fullmatch(r"seed|model\.tiny\..*", key) for key in changed):
        shutil.rmtree(workdir / "model", ignore_errors=True)


@contextmanager
def _writable(workdir: Path) -> Iterator[None]:
    """Turns what the system says against writing into one line; a full disk is told by `main`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"--workdir={workdir} cannot be written: {error.strerror}; choose a folder of yours"
        ) from error
