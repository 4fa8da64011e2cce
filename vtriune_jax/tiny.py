"""A Qwen2.5-VL of laptop size, as an ordinary checkpoint folder.

The architecture is the real one, only narrower; the weights are random, the tokenizer is trained on
the built-in sources. From here on the folder is read like any checkpoint from a hub.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vtriune_jax import models
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.models.config import ModelConfig


def ensure_tiny(path: Path, sizes: Any, texts: Iterable[str], seed: int) -> Path:
    """Builds the checkpoint in `path` unless it is there; never leaves half of one behind.

    `sizes` is `config.model.tiny`; `texts` is what the tokenizer learns its merges from.
    """
    if path.exists():
        return path
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    write_processor(scratch, texts, vocab_size=sizes.vocab_size)
    tokenizer = load_processor(scratch).tokenizer
    config = ModelConfig.from_hf(tiny_config(sizes, tokenizer))
    models.save_pretrained(models.init(config, seed), scratch)
    scratch.rename(path)
    return path


def tiny_config(sizes: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `config.json` of the tiny model, in the layout of transformers 5."""
    token = tokenizer.convert_tokens_to_ids
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": sizes.tie,
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": sizes.tie,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(sizes.mrope_section),
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        "vision_config": {
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": sizes.vision_intermediate,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": sizes.window_size,
            "fullatt_block_indexes": list(sizes.full_attention_layers),
            "tokens_per_second": 2,
        },
    }
