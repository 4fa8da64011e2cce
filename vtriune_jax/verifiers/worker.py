"""The process in which completions are judged, one task at a time, and may do as they please.

Started by `pool` as `python -m vtriune_jax.verifiers.worker FD`, FD being its end of a socket. It
imports only what the verifiers asked for need, so that a new one is there in a blink when the old
one had to be killed; and it ends with its parent, even in mid-thought.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vtriune_jax.verifiers.pipe import receive, send

MEMORY_LIMIT = 2**30
"""Bytes of data: what makes SymPy blow up ends in MemoryError, not in swap. Address space that is
only reserved, as JAX and malloc do by the gigabyte, does not count."""
_RETIREMENT = MEMORY_LIMIT // 2
"""Resident bytes with which a worker asks to be replaced, lest its next task find no memory."""
_GARBAGE = 50_000
"""New objects after which garbage is looked for: more than a chunk of lists of boxes has at once.
By Python's default of 700, half the time of judging them would go into looking."""
_STATM = Path("/proc/self/statm")

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments and keyword arguments of one call."""


def guarded(function: Callable[..., Any], *args: Any) -> Any:
    """Call foreign code; what it raises becomes the value.

    The one `except` of the package that lets nothing pass: a verifier is code of third parties fed
    with text that a model made up. Whatever goes wrong in it concerns one completion and must not
    end the training.
    """
    try:
        return function(*args)
    except Exception as error:
        return error


def describe(error: Exception) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def judge(module: str, function: str, calls: Sequence[Call]) -> list[Any]:
    """Parts of the reward, or the reason (a string) why there are none, for each of `calls`.

    `verify_batch` gets them all at once, any other `function` of the module one after the other.
    """
    called = getattr(import_module(module), function)
    if function == "verify_batch":
        answers = guarded(called, [args for args, _ in calls])
        if not isinstance(answers, list) or len(answers) != len(calls):
            wrong = ValueError(f"{module}.verify_batch did not return a list of {len(calls)}")
            answers = [answers if isinstance(answers, Exception) else wrong] * len(calls)
    else:
        answers = [guarded(partial(called, **keywords), *args) for args, keywords in calls]
    return [describe(each) if isinstance(each, Exception) else each for each in answers]


def _load(module: str) -> bool | str:
    """Import a verifier: whether it judges whole batches; the reason if it cannot be imported."""
    loaded = guarded(import_module, module)
    if isinstance(loaded, Exception):
        return describe(loaded)
    gc.freeze()  # SymPy alone is several hundred thousand objects, none of them garbage
    return hasattr(loaded, "verify_batch")


def main(fd: int) -> None:
    """Answer until the other end closes.

    `("load", module)` with what `_load` says: the time that takes is not the completion's.
    `("judge", tasks, limit)`, a task being `(module, function, calls)`, with one message per task,
    `(answers, whether a new worker should take over)`.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.set_threshold(_GARBAGE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    # The other end may close while we answer, too, if its process was killed.
    with contextlib.suppress(EOFError, ConnectionError), socket.socket(fileno=fd) as parent:
        while True:
            match receive(parent):
                case "load", module:
                    send(parent, _load(module))
                case "judge", tasks, limit:
                    for task in tasks:
                        # Our parent kills us at `limit`. Should it be gone by then, this signal
                        # does: its default action needs no cooperation from the interpreter.
                        signal.setitimer(signal.ITIMER_REAL, limit + 1)
                        answers = judge(*task)
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        send(parent, (answers, _resident() > _RETIREMENT))


def _resident() -> int:
    """Bytes of memory in use now; 0 where the system does not tell (its peak is no substitute)."""
    if not _STATM.exists():
        return 0
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]))
