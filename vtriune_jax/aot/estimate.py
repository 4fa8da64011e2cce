"""Compile a program and say what it would take: memory, traffic, a bound on its time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import jax
from jax.sharding import Mesh

from vtriune_jax import sharding
from vtriune_jax.aot import flops, hlo
from vtriune_jax.aot.compiling import attempt, memory_of, needed_bytes
from vtriune_jax.aot.held import param_bytes
from vtriune_jax.aot.program import Program
from vtriune_jax.aot.sampling import sampling_bytes
from vtriune_jax.aot.topology import Topology

GIB = 2**30
LARGEST = 8
"""So many of the largest buffers are named."""


@dataclass(frozen=True)
class Estimate:
    """The fields are the keys of the JSON file.

    Where the program does not fit, or jaxlib cannot read it, there is no text of it: traffic and
    times are None.
    """

    config: str
    stages: tuple[str, ...]
    """Of the config; the numbers are of the last one."""
    topology: str
    num_slices: int
    devices: int
    mesh: dict[str, int]
    fits: bool
    bytes_per_device: int
    """Arguments, temporaries, results that do not lie in the arguments' place, and what is held."""
    bytes_limit: int
    argument_bytes: int
    temp_bytes: int
    held_bytes: int
    """Of what training holds besides, at most: a reference model, image features."""
    tokens_per_step: int
    """Token slots of one update, padding included."""
    model_flops_per_step: float
    """`flops.model_flops`, all devices together."""
    executed_flops_per_step: float
    """`flops.executed_flops`: with what remat repeats and attention masks."""
    compile_seconds: float
    memory_bytes_per_step: float | None = None
    """Read and written by one device."""
    collective_bytes_per_step: float | None = None
    """Sent by one device to others, loops counted as often as they turn."""
    collectives: dict[str, float] = field(default_factory=dict)
    """The same by kind."""
    arithmetic_intensity: float | None = None
    """Executed FLOPs per byte of memory traffic."""
    seconds: dict[str, float] = field(default_factory=dict)
    """What each of compute, memory, links and slice_links takes alone, at its peak."""
    estimated_step_seconds: float | None = None
    """The largest of `seconds`: a lower bound, as if the rest hid behind it."""
    estimated_mfu: float | None = None
    """model FLOPs / (estimated seconds · devices · peak): an upper bound."""
    sampling_bytes_per_device: dict[str, int] = field(default_factory=dict)
    """Of vision tower and sampler, all that lies there beside them included; if asked for."""
    largest_buffers: list[dict[str, Any]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """What to change, if it does not fit."""


def estimate(
    name: str,
    config: Any,
    program: Program,
    topology: Topology,
    mesh: Mesh,
    *,
    sampling: bool = False,
) -> Estimate:
    """Compiles the program for the devices of the topology, and on demand those of sampling."""
    start = time.monotonic()
    lowered = program.update.lower(program.state, program.batch)
    compiled, trouble = attempt(lowered)
    numbers: dict[str, Any] = {
        "config": name,
        "stages": tuple(config.stages),
        "topology": topology.name,
        "num_slices": topology.slices,
        "devices": len(topology.devices),
        "mesh": dict(mesh.shape),
        "bytes_limit": topology.memory,
        "compile_seconds": time.monotonic() - start,
        "tokens_per_step": flops.tokens(program),
        "model_flops_per_step": flops.model_flops(program),
        "executed_flops_per_step": flops.executed_flops(program),
        "held_bytes": program.held,
    }
    memory: dict[str, Any]
    if compiled is None:
        arguments = argument_bytes(program, mesh)
        total = max(needed_bytes(trouble, arguments), topology.memory + 1)
        memory = {
            "argument_bytes": arguments,
            "temp_bytes": total - arguments,
            "bytes_per_device": total,
            "largest_buffers": _largest_arrays(program, len(topology.devices)),
        }
    else:
        memory = memory_of(compiled)
        if text := _text(compiled):
            module = hlo.Module(text)
            memory["largest_buffers"] = [
                {"bytes": size, "shape": shape, "origin": origin}
                for size, shape, origin in module.largest(LARGEST)
            ]
            numbers |= roofline(module.traffic(), memory["argument_bytes"], numbers, topology)
        else:
            memory["largest_buffers"] = _largest_arrays(program, len(topology.devices))
    memory["bytes_per_device"] += program.held
    limit, hints = topology.memory, []
    if memory["bytes_per_device"] > limit:
        hints += advice(config, program, mesh, memory, limit)
    others = sampling_bytes(config, program, mesh, limit) if sampling else {}
    if max(others.values(), default=0) > limit:
        hints.append(
            f"sample in smaller parts: rollout.pieces (now {config.rollout.pieces}), or by a "
            'fleet of servers: rollout.engine="sglang"'
        )
    return Estimate(
        fits=not hints, advice=hints, sampling_bytes_per_device=others, **numbers, **memory
    )


def roofline(
    traffic: hlo.Traffic, arguments: int, numbers: dict[str, Any], topology: Topology
) -> dict[str, Any]:
    """Seconds of each resource at its peak, and what follows from the slowest."""
    chip, devices = topology.chip, numbers["devices"]
    moved = traffic.memory + arguments
    between = traffic.collectives.get(hlo.BETWEEN_SLICES, 0.0)
    sent = sum(traffic.collectives.values())
    executed = numbers["executed_flops_per_step"] / devices
    seconds = {
        "compute": executed / chip.flops,
        "memory": moved / chip.memory_rate,
        "links": (sent - between) / chip.link_rate,
        "slice_links": between / chip.slice_rate if between else 0.0,
    }
    slowest = max(seconds.values())
    return {
        "memory_bytes_per_step": moved,
        "collective_bytes_per_step": sent,
        "collectives": traffic.collectives,
        "arithmetic_intensity": executed / moved,
        "seconds": seconds,
        "estimated_step_seconds": slowest,
        "estimated_mfu": numbers["model_flops_per_step"] / (slowest * devices * chip.flops),
    }


def argument_bytes(program: Program, mesh: Mesh) -> int:
    """Bytes on one device of the state and the batch."""
    batch = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.batch))
    return param_bytes(program.state, mesh) + batch // sharding.row_shards(mesh)


def advice(
    config: Any, program: Program, mesh: Mesh, memory: dict[str, Any], limit: int
) -> list[str]:
    """What to change so that the program fits, the nearest means first."""
    rows, shards = prod(program.batch.mask.shape[:2]), sharding.row_shards(mesh)
    if "sft" in config.stages:
        rows = gcd(rows, config.sft.prompts)  # both are cut into the same number of pieces
    pieces, found = config.batch.micro_batches, []
    kept = memory["argument_bytes"] + program.held
    if kept > 0.9 * limit:
        found.append(
            f"state, batch and image features alone take {kept / GIB:.1f} GiB of "
            f"{limit / GIB:.1f}: take more devices or fewer rows per update; batch.windows sets "
            "the size of the image features"
        )
        if mesh.shape["data"] > 1:
            found.append("copies of the parameters: set mesh.data=1, mesh.fsdp=-1")
    if program.model.remat != "full":
        found.append('keep less for the backward pass: model.remat="full"')
    if program.model.dtype == "float32":
        found.append('halve the activations: model.dtype="bfloat16"')
    if rows // shards > pieces:
        more = next(n for n in range(pieces + 1, rows + 1) if rows % (n * shards) == 0)
        most = rows // shards
        found.append(f"smaller pieces: batch.micro_batches={more} … {most} (now {pieces})")
    found.append("cut parameters and optimizer into more parts: a larger topology (mesh.fsdp=-1)")
    return found


def _text(compiled: jax.stages.Compiled) -> str:
    """The program; "" if jaxlib cannot read what a TPU compiler of another version wrote."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        if "INTERNAL" not in str(error):
            raise
        return ""


def _largest_arrays(program: Program, devices: int) -> list[dict[str, Any]]:
    """The largest arrays before they are cut and fused, as bytes per device if cut evenly."""
    return [
        {"bytes": size / devices, "shape": shape, "origin": origin}
        for size, shape, origin in flops.largest_arrays(program, LARGEST)
    ]
