"""Rows chosen anew on eight devices; run by device_rows_test.py.

JAX_NUM_CPU_DEVICES=8 PYTHONPATH=. python device_rows_cases.py
"""

import json

import jax
import numpy as np

from vtriune_jax import sharding
from vtriune_jax.data import device_rows

OLD = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)


def told(found: jax.Array, expected: np.ndarray) -> dict[str, object]:
    """Whether an array is right, and the part of its rows that one device has."""
    parts = {shard.data.shape[0] / len(found) for shard in found.addressable_shards}
    return {"equal": bool(np.array_equal(found, expected)), "parts": sorted(parts)}


def cases() -> dict[str, dict[str, object]]:
    mesh = sharding.make_mesh(2, 2, 2)
    array = sharding.shard_rows(OLD, mesh)
    orders = {
        "the same": np.arange(16)[:, None],
        "repeated": np.repeat(np.arange(16), 4)[:, None],
        "packed": np.repeat(np.arange(16), 4)[::-1].reshape(16, 4),
        "mixed": np.random.default_rng(0).permutation(16)[:8],
    }
    found = {
        name: told(device_rows.take([array], order), OLD[order]) for name, order in orders.items()
    }
    order = np.array([0, 31, 17, 3])
    found["of two"] = told(device_rows.take([array, array + 1], order), np.r_[OLD, OLD + 1][order])
    found["second half"] = told(device_rows.part(array, 2, 1), OLD[8:])
    return found


if __name__ == "__main__":
    print(json.dumps(cases()))
