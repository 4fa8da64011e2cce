"""The keys of a Hugging Face `config.json`: what they may be, and what those are that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vtriune_jax.errors import UserError

MODEL_TYPE = "qwen2_5_vl"

# What transformers takes for a key that a file lacks. Its 4.49 left out of `vision_config` what is
# equal to these, and the hub's file of 32B is of that kind.
TOP_DEFAULTS = {
    "model_type": None,  # which it must not lack
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "in_channels": 3,
    "tokens_per_second": 4,
}
VISION_ROPE = {"rope_theta": 10_000.0}
TEXT_DEFAULTS = {
    "num_key_value_heads": 8,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32_768,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}


def whole(value: Any) -> bool:
    """Whether it is a whole number above 0."""
    return type(value) is int and value > 0


COUNTS = (
    *("hidden_size", "intermediate_size", "out_hidden_size", "vocab_size", "window_size"),
    *("num_hidden_layers", "num_attention_heads", "num_heads", "depth", "in_channels"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size", "tokens_per_second"),
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    "max_position_embeddings",
)
RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("model_type",),
        lambda name: name in (MODEL_TYPE, f"{MODEL_TYPE}_text", f"{MODEL_TYPE}_vision"),
        f"{MODEL_TYPE!r}",
    ),
    (COUNTS, whole, "a whole number above 0"),
    (
        ("num_key_value_heads",),
        lambda heads: heads is None or whole(heads),
        "a whole number above 0, or null for as many as heads",
    ),
    (
        ("fullatt_block_indexes", "mrope_section"),
        lambda values: isinstance(values, list | tuple) and all(type(n) is int for n in values),
        "a list of whole numbers",
    ),
    (
        ("rope_theta", "rms_norm_eps"),
        lambda value: type(value) in (int, float) and value > 0,
        "a number above 0",
    ),
    (("hidden_act",), lambda name: name == "silu", "'silu'"),
    (("use_sliding_window",), lambda used: not used, "false"),
)
"""Keys, what their values must be, and the same in words."""


def sound(name: str, found: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group of keys, with defaults of those it lacks; UserError on one that is against RULES."""
    if not isinstance(found, Mapping):
        raise UserError(f"{name} is {found!r}; expected keys and values, as a Qwen2.5-VL has")
    hf = {**defaults, **found}
    for keys, test, words in RULES:
        for key in keys:
            if key in hf and not test(hf[key]):
                raise UserError(f"{name}: {key}={hf[key]!r} is not supported; expected {words}")
    return hf
