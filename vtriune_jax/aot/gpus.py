"""NVIDIA GPUs that are not here, as the CUDA compiler of JAX's plugin has to be told of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from vtriune_jax.commands import GPU_MEMORY
from vtriune_jax.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Target:
    """What the compiler asks of a device: NVIDIA's data sheets and CUDA's deviceQuery."""

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    memory_mib: int
    l2_mib: int
    clock_ghz: float
    shared_kib: int
    """Shared memory of a multiprocessor; a block may have one KiB less."""


TARGETS = {
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 81920, 40, 1.41, 164),
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 81559, 50, 1.98, 228),
    "h200": Target("NVIDIA H200", (9, 0), 132, 143771, 60, 1.98, 228),
}


def devices(kind: str, hosts: int, each: int, memory_rate: float) -> Sequence[Any]:
    """`hosts` machines with `each` GPUs of the kind, to compile for; their memory in bytes/s.

    The kernels' variants are chosen by rules, as no device is there to try them on. UserError where
    JAX's CUDA plugin is missing or too old.
    """
    try:
        found = topologies.get_topology_desc(
            topology_name=kind,
            platform="cuda",
            topology=f"1x{hosts}x{each}",
            target_config=_text(TARGETS[kind], memory_rate),
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"--topology={kind}: the CUDA compiler says {text[:200]!r}; it comes by "
            "`pip install 'jax[cuda13]'` and needs no GPU"
        ) from error
    return found.devices


def usable_memory(kind: str) -> int:
    """Bytes of a GPU that JAX takes for arrays and programs."""
    variable, ours = GPU_MEMORY
    return int(TARGETS[kind].memory_mib * MIB * float(os.environ.get(variable, ours)))


def _text(target: Target, memory_rate: float) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = target.compute_capability
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {target.multiprocessors}
          fpus_per_core: {64 if major == 8 else 128}
          clock_rate_ghz: {target.clock_ghz}
          memory_bandwidth: {memory_rate:.0f}
          device_memory_size: {target.memory_mib * MIB}
          l2_cache_size: {target.l2_mib * MIB}
          shared_memory_per_core: {target.shared_kib * 1024}
          shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {(target.shared_kib - 1) * 1024}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_core_limit: 2048
          threads_per_block_limit: 1024
          threads_per_warp: 32
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        device_description_str: "{target.name}"
        runtime_version {{ major: 13 minor: 0 }}
        dnn_version_info {{ major: 9 minor: 8 }}
    """
