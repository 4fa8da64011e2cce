"""Checkpoints with Orbax: the state and whatever else a run needs to go on, one directory a step.

    <directory>/<step>/state   parameters, optimizer and step counter
    <directory>/<step>/extra   JSON: data order, stage, progress, …, and the shapes of the arrays
    <directory>/<step>/waiting completions that are sampled and not trained on yet, if there are any

A step directory gets its final name when it is complete, so a kill in mid-save leaves only a
temporary directory, which the next start ignores and removes. Saving goes on in the background.
Several processes save and restore together, each its own part of the arrays, in a folder that all
of them see.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from vtriune_jax import hosts
from vtriune_jax.errors import UserError
from vtriune_jax.types import TrainState
from vtriune_jax.writers import no_space, writing


class Restored(NamedTuple):
    """What `Checkpointer.save` was given."""

    state: TrainState
    extra: dict[str, Any]
    waiting: dict[str, np.ndarray]


class Checkpointer:
    """Saves every `every` steps, keeps the newest `keep`, restores the newest that can be read."""

    def __init__(self, directory: str | os.PathLike[str], every: int, keep: int):
        self._directory = Path(directory).absolute()
        self._every = every
        with writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
                ),
            )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and hosts.share().count > 1:
            return  # what is being saved waits for processes that may be gone, as this one will be
        self.close()

    def due(self, step: int) -> bool:
        """Whether it is time to save."""
        return step % self._every == 0

    def save(
        self,
        step: int,
        state: TrainState,
        extra: Mapping[str, Any],
        waiting: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Starts to save `state`, `extra` (what JSON can say) and arrays of the host (`waiting`).

        A step is saved only once.

        The caller may donate or change both as soon as this returns: on accelerators Orbax has
        copied the arrays to the host by then; on CPUs it reads them in place, and JAX does not give
        away a buffer while it is being read. An error of an earlier save shows here, too.
        """
        if step in self._manager.all_steps():
            return
        record = {
            "layout": layout(state),
            "extra": json.loads(json.dumps(extra)),
            "waiting": {name: [str(x.dtype), *x.shape] for name, x in (waiting or {}).items()},
        }
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.JsonSave(record)}
        if waiting:
            items["waiting"] = ocp.args.StandardSave(dict(waiting))
        with self._disk_space():
            self._check_space(state, waiting or {})
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract_state: TrainState, *, donate: bool = False) -> Restored | None:
        """The newest readable checkpoint; None when there is none at all.

        `abstract_state` gives shapes, dtypes and shardings (`jax.ShapeDtypeStruct`s or arrays);
        with `donate` its arrays give up their memory, if there is a checkpoint. A newer checkpoint
        that cannot be read is renamed to `unreadable-<step>-…`, with a warning.

        Raises:
          UserError: the checkpoint is of another model or optimizer, or none can be read.
        """
        with _without_late_answers():
            return self._restore(abstract_state, donate)

    def _restore(self, abstract_state: TrainState, donate: bool) -> Restored | None:
        target = jax.tree.map(_abstract, abstract_state)
        steps = hosts.from_first(lambda: sorted(self._manager.all_steps(), reverse=True))
        if steps and donate:
            for array in jax.tree.leaves(abstract_state):
                array.delete()
        faults: dict[int, Exception] = {}
        for step in steps:
            restored = None
            try:
                restored = self._read(step, target)
            except UserError:
                raise
            except Exception as error:  # what Orbax raises for an unreadable array is no narrower
                if type(error) is not Exception and not isinstance(error, _UNREADABLE):
                    raise
                faults[step] = error
            if all(hosts.gather(bool(restored))) and restored:
                self._set_aside(faults, step)
                return restored
            faults.setdefault(step, OSError("another process cannot read it"))
        if steps:
            raise UserError(
                f"no checkpoint in {self._directory} can be read (steps {sorted(steps)}; newest: "
                f"{_line(faults[steps[0]])}); bring back a copy, or start over in another --workdir"
            )
        return None

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        with self._disk_space():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends Orbax's threads."""
        with self._disk_space():
            self._manager.close()

    def _read(self, step: int, target: TrainState) -> Restored:
        args = ocp.args.Composite(extra=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=args)["extra"]
        self._check_layout(step, record["layout"], layout(target))
        items = {"state": ocp.args.StandardRestore(target)}
        if record["waiting"]:
            kinds = record["waiting"].items()
            arrays = {name: np.empty(shape, dtype) for name, (dtype, *shape) in kinds}
            items["waiting"] = ocp.args.StandardRestore(arrays)
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return Restored(found["state"], record["extra"], dict(found.get("waiting") or {}))

    def _check_layout(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        names = sorted(saved.keys() | wanted.keys())
        differing = [name for name in names if saved.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise UserError(
                f"checkpoint {self._directory / str(step)} is of another model or optimizer: "
                f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} "
                f"here ({len(differing)} of {len(names)} arrays differ); use the config it was "
                "written with, or another --workdir"
            )

    def _set_aside(self, faults: Mapping[int, Exception], restored: int) -> None:
        """Renames unreadable steps, so that they can be saved again, and says so."""
        for step, error in faults.items():
            name = f"unreadable-{step}-{time.time_ns()}"
            if hosts.is_first():
                (self._directory / str(step)).rename(self._directory / name)
            logging.warning(
                "checkpoint %s cannot be read (%s): kept as %s, going on from step %d instead",
                self._directory / str(step),
                _line(error),
                name,
                restored,
            )
        if faults:
            hosts.gather(None)  # renamed by now
            self._manager.reload()

    def _check_space(self, state: TrainState, waiting: Mapping[str, np.ndarray]) -> None:
        """Refuses to start what cannot be finished: Orbax's own reaction is pages of tracebacks."""
        self._manager.wait_until_finished()  # as saving does: what is being written takes space too
        needed = _OVERHEAD + sum(array.nbytes for array in waiting.values())
        needed += sum(array.nbytes for array in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise no_space(
                self._directory, f" ({needed / 2**20:.1f} MiB needed, {free / 2**20:.1f} MiB free)"
            )

    @contextmanager
    def _disk_space(self) -> Iterator[None]:
        try:
            with writing(self._directory):
                yield
        except ValueError as error:  # TensorStore's I/O errors; only its text names the cause
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            raise no_space(self._directory) from error


def layout(state: TrainState) -> dict[str, str]:
    """Path → dtype and shape of every array of a state."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def read_params(
    directory: Path,
    step: int,
    shapes: Mapping[str, tuple[int, ...]],
    place: Callable[[str, tuple[int, ...]], Sharding],
) -> Callable[[str], jax.Array]:
    """A function that reads one parameter by its path, to where `place` says; nothing else is read.

    Raises UserError if the step is of a model with other parameters, or cannot be read.
    """
    folder = (directory / str(step)).absolute()

    def restore(item: str, handler: Any, args: Any) -> Any:
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                return checkpointer.restore(folder / item, args=args)
        except _UNREADABLE as error:
            raise UserError(
                f"checkpoint {folder} cannot be read ({_line(error)}); choose another step"
            ) from error

    saved = restore("extra", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())["layout"]
    there = {
        name.removeprefix("params/"): kind
        for name, kind in saved.items()
        if name.startswith("params/")
    }
    here = {path: f"float32{list(shape)}" for path, shape in shapes.items()}
    for path in sorted(here.keys() | there.keys()):
        kinds = [params.get(path, "absent") for params in (there, here)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"checkpoint {folder} is of another model: {path} is {kinds[0]} there and "
                f"{kinds[1]} by config.json of the model the run started from"
            )

    def read(path: str) -> jax.Array:
        wanted: Any = jax.ShapeDtypeStruct(
            shapes[path], "float32", sharding=place(path, shapes[path])
        )
        for name in reversed(("params", *path.split("/"))):
            wanted = {name: wanted}
        args = ocp.args.PyTreeRestore(
            wanted, ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        return jax.tree.leaves(restore("state", ocp.PyTreeCheckpointHandler(), args))[0]

    return read


@contextmanager
def _without_late_answers() -> Iterator[None]:
    """Where the read of an array fails, Orbax closes its event loop at once, and TensorStore says
    so, with a traceback, for each other array whose read ends after that."""
    hook = sys.unraisablehook

    def others(found: Any) -> None:
        if not isinstance(found.exc_value, RuntimeError) or str(found.exc_value) != _LATE:
            hook(found)

    sys.unraisablehook = others
    try:
        yield
    finally:
        sys.unraisablehook = hook


_LATE = "Event loop is closed"
_OVERHEAD = 2**20
"""Bytes of a checkpoint that are not arrays, at most."""
_UNREADABLE = (ValueError, KeyError, OSError)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _line(error: Exception) -> str:
    """The first words of an error: TensorStore's texts are pages long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
