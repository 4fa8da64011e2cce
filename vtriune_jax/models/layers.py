"""The pieces both towers are made of: linear map, RMS norm, SwiGLU, rotary embedding, layer stack.

A module is made with zero matrices; `models.init` draws them, `models.load_pretrained` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vtriune_jax.models.platform import platform

ATTENDED, MAPPED = "attended", "mapped"
"""The names under which `remat` knows the results of attention and of linear maps."""
ALIGNED = 8
"""Numbers of two bytes in 16."""


def on_rows(x: Float[Array, "rows *rest"]) -> Float[Array, "rows *rest"]:
    """Keep what leaves a layer cut by rows, if there is a mesh (`jax.sharding.use_abstract_mesh`).

    Left alone, the partitioner cuts the width as the parameters over fsdp are cut, inside the scans
    over layers, and every device then works on all rows.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp")))


def whole(parameter: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same on each device, if a mesh cuts it over `fsdp` alone.

    For what many tokens are computed with, one after the other: the partitioner by itself would
    gather it for each of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, P())


class Turns(NamedTuple):
    """Cosine and sine of rotary angles."""

    cos: Float[Array, "*rows tokens half"]
    sin: Float[Array, "*rows tokens half"]


def turns(angles: Float[Array, "*rows tokens half"]) -> Turns:
    """Their cosine and sine, computed once for all heads and layers.

    XLA's CPU backend would do so anew for every element that they turn, unless something makes it
    store them: a product, here with 1.
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if platform() == "cpu":
        one = jnp.eye(angles.shape[-1], dtype=angles.dtype)
        cos, sin = cos @ one, sin @ one
    return Turns(cos, sin)


def rotate(
    x: Float[Array, "*rows tokens heads head_dim"], by: Turns
) -> Float[Array, "*rows tokens heads head_dim"]:
    """Turn the pairs (x[i], x[i + head_dim/2]) by their angles, in float32."""
    cos, sin = by.cos[..., None, :], by.sin[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def frequencies(width: int, theta: float) -> Float[Array, " frequencies"]:
    """The rotary frequencies theta^(-2i/width) of `width` numbers, i.e. width/2 pairs."""
    return theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def stack(layer: nnx.Module, layers: int) -> nnx.Module:
    """The same module with a leading axis of layers on each parameter."""
    graphdef, params = nnx.split(layer)
    params = jax.tree.map(lambda p: jnp.broadcast_to(p, (layers, *p.shape)), params)
    return nnx.merge(graphdef, params)


def unstack(layers: nnx.Module) -> tuple[Any, Callable[[Any], Any]]:
    """The stacked parameters, to be scanned over, and what turns one slice of them into a layer."""
    graphdef, params = nnx.split(layers)
    return params, lambda one: nnx.merge(graphdef, one)


def through(
    layer: Callable[[Array, Any], tuple[Array, Any]],
    x: Array,
    stacked: Any,
    *,
    remat: str,
    unroll: bool,
) -> tuple[Array, Any]:
    """Take x through the layers, one after the other; what else each gives comes back stacked.

    It is a scan, for which one layer is compiled. With `unroll` each of them is, and what they keep
    for the backward pass need not be copied into a stack and out of it again. `remat` says what
    the backward pass computes again:

    "none": nothing that XLA would keep; "dots": all but the results of linear maps and attention,
    which is little work for much memory; "attention": all but the result of attention, which grows
    with the square of the tokens; "full": everything but the layer's input.
    """
    return jax.lax.scan(_checkpoint(layer, remat, unroll), x, stacked, unroll=unroll)


def _checkpoint(layer: Callable, remat: str, unroll: bool) -> Callable:
    if remat == "none":
        return layer  # without gathering, as what is gathered would be kept too

    def gathering(x: Array, params: Any) -> tuple[Array, Any]:
        return layer(x, _gather_kernels(params, x.dtype))

    policies = jax.checkpoint_policies
    both = policies.save_from_both_policies
    attention = both(policies.save_only_these_names(ATTENDED), _of_cudnn)
    maps = both(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(MAPPED))
    policy = {"dots": both(maps, attention), "attention": attention, "full": None}[remat]
    # Across the turns of a scan XLA cannot merge what is computed again with the first time.
    return jax.checkpoint(gathering, prevent_cse=unroll, policy=policy)


def _gather_kernels(params: Any, dtype: Any) -> Any:
    """A layer's parameters with its matrices whole on each device, if a mesh cuts them over `fsdp`.

    The partitioner by itself would gather them twice in the backward pass: for what is computed
    again, and for the gradient. Matrices that are cut over `tensor` too are left to it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return params
    as_it_is = P(P.UNCONSTRAINED, P.UNCONSTRAINED)

    def each(path: tuple[Any, ...], leaf: Array) -> Array:
        is_kernel = any(getattr(step, "key", "") == "kernel" for step in path)
        return gather(leaf, dtype, P(), as_it_is) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(each, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(
    matrix: Float[Array, "height width"], dtype: Any, whole: Any, cut: Any
) -> Float[Array, "height width"]:
    """The matrix as `whole` says, rounded to `dtype` on the way, in which all use it anyway.

    Its gradient is added up over devices unrounded, and each gets its part, as `cut` says.
    """
    rounded = jax.lax.with_sharding_constraint(matrix.astype(dtype), cut)
    rounded = jax.lax.with_sharding_constraint(rounded, whole)
    # The barrier, as XLA takes a way to a narrow type and back for nothing.
    return jax.lax.optimization_barrier(rounded).astype(matrix.dtype)


def _gather_forward(matrix: Array, dtype: Any, whole: Any, cut: Any) -> tuple[Array, None]:
    return gather(matrix, dtype, whole, cut), None


def _gather_backward(dtype: Any, whole: Any, cut: Any, kept: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(gradient, cut),)


gather.defvjp(_gather_forward, _gather_backward)


def _of_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether something is cuDNN's attention, whose results JAX gives no name to."""
    return primitive.name.startswith("dot_product_attention_fwd")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _affine(
    x: Float[Array, "rows width"],
    kernel: Float[Array, "width out"],
    bias: Float[Array, " out"] | None,
    more: tuple[int, int],
) -> Float[Array, "rows out"]:
    """x · kernel + bias in x's type; the gradients of the two are sums in their own type.

    The kernel has so many `more` rows and columns of zeros.

    So devices gather bfloat16 kernels, half the bytes, but add up their shares of the gradient in
    float32. With plain casts the shares would be rounded first, and the sum depend on the mesh.
    """
    y = x @ _wider(kernel.astype(x.dtype), more)
    return y if bias is None else y + _wider(bias.astype(x.dtype), more[1:])


def _affine_forward(
    x: Array, kernel: Array, bias: Array | None, more: tuple[int, int]
) -> tuple[Array, tuple]:
    return _affine(x, kernel, bias, more), (x, kernel, bias)


def _affine_backward(
    more: tuple[int, int], kept: tuple, out: Array
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = kept
    height, width = kernel.shape
    sums = jnp.matmul(x.T, out, preferred_element_type=kernel.dtype)[:height, :width]
    ends = None if bias is None else out.sum(0, dtype=bias.dtype)[:width]
    return out @ _wider(kernel.astype(x.dtype), more).T, sums, ends


def _wider(x: Array, more: Sequence[int]) -> Array:
    return jnp.pad(x, [(0, each) for each in more]) if any(more) else x


_affine.defvjp(_affine_forward, _affine_backward)


class Linear(nnx.Module):
    """x · kernel (+ bias); parameters are cast to x's type."""

    lora: Callable[[Array], Array] | None = None
    """A low-rank addition (`models.lora`)."""

    def __init__(self, width: int, out: int, *, bias: bool):
        self.kernel = nnx.Param(jnp.zeros((width, out)))
        self.bias = nnx.Param(jnp.zeros(out)) if bias else None

    def __call__(
        self, x: Float[Array, "*rows width"], more: tuple[int, int] = (0, 0)
    ) -> Float[Array, "*rows out"]:
        """Apply to the last axis; x and the result may have zeros behind it, so many `more`."""
        # On one flat axis of rows XLA's CPU backend is a quarter faster in the backward pass.
        flat = x.reshape(-1, x.shape[-1])
        bias = None if self.bias is None else self.bias[...]
        y = checkpoint_name(_affine(flat, self.kernel[...], bias, more), MAPPED)
        if self.lora is not None:
            y += self.lora(flat)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class RMSNorm(nnx.Module):
    """x / √(mean(x²) + eps) · scale, in float32."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Normalise the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int, *, bias: bool):
        self.gate = Linear(width, hidden, bias=bias)
        self.up = Linear(width, hidden, bias=bias)
        self.down = Linear(hidden, width, bias=bias)

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Apply to the last axis.

        GPUs have slower kernels for matrices whose rows are not whole pieces of 16 bytes, as with
        the 3,420 columns of the vision tower: zeros, which change nothing, fill them up.
        """
        hidden, linears = self.gate.kernel.shape[-1], (self.gate, self.up, self.down)
        adapted = any(linear.lora is not None for linear in linears)
        more = 0 if platform() != "gpu" or adapted else -hidden % ALIGNED
        return self.down(jax.nn.silu(self.gate(x, (0, more))) * self.up(x, (0, more)), (more, 0))
