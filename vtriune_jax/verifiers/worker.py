"""The process in which completions are judged, one at a time, and may do as they please.

Started by `pool` as `python -m vtriune_jax.verifiers.worker FD`, FD being its end of a pipe. It
imports neither JAX nor much else, so that a new one is there in a blink when the old one had to be
killed; and it ends with its parent, even in mid-thought.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

MEMORY_LIMIT = 2 * 2**30
"""Bytes of address space: what makes SymPy blow up ends in MemoryError, not in swap."""


def guarded(function: Callable[..., Any], *args: Any) -> Any:
    """Call foreign code; what it raises becomes the value.

    The one broad `except` of the package: a verifier is code of third parties fed with text that a
    model made up. Whatever goes wrong in it concerns one completion and must not end the training.
    """
    try:
        return function(*args)
    except Exception as error:
        return error


def describe(error: Exception) -> str:
    """An exception as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def judge(name: str, *args: Any) -> Any:
    """Parts of the reward, or the reason (a string) why there are none."""
    parts = guarded(import_module(f"vtriune_jax.verifiers.{name}").verify, *args)
    return describe(parts) if isinstance(parts, Exception) else parts


def main(fd: int) -> None:
    """Answer `(name, args, limit)` with parts or a reason, until the other end closes.

    `(name, None, _)` only imports the verifier: the time that takes is not the completion's.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    # The other end may close while we answer, too, if its process was killed.
    with contextlib.suppress(EOFError, ConnectionError), Connection(fd) as parent:
        while True:
            name, args, limit = parent.recv()
            if args is None:
                problem = guarded(import_module, f"vtriune_jax.verifiers.{name}")
                parent.send(describe(problem) if isinstance(problem, Exception) else None)
                continue
            # Our parent kills us at `limit`. Should it be gone by then, this signal does: its
            # default action needs no cooperation from the interpreter.
            signal.setitimer(signal.ITIMER_REAL, limit + 1)
            answer = judge(name, *args)
            signal.setitimer(signal.ITIMER_REAL, 0)
            parent.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
