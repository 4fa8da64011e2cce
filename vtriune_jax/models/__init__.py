"""The model and its doors: make, load, save, take apart, put together, run.

    graphdef, params = split(load_pretrained(path))
    hidden = merge(graphdef, params)(ids, positions, segments)      # inside jit

`params` is a nested dict of arrays; a parameter's path (`language/layers/mlp/gate/kernel`) is its
one name everywhere: sharding, optimizer groups, file keys and metrics go by it.
"""

from vtriune_jax.models.attention import KV
from vtriune_jax.models.config import LoRAConfig, ModelConfig, TextConfig, VisionConfig
from vtriune_jax.models.core import abstract, init, merge, split
from vtriune_jax.models.forward import encode, forward
from vtriune_jax.models.lora import merge_lora
from vtriune_jax.models.pretrained import load_pretrained, save_pretrained
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL
from vtriune_jax.models.sizes import named

__all__ = [
    "KV",
    "LoRAConfig",
    "ModelConfig",
    "Qwen2_5_VL",
    "TextConfig",
    "VisionConfig",
    "abstract",
    "encode",
    "forward",
    "init",
    "load_pretrained",
    "merge",
    "merge_lora",
    "named",
    "save_pretrained",
    "split",
]
