"""V-Triune's recipe for Qwen2.5-VL-3B-Instruct, GRPO on Orsta-Data-47k, on-policy.

command   python -m vtriune_jax.main --config=configs/orsta_3b.py --workdir=runs/orsta_3b
checked   python -m vtriune_jax.compile --config=configs/orsta_3b.py --topology=v6e:2x4 \
            --sampling
hardware  8 TPU v6e (2x4): update and sampler were compiled for them, and fit; not run
expect    not yet measured; the paper has no model of this size
"""

from typing import Any

from configs import orsta_7b


def get_config() -> Any:
    """As `orsta_7b`, with another checkpoint and other pieces."""
    config = orsta_7b.get_config()
    config.model.path = "checkpoints/Qwen2.5-VL-3B-Instruct"
    config.model.remat = "full"
    config.batch.micro_batches = 128  # on 8 devices: a group each at once
    config.rollout.pieces = 16  # "checked" above tells what the sampler takes
    return config
