"""GRPO of a 3B checkpoint on your own rows, on one GPU of 80 GB.

command   python -m vtriune_jax.main --config=configs/one_gpu.py --workdir=runs/mine \
            --config.model.path=FOLDER --config.data.train="(('my_train.parquet', 1.0),)" \
            --config.data.heldout="('my_test.parquet',)"
checked   python -m vtriune_jax.compile --config=configs/one_gpu.py --topology=h100:1 --sampling
hardware  one GPU of 80 GB: update (61.5 of 73.3 GiB) and sampler (40.9) were compiled for an H100,
          and fit; not run. With --config.model.lora.rank=16 --config.grpo.lr=1e-5 25.3 and 23.9;
          on eight such GPUs, with --config.batch.micro_batches=8, 13.5 and 10.2 on each
time      not yet measured; at the peaks of the data sheet an update of full slots takes 18 s
expect    not yet measured
"""

from typing import Any

from configs import base


def get_config() -> Any:
    """GRPO alone; an update of 64 groups goes through the model group by group."""
    config = base.get_config()
    config.stages = ("grpo",)  # imitating bare ground truths would spoil a real model

    config.model.path = "checkpoints/Qwen2.5-VL-3B-Instruct"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.data.max_pixels = 1024 * 1024

    config.batch.prompt_tokens = 2048  # 1,337 of them for the largest picture
    config.batch.completion_tokens = 1024
    config.batch.windows = 120
    config.batch.micro_batches = 64

    config.grpo.steps = 200
    config.grpo.prompts = 64
    config.grpo.warmup_steps = 10
    config.grpo.mu_dtype = "bfloat16"

    config.rollout.pieces = 4
    config.checkpoint.every = 20
    return config
