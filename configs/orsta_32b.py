"""V-Triune's recipe for Qwen2.5-VL-32B-Instruct, GRPO on Orsta-Data-47k, on-policy.

command   python -m vtriune_jax.main --config=configs/orsta_32b.py --workdir=runs/orsta_32b
checked   python -m vtriune_jax.compile --config=configs/orsta_32b.py --topology=v5p:4x4x4 \
            --sampling
hardware  64 TPU v5p (4x4x4): update and sampler were compiled for them, and fit; not run
expect    not yet measured; the paper's Orsta-32B: MEGA-Bench Core 25.94 (0321), 45.78 (0326)
"""

from typing import Any

from configs import orsta_7b


def get_config() -> Any:
    """As `orsta_7b`, with another checkpoint and other pieces."""
    config = orsta_7b.get_config()
    config.model.path = "checkpoints/Qwen2.5-VL-32B-Instruct"
    config.model.remat = "full"
    config.batch.micro_batches = 16  # on 64 devices: a group each at once
    config.rollout.pieces = 8  # "checked" above tells what the sampler takes
    return config
