"""V-Triune's recipe for Qwen2.5-VL-72B-Instruct, GRPO on Orsta-Data-47k, on-policy.

command   python -m vtriune_jax.main --config=configs/orsta_72b.py --workdir=runs/orsta_72b \
            --config.rollout.engine=sglang --config.rollout.addresses=runs/rollouts/addresses
checked   python -m vtriune_jax.compile --config=configs/orsta_72b.py --topology=v5p:4x4x8
hardware  128 TPU v5p (4x4x8): the update was compiled for them, and fits (README.md); not run
expect    not yet measured; the paper has no model of this size

Completions by a fleet (docs/hosts.md): the in-process sampler wants the parameters whole on each
device, which are larger than one.
"""

from typing import Any

from configs import orsta_7b


def get_config() -> Any:
    """As `orsta_7b`, with another checkpoint and other pieces."""
    config = orsta_7b.get_config()
    config.model.path = "checkpoints/Qwen2.5-VL-72B-Instruct"
    config.model.remat = "full"
    config.batch.micro_batches = 8  # on 128 devices: a group each at once
    return config
