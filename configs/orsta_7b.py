"""V-Triune's recipe for Orsta-7B: Qwen2.5-VL-7B-Instruct, GRPO on Orsta-Data-47k, on-policy.

command   python -m vtriune_jax.main --config=configs/orsta_7b.py --workdir=runs/orsta_7b
checked   python -m vtriune_jax.compile --config=configs/orsta_7b.py --topology=v5p:2x2x4 \
            --sampling
hardware  16 TPU v5p (2x2x4): update and sampler were compiled for them, and fit; not run
expect    not yet measured; the paper's Orsta-7B: MEGA-Bench Core 35.07 → 38.31

Checkpoint and data are expected in `checkpoints/` and `data/`, as their pages on Hugging Face name
them (Qwen/Qwen2.5-VL-7B-Instruct, One-RL-to-See-Them-All/Orsta-Data-47k). Off-policy as in the
paper: --config.grpo.minibatches=8 --config.grpo.lr=5e-7 --config.grpo.warmup_steps=55 \
  --config.batch.micro_batches=8
"""

from typing import Any

from configs import base


def get_config() -> Any:
    """As `base`, with slots for images of up to 1,280 tokens (the paper: prompts of up to 8,192).

    Larger images are made smaller; other rows that do not fit are skipped and counted.
    """
    config = base.get_config()
    config.stages = ("grpo",)

    config.model.path = "checkpoints/Qwen2.5-VL-7B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"  # 16 TPU v5p have room for it; smaller ones take "full"

    config.data.train = (("data/Orsta-Data-47k/train/*.parquet", 1.0),)
    config.data.heldout = ("data/Orsta-Data-47k/test/*.parquet",)
    config.data.max_pixels = 1280 * 28 * 28
    config.data.on_bad_row = "skip"

    config.batch.prompt_tokens = 2048
    config.batch.completion_tokens = 2048
    config.batch.windows = 100
    config.batch.micro_batches = 64  # on 16 devices: a group each at once
    config.rollout.pieces = 8  # "checked" above tells what the sampler takes

    config.verifiers.workers = 16
    config.eval.batch = 128
    return config
