"""The processes of a run, usually one a host: how they find each other and what they tell.

Every process runs the same loop on its own share of the prompts. Arrays meet inside jitted
functions over the mesh of all devices, checkpoints in Orbax; for the rest there is `gather`, which
shows every process a small plain value of each. Alone, a process talks to nobody here.

Prompt number i (of a stage, of an evaluation) belongs to process i mod n, so that any run of
consecutive prompts, from wherever it begins, lies on all processes equally.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from vtriune_jax.errors import UserError

LOST = re.compile(
    r"\bgloo\b|connection (closed|reset) by peer|coordination service|heartbeat", re.I
)
"""How JAX's errors speak of a process that is gone."""


INDEXED = {"JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"}
"""Variables of the environment that tell a Kubernetes pod that it is one of several."""


class Share(NamedTuple):
    """Process `index` of `count`."""

    index: int = 0
    count: int = 1

    @property
    def slice(self) -> slice:
        """Of a sequence that begins with prompt 0, the part that is this process's."""
        return slice(self.index, None, self.count)


def share() -> Share:
    """This process's share of the prompts."""
    return Share(jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this is the process that writes what is written once: metrics, reports, models."""
    return jax.process_index() == 0


def join(coordinator: str | None, processes: int | None, process: int | None, wait: int) -> None:
    """Waits for the other processes; the first call of JAX.

    Without any of the three, JAX looks for a cluster itself (TPU pods, Slurm, Open MPI, …), and
    where it finds none the process is alone.

    Raises:
      UserError: the flags do not belong together. When somebody has not come after `wait` seconds,
        the process says so and ends with status 2, out of a wait that nothing else can end.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    given = [name for name, value in flags.items() if value is not None]
    if given and len(given) < len(flags):
        missing = ", ".join(f"--{name}=…" for name in flags if name not in given)
        raise UserError(
            f"{missing} is missing: --coordinator, --processes and --process go together"
        )
    if given:
        _check_flags(str(coordinator), int(processes or 0), int(process or 0))
    elif "KUBERNETES_SERVICE_HOST" in os.environ and not os.environ.keys() & INDEXED:
        return  # an ordinary pod, over which JAX's detection would stumble
    if processes == 1:
        return
    words = f"process {process} of {processes}" if given else "this process"
    place = f" at {coordinator}" if given else ""
    alarm = threading.Timer(
        wait,
        _give_up,
        [
            f"{words} has waited {wait} s{place} and not all others have come; start the same "
            "command on every host, each with its own --process, and check that they reach each "
            "other"
        ],
    )
    alarm.daemon = True
    alarm.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    try:
        jax.distributed.initialize(
            coordinator, processes, process, initialization_timeout=wait + 60
        )
    except (RuntimeError, ValueError) as error:
        alone = "coordinator_address should be" in str(error) or "before any JAX" in str(error)
        if not given and alone:  # no cluster, or a program that has used JAX before
            return
        raise UserError(
            f"{words} could not join the others{place}: {str(error).splitlines()[0]}; check that "
            "every process has a --process of its own and that the port is free"
        ) from error
    finally:
        alarm.cancel()


def gather(value: Any) -> list[Any]:
    """The JSON-able `value` of every process, in their order; all must call it together."""
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_bytes(data: bytes) -> list[bytes]:
    """The `data` of every process, in their order; all must call it together, from the main thread:
    in other threads the processes would meet in different orders."""
    if jax.process_count() == 1:
        return [data]
    lengths = multihost_utils.process_allgather(np.array([len(data)])).ravel()
    room = 1 << int(lengths.max()).bit_length()  # few different sizes: each is compiled once
    rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(room), np.uint8))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process, on all of them; it is called there only."""
    with together():
        value = make() if is_first() else None
    return gather(value)[0]


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave with a UserError if one of them does.

    In it nobody may wait for another.
    """
    fault = None
    try:
        yield
    except UserError as error:
        fault = error
    faults = gather(str(fault) if fault else None)
    if fault:
        raise fault
    for index, words in enumerate(faults):
        if words:
            raise UserError(f"process {index}: {words}")


def check_same(what: str, values: dict[str, Any]) -> None:
    """UserError on every process unless all have the same `values`, with the first that differs."""
    ours, *others = gather(values)
    for index, theirs in enumerate(others, start=1):
        for key in sorted(ours.keys() | theirs.keys()):
            one, other = ours.get(key), theirs.get(key)
            if one != other:
                raise UserError(
                    f"the processes have different {what}: {key} is {one!r} for process 0 and "
                    f"{other!r} for process {index}; start all of them with the same"
                )


def check_shared(folder: Path, patience: float = 60.0) -> None:
    """UserError unless all processes see the same folder, as checkpoints need."""
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all"
    word = from_first(lambda: uuid.uuid4().hex)
    with together():
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(word)
    with together():
        end = time.monotonic() + patience
        while not (mark.exists() and mark.read_text() == word):
            if time.monotonic() > end:
                raise UserError(
                    f"--workdir={folder} is not the folder that process 0 sees there; all hosts "
                    "need one that they share, such as a network file system or a mounted bucket"
                )
            time.sleep(0.1)
    if is_first():
        mark.unlink()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return jax.distributed.is_initialized() and bool(LOST.search(str(error)))


def leave(status: int) -> None:
    """Ends this process at once, with the traceback of the error in flight if it is a bug's.

    For a process that fails among others: they wait for it in vain until it is gone, and JAX would
    have it wait for them. Returns where nobody has been joined.
    """
    if not jax.distributed.is_initialized():
        return
    if sys.exc_info()[1]:
        traceback.print_exc()
    _end(status)


def _check_flags(coordinator: str, processes: int, process: int) -> None:
    if not re.fullmatch(r"[^:]+:\d{1,5}|\[.+\]:\d{1,5}", coordinator):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT, of the host of process 0")
    if processes < 1:
        raise UserError(f"--processes={processes} must be above 0")
    if not 0 <= process < processes:
        raise UserError(
            f"--process={process} is not in 0 … {processes - 1}, as --processes={processes} asks"
        )


def _give_up(words: str) -> None:
    print(f"error: {words}", file=sys.stderr)
    _end(2)


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
