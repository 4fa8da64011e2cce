"""The published sizes of Qwen2.5-VL by name, for work that needs shapes and no checkpoint.

The numbers are those of the `config.json` of `Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct`. Training
takes its sizes from the checkpoint folder instead (`ModelConfig.from_hf`).
"""

from __future__ import annotations

from vtriune_jax.errors import UserError
from vtriune_jax.models.config import ModelConfig, TextConfig, VisionConfig

SIZES = {
    # size: text vocab, embed, mlp, layers, heads, kv_heads; mlp of the vision tower; tied head
    "3B": (151_936, 2048, 11_008, 36, 16, 2, 3420, True),
    "7B": (152_064, 3584, 18_944, 28, 28, 4, 3420, False),
    "32B": (152_064, 5120, 27_648, 64, 40, 8, 3456, False),
    "72B": (152_064, 8192, 29_568, 80, 64, 8, 3456, False),
}


def named(size: str, *, dtype: str = "float32", remat: str = "none") -> ModelConfig:
    """The config of a published size, e.g. "7B"; UserError for any other name."""
    if size not in SIZES:
        raise UserError(
            f"there is no Qwen2.5-VL of size {size!r}; choose one of {', '.join(SIZES)}"
        )
    vocab, embed, mlp, layers, heads, kv_heads, vision_mlp, tied = SIZES[size]
    return ModelConfig(
        vision=VisionConfig(
            depth=32,
            embed=1280,
            mlp=vision_mlp,
            heads=16,
            out=embed,
            full_attention=(7, 15, 23, 31),
        ),
        text=TextConfig(
            vocab=vocab,
            embed=embed,
            mlp=mlp,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            mrope_section=(16, 24, 24),
            max_positions=128_000,
            bos_token_id=151_643,
            eos_token_id=151_645,
        ),
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        tied=tied,
        dtype=dtype,
        remat=remat,
    )
