"""Devices that are not here, to make programs for."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def mesh_of(kind, platform):
    """A context in which programs are made for one such device."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    axes, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    mesh = AbstractMesh((1, 1, 1), axes, axis_types=kinds, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
