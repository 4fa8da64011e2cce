"""Low-rank adapters of the language layers: W acts as W + alpha/rank · A·B, only A, B are trained.

The matrix `language/layers/attn/q/kernel` [L, in, out] gets `…/q/lora/a` [L, in, rank] and
`…/q/lora/b` [L, rank, out], stacked and scanned like all else. B starts at zero, so an adapted
model starts as its base. (`nnx.LoRA` itself has no scale, and `stack` would give every layer the
same of its A.)

What is saved for others (folders, servers) is merged: an ordinary model, without adapters.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vtriune_jax.errors import UserError
from vtriune_jax.models.config import LoRAConfig, ModelConfig
from vtriune_jax.models.layers import Linear
from vtriune_jax.models.weights import Place, flatten, unflatten

BASE = r"^(?!.*/lora/[ab]$)"
"""Regex of all parameters but the adapters': what to freeze."""

Fetch = Callable[[str], jax.Array]
"""Path → parameter."""


class Adapter(nnx.Module):
    """scale · x · a · b"""

    def __init__(self, width: int, out: int, config: LoRAConfig):
        self.a = nnx.LoRAParam(jnp.zeros((width, config.rank)))
        self.b = nnx.LoRAParam(jnp.zeros((config.rank, out)))
        self.scale = config.scale

    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows out"]:
        """Apply to the last axis."""
        narrow = x @ self.a[...].astype(x.dtype) * self.scale
        return narrow @ self.b[...].astype(x.dtype)


def from_keys(keys: Mapping[str, Any]) -> LoRAConfig | None:
    """The adapters that the keys `model.lora` of a run's config ask for; none at rank 0."""
    if not keys["rank"]:
        return None
    return LoRAConfig(rank=keys["rank"], alpha=keys["alpha"], target=keys["target"])


def adapt(layer: nnx.Module, config: LoRAConfig | None) -> nnx.Module:
    """Give the matrices that the target selects their adapters, in place; returns the layer.

    Raises UserError when it selects none.
    """
    if config is None:
        return layer
    linears = _linears(layer)
    chosen = [path for path in linears if re.search(config.target, path)]
    if not chosen:
        raise UserError(
            f"model.lora.target={config.target!r} matches no matrix of the language layers; "
            f"they are {', '.join(sorted(linears))}"
        )
    for path in chosen:
        width, out = linears[path].kernel.shape
        linears[path].lora = Adapter(width, out, config)
    return layer


def fold(layer: Any) -> Any:
    """Put the adapters of a layer into its kernels, in place; returns the layer."""
    for linear in _linears(layer).values():
        if (adapter := linear.lora) is not None:
            merged = _merged(linear.kernel[...], adapter.a[...], adapter.b[...], adapter.scale)
            linear.kernel = nnx.Param(merged)
            linear.lora = None
    return layer


def fresh(
    shapes: Mapping[str, tuple[int, ...]], seed: int, place: Place | None = None
) -> dict[str, jax.Array]:
    """New float32 adapters of the given paths and shapes; `place` is as in `weights.read`.

    A is uniform within ±1/√in and B is zero. Drawn on the host, each from the seed and its path.
    """

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path.endswith("/b"):
            return np.zeros(shape, np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        return ((2 * rng.random(shape, np.float32) - 1) / np.sqrt(shape[-2])).astype(np.float32)

    return {
        path: jax.device_put(draw(path, shape), place(path, shape) if place else None)
        for path, shape in shapes.items()
    }


def is_adapter(path: str) -> bool:
    """Whether the parameter of this path belongs to an adapter."""
    return not re.search(BASE, path)


def merge_lora(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The parameters of the ordinary model, W + alpha/rank · A·B in place of W, A and B."""
    flat = flatten(params)
    fetch = merging(flat.__getitem__, flat, config)
    return unflatten({path: fetch(path) for path in flat if not is_adapter(path)})


def merging(fetch: Fetch, paths: Iterable[str], config: ModelConfig) -> Fetch:
    """The same for one parameter at a time: a `fetch` for the ordinary model.

    The given one knows `paths`, adapters included, and is called once for each that is needed.
    """
    adapted = {path.rpartition("/lora/")[0] for path in paths if is_adapter(path)}
    lora = config.lora

    def merged(path: str) -> jax.Array:
        matrix, _, name = path.rpartition("/")
        if lora is None or name != "kernel" or matrix not in adapted:
            return fetch(path)
        a, b = fetch(f"{matrix}/lora/a"), fetch(f"{matrix}/lora/b")
        return _merged(fetch(path), a, b, lora.scale)

    return merged


def kept(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint must hold: the adapters where there are any, as the rest never changes."""
    flat = flatten(params)
    return unflatten({path: leaf for path, leaf in flat.items() if is_adapter(path)} or flat)


def put_back(params: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with those that `kept` had chosen replaced."""
    return unflatten(flatten(params) | flatten(saved))


def _linears(layer: nnx.Module) -> dict[str, Linear]:
    """Path below the layer → matrix."""
    modules = nnx.iter_modules(layer)
    return {"/".join(map(str, at)): module for at, module in modules if isinstance(module, Linear)}


@partial(jax.jit, static_argnums=3)
def _merged(
    kernel: Float[Array, "*layers width out"],
    a: Float[Array, "*layers width rank"],
    b: Float[Array, "*layers rank out"],
    scale: float,
) -> Float[Array, "*layers width out"]:
    """In float32, whatever the kernel is stored as."""
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product
