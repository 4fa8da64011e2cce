"""Matrices that are cut over `fsdp`, made whole where they are used."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vtriune_jax import sharding


def gather(name: str, matrix: Array, dtype: Any) -> Array:
    """The parameter of that path whole over `fsdp`, if there is a mesh that cuts it
    (`jax.sharding.use_abstract_mesh`).

    On the way it is rounded to `dtype`, in which all use it anyway. Its gradient is added up over
    devices unrounded, and each gets its part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return matrix
    cut = sharding.spec(name, matrix.shape, mesh)
    whole = P(*(None if axis == "fsdp" else axis for axis in cut))
    return matrix if whole == cut else _gather(matrix, dtype, whole, cut)


def gather_kernels(params: Any, dtype: Any) -> Any:
    """The parameters of a layer with all matrices of its linear maps gathered.

    The partitioner by itself would gather a matrix twice in the backward pass: for what is computed
    again, and for the gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return params

    def each(path: tuple[Any, ...], leaf: Array) -> Array:
        keys = [str(step.key) for step in path if hasattr(step, "key")]
        return gather("/".join(keys), leaf, dtype) if keys[-1] == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(each, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(
    matrix: Float[Array, "height width"], dtype: Any, whole: P, cut: P
) -> Float[Array, "height width"]:
    rounded = jax.lax.with_sharding_constraint(matrix.astype(dtype), cut)
    rounded = jax.lax.with_sharding_constraint(rounded, whole)
    # The barrier, as XLA takes a way to a narrow type and back for nothing.
    return jax.lax.optimization_barrier(rounded).astype(matrix.dtype)


def _gather_forward(matrix: Array, dtype: Any, whole: P, cut: P) -> tuple[Array, None]:
    return _gather(matrix, dtype, whole, cut), None


def _gather_backward(dtype: Any, whole: P, cut: P, kept: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, cut),)


_gather.defvjp(_gather_forward, _gather_backward)
