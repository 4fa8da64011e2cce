"""Devices to compile for, present or not, and what one of them can do.

Peaks are those of the makers' data sheets: Google's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"
and "TPU7x" (docs.cloud.google.com/tpu/docs; a TPU7x chip is two devices; links of v4: "TPU v4: An
Optically Reconfigurable Supercomputer", six of 50 GB/s) and NVIDIA's data sheets of A100, H100 and
H200 (SXM, dense bfloat16). Google gives links in both directions together, here is one; links of
GPUs are NVLink's, also between machines, whose usual eight adapters of 400 Gbit/s are 0.9 as fast.
Limits of TPU memory are what the compiler allows itself.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from vtriune_jax.aot import gpus
from vtriune_jax.errors import UserError

GB, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Chip:
    """One device: FLOP/s in bfloat16, bytes/s of memory and links (one direction), bytes."""

    flops: float
    memory_rate: float
    link_rate: float
    memory: int | None = None
    """None: the device is here, and is asked."""
    slice_rate: float = 0.0
    """Bytes/s between TPU slices, over the data-centre network; 0: not known."""
    axes: int = 3
    """Of the torus that a TPU's links make."""
    most: int = 0
    """Chips of the largest TPU pod."""


TPUS = {
    # name: Chip(bfloat16 peak, HBM, all inter-chip links together in one direction, usable HBM,
    # data-centre network: 50 Gb/s a chip of v5p, 100 of v6e and TPU7x, 2 × 100 for 8 chips of v5e,
    # axes, chips of a pod)
    "v4": Chip(275e12, 1200 * GB, 300 * GB, int(30.75 * GIB), 0.0, 3, 4096),
    "v5e": Chip(197e12, 819 * GB, 200 * GB, int(15.75 * GIB), 3.125 * GB, 2, 256),
    "v5p": Chip(459e12, 2765 * GB, 600 * GB, int(95.74 * GIB), 6.25 * GB, 3, 8960),
    "v6e": Chip(918e12, 1638 * GB, 400 * GB, int(31.25 * GIB), 12.5 * GB, 2, 256),
    "tpu7x": Chip(1153e12, 3690 * GB, 300 * GB, int(94.75 * GIB), 6.25 * GB, 3, 9216),
}
GPUS = {
    # part of the device's name: Chip(bfloat16 peak, HBM, NVLink in one direction)
    "A100": Chip(312e12, 2039 * GB, 300 * GB),
    "H100": Chip(989e12, 3350 * GB, 450 * GB),
    "H200": Chip(989e12, 4800 * GB, 450 * GB),
}
CPU = Chip(1e11, 20 * GB, 10 * GB)
"""A round number per pretended device, so that the arithmetic has something to work on."""


@dataclass(frozen=True)
class Topology:
    """The devices of one name, all alike."""

    name: str
    devices: Sequence[Any]
    chip: Chip
    memory: int
    """Bytes that a program may use on one device."""
    slices: int = 1


def prepare(name: str) -> None:
    """Set JAX and its environment up for a topology; only before JAX first looks for devices."""
    # A program for absent devices cannot be read back from a cache; and compile seconds are told.
    jax.config.update("jax_enable_compilation_cache", False)
    if name != "local":
        jax.config.update("jax_platforms", "cpu")
    if found := re.fullmatch(r"cpu:(\d+)", name):
        jax.config.update("jax_num_cpu_devices", int(found[1]))
    elif name != "local":
        # The compiler needs no TPU: it must not look for one, nor for metadata of a machine.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # asked for, not used
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock guards devices, not compilers


def get(name: str, slices: int = 1) -> Topology:
    """The devices of "v5p:2x2x4", "cpu:8" or "local"; UserError where there are none such."""
    kind, _, shape = name.partition(":")
    if slices > 1 and not (kind in TPUS and TPUS[kind].slice_rate):
        raise UserError(f"--num_slices={slices} is for TPUs from v5e on, not for {name}")
    if kind in TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        _check_shape(name, TPUS[kind], [int(side) for side in shape.split("x")])
        return Topology(name, _tpus(name, slices), TPUS[kind], TPUS[kind].memory or 0, slices)
    if kind in gpus.TARGETS and (found := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)):
        chip = GPUS[kind.upper()]
        devices = gpus.devices(kind, int(found[1] or 1), int(found[2]), chip.memory_rate)
        return Topology(name, devices, chip, gpus.usable_memory(kind))
    if re.fullmatch(r"cpu:[1-9]\d*|local", name):
        return _here(name)
    raise UserError(
        f"--topology={name} is not known; choose {', '.join(TPUS)} with a shape (v5p:2x2x4, "
        f"v5e:4x4), {', '.join(gpus.TARGETS)} with a number (h100:8; 2x8: two machines), cpu:8 or "
        "local"
    )


def _check_shape(name: str, chip: Chip, sides: Sequence[int]) -> None:
    if len(sides) != chip.axes or math.prod(sides) > chip.most:
        raise UserError(
            f"--topology={name} is no shape of these TPUs: they have {chip.axes} axes and at most "
            f"{chip.most} chips, as in {name.partition(':')[0]}:{'x'.join('4' * chip.axes)}"
        )


def _tpus(name: str, slices: int) -> Sequence[Any]:
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # a chip is one device, as on a machine that has it
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", **more).devices
    except RuntimeError as error:  # which JAX raises without libtpu, and XLA's errors are
        text = " ".join(str(error).split())
        raise UserError(
            f"--topology={name}: the TPU compiler says {text[:200]!r}; it comes by "
            "`pip install 'jax[tpu]'` (or libtpu alone), and takes the shapes that can be rented"
        ) from error
    return found


def _here(name: str) -> Topology:
    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
        return Topology(name, devices, CPU, memory)
    chips = GPUS | {"v5 lite": TPUS["v5e"], "v6 lite": TPUS["v6e"], "v5": TPUS["v5p"]}
    known = [chip for part, chip in chips.items() if part in first.device_kind]
    if not known:
        raise UserError(
            f"nothing is known of a {first.device_kind}; add a line to vtriune_jax/aot/topology.py"
        )
    return Topology(name, devices, known[0], first.memory_stats()["bytes_limit"])
