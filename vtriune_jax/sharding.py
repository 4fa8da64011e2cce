"""The mesh, and where every array lives on it: one table from parameter path to partition."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtriune_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
"""Rows of a batch."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"language/embed/embedding", ("tensor", "fsdp")),
    (r"language/head/kernel", ("fsdp", "tensor")),
    (r"visual/patch_embed/kernel", ("tensor", "fsdp")),
    (r".*/(q|k|v|qkv|gate|up|hidden)/kernel", ("fsdp", "tensor")),
    (r".*/(q|k|v|qkv|gate|up|hidden)/bias", ("tensor",)),
    (r".*/(o|proj|down|out)/kernel", ("tensor", "fsdp")),
    (r".*/(proj|down|out)/bias", (None,)),
    (r".*norm\d?/scale", (None,)),
    (r".*/(q|k|v|gate|up)/lora/a", ("fsdp", None)),
    (r".*/(q|k|v|gate|up)/lora/b", (None, "tensor")),
    (r".*/(o|down)/lora/a", ("tensor", None)),
    (r".*/(o|down)/lora/b", (None, "fsdp")),
)
"""path → axes of the last dimensions (layers are stacked in front of them and stay whole).

Matmuls that widen are cut by column over `tensor`, those that follow by row, so that a pair needs
one reduction; `fsdp` takes the other side. The rank of an adapter stays whole. Every parameter
matches exactly one line.
"""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; one of the three numbers may be -1, "the rest"."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    text = f"mesh data={data} fsdp={fsdp} tensor={tensor}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{text}: numbers must be positive, and at most one -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"{text} does not divide {len(devices)} devices: choose numbers of {divisors} whose "
            f"product is {len(devices)}, or -1 for the rest"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    kinds = (AxisType.Auto,) * 3
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices > 1:
        return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=kinds)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)


def _over_slices(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> Any:
    """Devices of several TPU slices, [data, fsdp, tensor]: only `data` crosses the slow network."""
    data, fsdp, tensor = sizes
    if data % slices:
        raise UserError(
            f"mesh.data={data} is not a multiple of the {slices} slices; choose {slices}"
        )
    inside = (data // slices, fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(rows: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """UserError unless every micro-batch has equally many rows on every device."""
    parts = micro_batches * row_shards(mesh)
    if rows % parts:
        lower = max(parts, rows // parts * parts)
        raise UserError(
            f"rows={rows} is not divisible by micro_batches×data×fsdp={micro_batches}×"
            f"{mesh.shape['data']}×{mesh.shape['fsdp']}={parts}; choose {lower} or {lower + parts}"
        )


def even_pieces(rows: int, mesh: Mesh | None, most: int) -> int:
    """How many equal pieces rows make that each lie on all devices: `most` or a divisor of it."""
    return math.gcd(rows // row_shards(mesh) if mesh else rows, most)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a parameter tree, or of a tree that holds some.

    The name of a leaf is its joined dict keys, so the moments of an optimizer state are found under
    their parameter's name and lie where it lies. Leaves without a name (counters) are replicated.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_name(path), leaf.shape, mesh)), tree
    )


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The partition of one parameter; a dimension that its axis does not divide stays whole."""
    if not path:
        return P()
    axes = rule(path)
    axes = (None,) * (len(shape) - len(axes)) + axes
    fits = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape, strict=True)
    ]
    return P(*fits)


def rule(path: str) -> tuple[str | None, ...]:
    """The table's axes for a path; KeyError unless exactly one line matches."""
    found = [axes for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise KeyError(f"{path} matches {len(found)} lines of sharding.RULES, not one")
    return found[0]


def shard_rows(tree: Any, mesh: Mesh) -> Any:
    """Put this process's rows of a batch on its devices, as part of the global one.

    What lies on devices of several processes is global already, and only moved to its place.
    UserError if the rows of all processes together do not divide by data × fsdp.
    """
    first = jax.tree.leaves(tree)[0]
    rows = first.shape[0] * (1 if _is_global(first) else jax.process_count())
    check_rows(rows, mesh)
    sharding = NamedSharding(mesh, ROWS)

    def place(x: Any) -> jax.Array:
        if _is_global(x) or jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def local_rows(tree: Any, mesh: Mesh) -> Any:
    """The inverse of `shard_rows`: this process's rows, as NumPy arrays."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(fetch, jax.device_put(tree, NamedSharding(mesh, ROWS)))


def check_hosts(mesh: Mesh) -> None:
    """UserError unless every process has as many rows as the others, and none in common with them.

    What is read, sampled and judged for a row is the business of one process.
    """
    owners = [
        {device.process_index for device in devices}
        for devices in mesh.devices.reshape(row_shards(mesh), -1)
    ]
    shape = " ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
    if any(len(owner) > 1 for owner in owners):
        raise UserError(
            f"mesh {shape} puts devices of several hosts in one group of `tensor`; choose a number "
            f"that divides the {jax.local_device_count()} devices of a host, or more of `fsdp`"
        )
    counts = Counter(index for owner in owners for index in owner)
    if len(set(counts.values())) > 1:
        raise UserError(f"mesh {shape} gives the hosts different numbers of rows: {dict(counts)}")


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
