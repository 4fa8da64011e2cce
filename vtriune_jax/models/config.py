"""The sizes of a Qwen2.5-VL, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vtriune_jax.errors import UserError
from vtriune_jax.models.config_keys import (
    MODEL_TYPE,
    TEXT_DEFAULTS,
    TOP_DEFAULTS,
    VISION_DEFAULTS,
    VISION_ROPE,
    sound,
)

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
REMAT = ("none", "dots", "attention", "full")
ATTENTION = ("auto", "xla", "splash", "triton", "cudnn")
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels, for pixels from 0 to 1: what every Qwen2.5-VL was trained with."""


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; sizes in patches and pixels as in Hugging Face's `vision_config`."""

    depth: int
    embed: int
    mlp: int
    heads: int
    out: int
    """Width of the image features, equal to the text's `embed`."""
    full_attention: tuple[int, ...]
    """Layers that attend over a whole image frame; the others stay inside their window."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    """Side of a window in pixels."""
    channels: int = 3
    tokens_per_second: int = 2
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed // self.heads

    @property
    def patch(self) -> int:
        """Numbers in one patch, as the processor flattens it: (channel, frame, row, column)."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        """The same as (channels, frames, rows, columns)."""
        return self.channels, self.temporal_patch_size, self.patch_size, self.patch_size

    @property
    def window_units(self) -> int:
        """Side of a window in units."""
        return self.window_size // self.patch_size // self.merge_size

    @property
    def unit_patches(self) -> int:
        """Patches in one unit."""
        return self.merge_size**2

    @property
    def slots(self) -> int:
        """Patches that fit into one window."""
        return self.window_units**2 * self.unit_patches


@dataclass(frozen=True)
class TextConfig:
    """The language model, as in Hugging Face's `text_config`."""

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    mrope_section: tuple[int, int, int]
    """How many rotary frequencies turn with time, height and width."""
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    max_positions: int = 32_768
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed // self.heads


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters of the language layers (see `models.lora`)."""

    rank: int
    alpha: float
    target: str = "."
    """Regex, searched in the paths of a layer's matrices: attn/{q,k,v,o}, mlp/{gate,up,down}."""

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.alpha / self.rank

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"lora rank={self.rank} and alpha={self.alpha} must be above 0; pass no LoRAConfig "
                "for a model without adapters"
            )
        try:
            re.compile(self.target)
        except re.error as error:
            raise UserError(
                f"model.lora.target={self.target!r} is not a regular expression: {error}"
            ) from error


@dataclass(frozen=True)
class ModelConfig:
    """Everything the model's shape depends on, and the knobs of how it computes."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tied: bool
    """Whether the output head is the transposed embedding."""
    dtype: str = "float32"
    """Of activations; parameters stay float32 and are cast inside each layer."""
    remat: str = "none"
    """What the backward pass recomputes: see `layers.through`."""
    unroll: bool = False
    """Whether each layer is compiled instead of one for a scan: see `layers.through`."""
    attention: str = "auto"
    """The kernel: see `attention.attention`."""
    lora: LoRAConfig | None = None
    """Adapters of the language layers, if any. They are ours: a checkpoint folder has none."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Ids that mean an image and must not appear in a completion."""
        return (
            self.image_token_id,
            self.video_token_id,
            self.vision_start_token_id,
            self.vision_end_token_id,
        )

    @classmethod
    def from_hf(cls, hf: Any, *, dtype: str = "float32", remat: str = "none") -> ModelConfig:
        """Read a `Qwen2_5_VLConfig` or its dict, transformers 5's nested layout or the hub's flat.

        The hub's files keep the text sizes at the top level, `rope_theta` beside them and the
        M-RoPE sections in `rope_scaling`. A key without which transformers does is filled up as
        it does. Raises UserError on another one that is missing, on another kind of model and on a
        feature that this model does not have.
        """
        hf = hf.to_dict() if hasattr(hf, "to_dict") else hf
        top = sound("the model's config", hf, TOP_DEFAULTS)
        text = top if top.get("text_config") is None else top["text_config"]
        try:
            return cls(
                vision=_vision_from_hf(top["vision_config"]),
                text=_text_from_hf(text),
                image_token_id=top["image_token_id"],
                video_token_id=top["video_token_id"],
                vision_start_token_id=top["vision_start_token_id"],
                vision_end_token_id=top["vision_end_token_id"],
                tied=bool(top.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
                dtype=dtype,
                remat=remat,
            )
        except KeyError as error:
            raise UserError(
                f"the model's config has no {error}; expected the config.json of a Qwen2.5-VL"
            ) from None

    def to_hf_dict(self) -> dict[str, Any]:
        """The `config.json` in transformers 5's nested layout, with what 4.57 reads beside it."""
        text, vision = self.text, self.vision
        rope = {"rope_type": "default", "mrope_section": list(text.mrope_section)}
        eos = list(text.eos_token_id) if isinstance(text.eos_token_id, tuple) else text.eos_token_id
        return {
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "dtype": "float32",
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "tie_word_embeddings": self.tied,
            "text_config": {
                "model_type": "qwen2_5_vl_text",
                "dtype": "float32",
                "vocab_size": text.vocab,
                "hidden_size": text.embed,
                "intermediate_size": text.mlp,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "num_key_value_heads": text.kv_heads,
                "hidden_act": "silu",
                "rms_norm_eps": text.norm_eps,
                "max_position_embeddings": text.max_positions,
                "max_window_layers": text.layers,
                "use_sliding_window": False,
                "tie_word_embeddings": self.tied,
                "rope_parameters": {**rope, "rope_theta": text.rope_theta},
                "rope_scaling": rope,
                "rope_theta": text.rope_theta,
                "bos_token_id": text.bos_token_id,
                "eos_token_id": eos,
                "pad_token_id": text.pad_token_id,
            },
            "vision_config": {
                "model_type": "qwen2_5_vl_vision",
                "depth": vision.depth,
                "hidden_size": vision.embed,
                "intermediate_size": vision.mlp,
                "num_heads": vision.heads,
                "hidden_act": "silu",
                "out_hidden_size": vision.out,
                "fullatt_block_indexes": list(vision.full_attention),
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "spatial_merge_size": vision.merge_size,
                "window_size": vision.window_size,
                "in_channels": vision.channels,
                "tokens_per_second": vision.tokens_per_second,
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
        }


def _vision_from_hf(found: Any) -> VisionConfig:
    hf = sound("vision_config", found, VISION_DEFAULTS)
    rope = sound("vision_config.rope_parameters", hf.get("rope_parameters") or {}, VISION_ROPE)
    return VisionConfig(
        depth=hf["depth"],
        embed=hf["hidden_size"],
        mlp=hf["intermediate_size"],
        heads=hf["num_heads"],
        out=hf["out_hidden_size"],
        full_attention=tuple(i for i in hf["fullatt_block_indexes"] if i in range(hf["depth"])),
        patch_size=hf["patch_size"],
        temporal_patch_size=hf["temporal_patch_size"],
        merge_size=hf["spatial_merge_size"],
        window_size=hf["window_size"],
        channels=hf["in_channels"],
        tokens_per_second=hf["tokens_per_second"],
        rope_theta=rope["rope_theta"],
    )


def _text_from_hf(found: Any) -> TextConfig:
    hf = sound("text_config", found, TEXT_DEFAULTS)
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = sound(name, hf.get(name) or {}, {"rope_theta": hf["rope_theta"]})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "mrope"):
        raise UserError(f"rope type {kind!r} is not supported; expected 'default' or 'mrope'")
    eos = hf["eos_token_id"]
    return TextConfig(
        vocab=hf["vocab_size"],
        embed=hf["hidden_size"],
        mlp=hf["intermediate_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"] or hf["num_attention_heads"],
        mrope_section=tuple(rope["mrope_section"]),
        rope_theta=rope["rope_theta"],
        norm_eps=hf["rms_norm_eps"],
        max_positions=hf["max_position_embeddings"],
        bos_token_id=hf["bos_token_id"],
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=hf.get("pad_token_id"),
    )


def _check(config: ModelConfig) -> None:
    """Raise a UserError on sizes that do not fit together."""
    vision, text = config.vision, config.text
    window = vision.patch_size * vision.merge_size
    wrong = {
        f"remat={config.remat!r} is unknown; choose one of {', '.join(REMAT)}": config.remat
        not in REMAT,
        f"attention={config.attention!r} is unknown; choose one of {', '.join(ATTENTION)}": (
            config.attention not in ATTENTION
        ),
        f"dtype={config.dtype!r} is unknown; choose 'float32' or 'bfloat16'": config.dtype
        not in ("float32", "bfloat16"),
        f"text heads {text.heads} do not divide the width {text.embed}": text.embed % text.heads,
        f"kv heads {text.kv_heads} do not divide the heads {text.heads}": text.heads
        % text.kv_heads,
        f"mrope_section {text.mrope_section} must be three numbers, none below 0, adding up to "
        f"half the head width, {text.head_dim // 2}": len(text.mrope_section) != 3
        or min(text.mrope_section) < 0
        or 2 * sum(text.mrope_section) != text.head_dim,
        f"vision heads {vision.heads} and width {vision.embed} must give a head width divisible "
        "by 4": vision.embed % vision.heads or vision.head_dim % 4,
        f"vision output width {vision.out} differs from the text width {text.embed}": vision.out
        != text.embed,
        f"window_size {vision.window_size} is not a multiple of patch × merge = {window}": (
            vision.window_size % window
        ),
        f"full-attention layers {vision.full_attention} exceed depth {vision.depth}": any(
            not 0 <= layer < vision.depth for layer in vision.full_attention
        ),
    }
    for message, is_wrong in wrong.items():
        if is_wrong:
            raise UserError(f"model config: {message}")
