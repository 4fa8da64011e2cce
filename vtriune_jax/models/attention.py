"""Attention: the only place where queries meet keys, so the only place that chooses kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vtriune_jax.errors import UserError
from vtriune_jax.models.kernels import xla
from vtriune_jax.models.layers import ATTENDED
from vtriune_jax.models.platform import platform

PLATFORM = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
"""Where a kernel runs; XLA's own attention, "xla", runs everywhere."""
FEW = 128
"""Rows of so many tokens, such as windows of the vision tower, are one block: plain products."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of one layer, after the rotary embedding: laid out as `decode_attention`
    multiplies them, which on CPUs is three times as fast as the other way round."""

    keys: Float[Array, "*rows head_dim tokens"]
    values: Float[Array, "*rows tokens head_dim"]


def attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
    *,
    causal: bool,
    slots: tuple[int, int] | None = None,
    kernel: str = "auto",
) -> Float[Array, "rows tokens heads head_dim"]:
    """Attend inside equal, non-zero segments, and only backwards when causal.

    With `slots` = (n, size) the last n · size tokens of a row are n completions of what stands
    before them: a token sees that prompt and, backwards, its own slot, but no other slot. It is
    what n rows of (prompt, completion) would compute, with the prompt's work done once.

    A token of segment 0 (padding) sees nothing: its result is finite and meaningless.

    With n = 1 that says that the row is one sequence, which some kernels must know.

    `kernel` is `model.attention` of the config; all kernels give the same. The result has the name
    that `remat` knows where keeping it spares the backward pass to compute it again: Triton's
    kernel needs more than it, and runs again. Raises UserError as `choose` does.
    """
    if slots and not causal:
        raise ValueError("slots are of causal attention only")
    chosen = choose(kernel, query.dtype, query.shape[-1])
    if slots and slots[0] == 1 and chosen != "cudnn":
        slots = None
    if chosen == "xla" or query.shape[1] <= FEW:
        out = xla.attention(query, key, value, segments, causal=causal, slots=slots)
        return checkpoint_name(out, ATTENDED)
    # Not loaded before it is used: Pallas takes half a second.
    module = import_module(f"vtriune_jax.models.kernels.{chosen}")
    run = partial(module.attention, causal=causal, slots=slots)
    return on_each_device(run, query, key, value, segments)


def choose(kernel: str, dtype: Any = "bfloat16", head_dim: int = 128) -> str:
    """The kernel that a word means here: for the devices of the mesh, if there is one.

    On NVIDIA GPUs "auto" is cuDNN's, which is the fastest, where it knows type and width; otherwise
    Triton's, and "xla" for heads that are too narrow for it. Several devices need the mesh
    (`jax.sharding.use_abstract_mesh`), as XLA cannot cut a kernel to pieces itself: without one
    "auto" is "xla". Raises UserError for a kernel that the platform does not run.
    """
    here = platform()
    if kernel == "auto":
        if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
            return "xla"
        if here == "gpu" and head_dim >= 16:
            known = jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
            return "cudnn" if known else "triton"
        return "splash" if here == "tpu" else "xla"
    needed = PLATFORM.get(kernel, here)
    if here != needed:
        raise UserError(
            f'model.attention="{kernel}" runs on {needed.upper()}s only, not on '
            f'{here.upper()}s; choose "auto" or "xla"'
        )
    return kernel


def on_each_device(
    run: Callable[[Array, Array, Array, Array], Array],
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
) -> Float[Array, "rows tokens heads head_dim"]:
    """Run on each device's rows and heads, if there is a mesh.

    Where there are fewer heads of keys than devices along `tensor`, they are repeated; heads of
    queries that do not divide stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(query, key, value, segments)
    heads, kv_heads, tensor = query.shape[2], key.shape[2], mesh.shape["tensor"]
    copies = tensor // math.gcd(kv_heads, tensor)
    axis = None
    if heads % (kv_heads * copies) == 0:
        axis = "tensor"
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    rows = ("data", "fsdp")
    here, ids = P(rows, None, axis, None), P(rows, None)
    # Pallas calls do not say over which axes their results vary.
    cut = jax.shard_map(run, in_specs=(here, here, here, ids), out_specs=here, check_vma=False)
    return cut(query, key, value, segments)


def decode_attention(
    query: Float[Array, "groups n heads head_dim"],
    key: Float[Array, "groups n kv_heads head_dim"],
    value: Float[Array, "groups n kv_heads head_dim"],
    prompt: KV,
    prompt_segments: Int[Array, "groups tokens"],
    own: KV,
    index: Int[Array, ""],
) -> Float[Array, "groups n heads head_dim"]:
    """Attend from one new token to the group's prompt, the completion's tokens < index and itself.

    The prompt's keys are read once for all n completions of the group.
    """
    (groups, n, _, head_dim), kv_heads = query.shape, key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(groups, n, kv_heads, -1, head_dim)
    grouped = grouped.swapaxes(1, 2)  # groups kv_heads n heads/kv_heads head_dim
    key, value = (x.swapaxes(1, 2)[:, :, :, None] for x in (key, value))
    merged = groups, kv_heads, -1, head_dim
    shape = grouped.shape[:-1]

    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)
    to_prompt = matmul(grouped.reshape(merged), prompt.keys).reshape(*shape, -1)
    to_prompt = jnp.where((prompt_segments != 0)[:, None, None, None], to_prompt, -jnp.inf)
    to_own = matmul(grouped, own.keys)
    to_own = jnp.where(jnp.arange(to_own.shape[-1]) < index, to_own, -jnp.inf)
    to_itself = (grouped * key).sum(-1, keepdims=True, dtype=jnp.float32)
    logits = to_prompt, to_own, to_itself

    top = reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in logits))
    weights = [jnp.exp(x - top) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    on_prompt, on_own, on_itself = (x.astype(value.dtype) for x in weights)
    out = matmul(on_prompt.reshape(*merged[:-1], on_prompt.shape[-1]), prompt.values)
    out = out.reshape(grouped.shape) + matmul(on_own, own.values) + on_itself * value
    return (out / total).astype(value.dtype).swapaxes(1, 2).reshape(query.shape)
