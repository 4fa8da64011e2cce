"""The model as a whole: make, take apart, put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtriune_jax.models import weights
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.models.lora import fresh, is_adapter
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL


def split(model: Qwen2_5_VL) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Take the model apart into its structure (hashable) and a nested dict of parameters."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Qwen2_5_VL:
    """Put structure and parameters together again; cheap, meant for use inside jit."""
    return nnx.merge(graphdef, params)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """What `split` would give for a model of this config, with shapes in place of arrays."""
    return split(nnx.eval_shape(lambda: Qwen2_5_VL(config)))


def init(config: ModelConfig, seed: int) -> Qwen2_5_VL:
    """A new model: normal(0, 1/√width) matrices and embeddings, zero biases, unit norms.

    Adapters, if the config asks for any, are as in `lora.fresh` and leave the other numbers alone.

    At the real widths that is about Hugging Face's 0.02; narrow models do not start to learn from
    0.02, as every map would shrink its input several times. Drawn on the host: nothing to compile,
    and the same numbers on every device.
    """
    graphdef, shapes = abstract(config)
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rsplit("/", 1)[1]
        if name in ("scale", "bias"):
            return np.full(shape, name == "scale", np.float32)
        width = shape[-1] if name == "embedding" else shape[-2]
        return width**-0.5 * rng.standard_normal(shape, np.float32)

    sizes = {path: leaf.shape for path, leaf in weights.flatten(shapes).items()}
    params = {path: draw(path, size) for path, size in sizes.items() if not is_adapter(path)}
    adapters = fresh({path: size for path, size in sizes.items() if is_adapter(path)}, seed)
    return merge(graphdef, jax.tree.map(jnp.asarray, weights.unflatten(params | adapters)))
