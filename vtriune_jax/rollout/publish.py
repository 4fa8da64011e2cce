"""Versions of the trainer's model as folders that inference servers load.

    publisher = Publisher(Path("/dev/shm/run"), config, reference=checkpoint, frozen=("^visual/",))
    published = publisher.publish(params, version=7)        # /dev/shm/run/version-00000007
    publisher.collect(in_use={6})                           # old ones go

A version is a whole checkpoint folder in the hub's layout, which appears at once, complete and on
disk. Parameters that never change are written once and linked into later versions. The folder may
be memory (tmpfs), a disk or a mounted bucket; of several hosts, which each write a part of the
files, it must be the same one. It belongs to one run alone.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

from vtriune_jax import hosts
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, abstract, weights, writing
from vtriune_jax.models.files import PIECE, Written
from vtriune_jax.models.lora import is_adapter, merging
from vtriune_jax.models.pretrained import MAX_SHARD_BYTES, check_param_dtype, config_text

MANIFEST = "manifest.json"
"""File → (size, XXH3), of all files of a version but itself."""
_VERSION, _VERSION_GLOB = "version-{:08d}", "version-*"
_NOTE = "written-{}.json"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
"""What a file system says that cannot link these two files."""


T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A version that is there, and what it cost."""

    version: int
    folder: Path
    gather_seconds: float
    """Waiting for tensors from the devices …"""
    write_seconds: float
    """… while others were written, by this process."""
    seconds: float
    """From beginning to end."""
    bytes: int
    """Written by all processes; links are not counted."""


class Publisher:
    """Writes versions into one folder, and removes them again."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        reference: Path,
        frozen: Sequence[str] = (),
        dtype: str = "bfloat16",
        keep: int = 2,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        extras: Sequence[Path] = (),
    ):
        """Remove what a killed run has left in `folder`, and check what will be written.

        `reference` is the checkpoint that the servers have started with, and `frozen` are regexes,
        searched in the paths of parameters that this run never changes. `extras` are files that a
        server wants beside the weights (tokenizer, image processor); `keep` so many of the newest
        versions stay in any case.

        Raises UserError, for one naming the tensor that the servers have in another shape.
        """
        check_param_dtype(dtype)
        self.folder, self._config, self._keep = folder.absolute(), config, keep
        self._dtype, self._extras = np.dtype(jnp.dtype(dtype)), tuple(extras)
        self._shapes = {p: leaf.shape for p, leaf in weights.flatten(abstract(config)[1]).items()}
        stored = {path: shape for path, shape in self._shapes.items() if not is_adapter(path)}
        wanted = writing.parts(stored, config.vision.patch_shape)
        check_like(reference, {part.entry.key: part.shape for part in wanted}, tied=config.tied)
        constant = {path for path in stored if self._is_constant(path, frozen)}
        self._constant = [part for part in wanted if part.entry.path in constant]
        self._changing = [part for part in wanted if part.entry.path not in constant]
        self._slots: dict[str, writing.Slot] = {}
        for group, parts in enumerate((self._changing, self._constant)):
            size, processes = self._dtype.itemsize, jax.process_count()
            dealt = writing.deal(parts, size, max_shard_bytes, processes)
            self._slots |= {key: (group, *slot) for key, slot in dealt.items()}
        names = writing.name_slots(self._slots.values())
        self._placed = {key: names[slot] for key, slot in self._slots.items()}
        self._versions: list[int] = []
        if hosts.is_first():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(f".{_VERSION_GLOB}"):
                    shutil.rmtree(left)
            except OSError as error:
                raise UserError(
                    f"cannot use the folder {folder} for weights ({error.strerror}); choose another"
                ) from None

    def publish(self, params: Mapping[str, Any], version: int) -> Published:
        """Write a version; all processes call this together, with the same version.

        Adapters go into the matrices that they adapt. Raises UserError on all processes, and leaves
        nothing behind, if one of them cannot write, or if the parameters are not the config's.
        """
        start = time.monotonic()
        flat = weights.flatten(params)
        self._check(flat)
        folder = self.folder / _VERSION.format(version)
        scratch = folder.with_name(f".{folder.name}.part")
        wanted = self._changing if self._versions else [*self._changing, *self._constant]
        self._together(scratch, lambda: scratch.mkdir() if hosts.is_first() else None)
        report = self._together(scratch, lambda: self._write(scratch, flat, wanted))
        self._together(
            scratch, lambda: self._complete(scratch, folder) if hosts.is_first() else None
        )
        self._versions = [each for each in self._versions if each != version] + [version]
        numbers = sum(math.prod(part.shape) for part in wanted)
        return Published(
            version=version,
            folder=folder,
            gather_seconds=report.gather,
            write_seconds=report.write,
            seconds=time.monotonic() - start,
            bytes=numbers * self._dtype.itemsize,
        )

    def collect(self, in_use: Collection[int]) -> None:
        """Remove all versions but the newest and those that any process says are in use.

        All processes call this together.
        """
        used = np.array(hosts.gather([version in in_use for version in self._versions]), bool)
        newest = self._versions[-self._keep :]
        self._versions = [
            version
            for i, version in enumerate(self._versions)
            if used[:, i].any() or version in newest
        ]
        kept = {_VERSION.format(version) for version in self._versions}
        if hosts.is_first():
            for old in self.folder.glob(_VERSION_GLOB):
                if old.name not in kept:
                    _remove(old)

    def _is_constant(self, path: str, frozen: Sequence[str]) -> bool:
        adapted = f"{path.rpartition('/')[0]}/lora/a" in self._shapes and path.endswith("kernel")
        return not adapted and any(re.search(pattern, path) for pattern in frozen)

    def _check(self, flat: Mapping[str, jax.Array]) -> None:
        """UserError unless these are the config's parameters: others would kill the servers."""
        for path in sorted(self._shapes.keys() | flat.keys()):
            expected = self._shapes.get(path)
            found = flat[path].shape if path in flat else None
            if found != expected:
                raise UserError(
                    f"cannot publish the parameter {path!r}: its shape is {found} where the "
                    f"model's config has {expected}; publish the model that the servers serve"
                )

    def _write(
        self, scratch: Path, flat: Mapping[str, jax.Array], wanted: Sequence[writing.Part]
    ) -> writing.Report:
        """This process's files, and a note of them for the first process."""
        process, whole = jax.process_index(), None
        if jax.process_count() > 1:
            where = cast(NamedSharding, next(iter(flat.values())).sharding)
            whole = NamedSharding(where.mesh, PartitionSpec())
        report = writing.write_files(
            scratch,
            wanted,
            self._placed,
            {self._placed[key] for key, slot in self._slots.items() if slot[1] == process},
            merging(flat.__getitem__, flat, self._config),
            self._dtype,
            whole,
        )
        (scratch / _NOTE.format(process)).write_text(json.dumps(report.files))
        return report

    def _complete(self, scratch: Path, folder: Path) -> None:
        """Everything else that a version has; then it gets its name."""
        found: dict[str, Any] = {}
        for process in range(jax.process_count()):
            note = scratch / _NOTE.format(process)
            if not note.exists():
                raise OSError(errno.ENOENT, f"what host {process} has written is not there")
            found |= json.loads(note.read_text())
            note.unlink()
        if self._versions:
            last = self.folder / _VERSION.format(self._versions[-1])
            for name, written in _manifest(last).items():
                if name not in found:
                    _link(last / name, scratch / name)
                    found[name] = written
        else:
            text = config_text(self._config, self._dtype.name)
            (scratch / "config.json").write_text(text)
            parts = [*self._changing, *self._constant]
            (scratch / weights.INDEX).write_text(writing.index(parts, self._placed, self._dtype))
            for file in self._extras:
                shutil.copyfile(file, scratch / file.name)
            for file in scratch.iterdir():
                if file.name not in found:
                    found[file.name] = measured(file)
                    _sync(file)
        (scratch / MANIFEST).write_text(json.dumps({"files": found}, indent=2))
        _sync(scratch / MANIFEST)
        _sync(scratch)
        if folder.exists():
            _remove(folder)
        scratch.rename(folder)
        _sync(self.folder)

    def _together(self, scratch: Path, work: Callable[[], T]) -> T:
        """The result of the work on all processes; UserError on all if it fails on one."""
        try:
            with hosts.together():
                try:
                    return work()
                except OSError as error:
                    raise UserError(
                        f"cannot write weights to {self.folder} ({error.strerror or error}); free "
                        "space, or choose another folder, which all hosts share"
                    ) from error
        except UserError:
            if hosts.is_first():
                shutil.rmtree(scratch, ignore_errors=True)
            raise


def check_like(reference: Path, ours: Mapping[str, tuple[int, ...]], *, tied: bool = False) -> None:
    """UserError unless a checkpoint folder has tensors of just these keys and shapes.

    A head that is stored though it is tied to the embedding does not count.
    """
    theirs = {key: tensor.shape for key, tensor in weights.stored(reference).items()}
    if tied:
        theirs.pop("lm_head.weight", None)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{key!r} would be published with the shape {ours.get(key)}, but the servers' "
                f"checkpoint {reference} has {theirs.get(key)}, and a wrong shape kills a server; "
                "start trainer and servers from one checkpoint"
            )


def verify(folder: Path) -> None:
    """UserError naming the file of a version that is missing, cut short or altered."""
    try:
        expected = {name: Written(*written) for name, written in _manifest(folder).items()}
        found = {name: measured(folder / name) for name in expected}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a whole version ({error}); publish it again") from None
    for name, written in expected.items():
        if found[name] != written:
            raise UserError(
                f"{folder / name} is damaged: {found[name]} where {MANIFEST} has {written}; "
                "publish the version again"
            )


def measured(file: Path) -> Written:
    """Size and checksum of a file, now."""
    size, checksum = 0, xxhash.xxh3_64()
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            size += len(piece)
            checksum.update(piece)
    return Written(size, checksum.hexdigest())


def _manifest(folder: Path) -> dict[str, list[Any]]:
    return json.loads((folder / MANIFEST).read_text())["files"]


def _link(old: Path, new: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(old, new)
        _sync(new)


def _remove(folder: Path) -> None:
    """Out of sight first: half a folder never has a version's name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old)


def _sync(path: Path) -> None:
    """Onto the disk, where that is a thing (mounted buckets know no fsync of folders)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
