"""What a program is being made for."""

from __future__ import annotations

import jax


def platform() -> str:
    """ "tpu", "gpu" or "cpu": of the devices to compile for, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = device.platform if device else jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
