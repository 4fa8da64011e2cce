import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.data import device_rows

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("device_rows_cases.py")


@pytest.fixture(scope="module")
def on_eight_devices():
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, CASES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_device_keeps_its_share_of_the_rows(on_eight_devices):
    """Of features of a large batch no device has room for all."""
    expected = {"equal": True, "parts": [1 / 4]}  # data=2 × fsdp=2, beside tensor=2
    assert on_eight_devices == dict.fromkeys(on_eight_devices, expected)
    assert len(on_eight_devices) == 6


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_rows_of_one_device_or_of_the_host(kind):
    old = np.arange(12).reshape(6, 2)
    array, index = kind(old), np.array([[5, 0], [1, 1]])
    for found, expected in (
        (device_rows.take([array], index), old[index]),
        (device_rows.take([array], np.arange(6)[:, None]), old[:, None]),
        (device_rows.part(array, 3, 1), old[2:4]),
        (device_rows.part(array, 1, 0), old),
    ):
        assert isinstance(found, type(array))
        np.testing.assert_array_equal(found, expected)
