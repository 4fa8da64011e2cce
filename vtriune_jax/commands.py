"""What the command lines of this package (main, export, compile) have in common."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from absl import flags

from vtriune_jax.errors import UserError

TPU_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
"""For the TPU's compiler: gather a matrix, then multiply. By itself it multiplies with a part at a
time and adds up in memory, for large ones: three times the memory traffic of orsta_3b's update."""
CPU_FLAG = "--xla_cpu_use_fusion_emitters=false"
"""For the CPU's compiler: its older generator of code takes about half the memory, and less time
(docs/benchmarks.md)."""
_WITHOUT_CPU_FLAG = (0, 11, 1)
"""The first jaxlib that does not know it, and would end the process."""
GPU_FLAG = "--xla_gpu_memory_limit_slop_factor=200"
"""For the GPU's compiler: it repeats matrix products to save a little memory where it thinks that a
program takes more than 0.8 of the device's; what to repeat is `model.remat`'s to say."""
GPU_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92"
"""The part of a GPU's memory that JAX takes, instead of its 0.75."""
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event: a program was compiled, or read from where they are kept."""


def tell_compilers() -> None:
    """Gives them these flags, unless the user has set them; before JAX is used.

    What is compiled for devices that are not here and what runs must have the same. Nothing but
    libtpu reads TPU_FLAGS, nothing but the CPU's and the GPU's compiler the other two.
    """
    os.environ.setdefault("LIBTPU_INIT_ARGS", TPU_FLAGS)
    os.environ.setdefault(*GPU_MEMORY)
    given = os.environ.get("XLA_FLAGS", "")
    here = tuple(map(int, version("jaxlib").split(".")[:3]))
    ours = [CPU_FLAG, GPU_FLAG] if here < _WITHOUT_CPU_FLAG else [GPU_FLAG]
    more = [flag for flag in ours if flag.partition("=")[0] not in given]
    if more:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *more])


def keep_programs() -> None:
    """Has JAX keep compiled programs between runs, unless the user has said where, by the XDG
    convention.

    XLA cuts programs for CPUs to suit the cores that it sees, of which JAX's name of a program says
    nothing: each number of cores has a folder.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    import jax  # takes a while: not for those who only want flags

    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    folder = caches / "vtriune_jax" / f"jax-{cores}-cores"
    jax.config.update("jax_compilation_cache_dir", str(folder))


@functools.cache
def return_memory() -> None:
    """Has what compiling for CPUs leaves behind returned to the system at once: docs/benchmarks.md.

    glibc would keep it for later, in pieces too small for the arrays of a program. Other allocators
    are left alone.
    """
    import jax

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def compiled(event: str, *_: object, **__: object) -> None:
        if event == COMPILED and trim and jax.default_backend() == "cpu":
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)


def fill(options: flags.FlagValues, words: Sequence[str], needed: Sequence[str]) -> None:
    """Reads `--name=value` words into defined flags, --help among them.

    `needed` shows each flag that must be given, as in "--out=FOLDER"; with --help none must.

    Raises:
      UserError: a word is no such flag, a value does not suit, or a needed flag is missing.
    """
    try:
        stray = options(["vtriune_jax", *words])[1:]
    except flags.Error as error:
        raise UserError(f"{error} (--help shows them all)") from error
    if stray:
        raise UserError(f"{stray[0]!r} is not a flag: write --name=value (--help shows them all)")
    for example in needed:
        name = example.removeprefix("--").partition("=")[0]
        if not options.help and not getattr(options, name):
            raise UserError(f"{example} is missing (--help shows all flags)")
