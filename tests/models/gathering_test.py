"""Without devices that share a matrix nothing is done to it; with them: tests/invariants."""

import jax
import jax.numpy as jnp

from vtriune_jax import sharding
from vtriune_jax.models.gathering import gather, gather_kernels


def test_nothing_to_gather():
    params = {"attn": {"q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}}
    assert gather_kernels(params, "bfloat16") is params
    assert (
        gather("attn/q/kernel", params["attn"]["q"]["kernel"], "bfloat16")
        is (params["attn"]["q"]["kernel"])
    )
    with jax.sharding.use_abstract_mesh(sharding.make_mesh(-1, 1, 1).abstract_mesh):
        assert gather_kernels(params, "bfloat16") is params
