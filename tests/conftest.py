"""For all tests: the CPU, no network, and compiled programs kept from one run to the next."""

import os
from pathlib import Path

import psutil
import pytest

from vtriune_jax.commands import tell_compilers

MEMORY = 3 * 2**30
"""What a process of tests may keep from one file to the next."""
CACHE = Path(__file__).parents[1] / ".cache" / "tests"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # they take longer than they save
os.environ.setdefault("HF_HUB_OFFLINE", "1")
tell_compilers()


@pytest.fixture(scope="module")
def optimised():
    """Programs compiled as a run compiles them, for tests that read or compare them."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # JAX takes what is compiled for it, whatever this setting was
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _no_more_memory_than_needed():
    """Programs of thousands of tests would fill it."""
    yield
    if psutil.Process().memory_info().rss > MEMORY:
        import jax

        jax.clear_caches()
