"""The smallest run that goes through every part of the loop; the tests add the data."""

from typing import Any

from configs import base


def get_config() -> Any:
    config = base.get_config()
    config.data.min_pixels = 28 * 28
    config.data.max_pixels = 112 * 112
    config.data.cot_prompts = False
    config.model.tiny.hidden = 32
    config.model.tiny.intermediate = 48
    config.model.tiny.layers = 1
    config.model.tiny.heads = 2
    config.model.tiny.kv_heads = 1
    config.model.tiny.mrope_section = (2, 3, 3)
    config.model.tiny.vision_hidden = 16
    config.model.tiny.vision_intermediate = 32
    config.model.tiny.vision_depth = 1
    config.model.tiny.full_attention_layers = (0,)
    config.batch.prompt_tokens = 96
    config.batch.completion_tokens = 80
    config.batch.windows = 4
    config.sft.steps = 3
    config.sft.prompts = 8
    config.sft.lr = 1e-3
    config.grpo.steps = 3
    config.grpo.prompts = 8
    config.grpo.samples = 4
    config.grpo.lr = 1e-3
    config.verifiers.mode = "in_process"
    config.verifiers.workers = 1
    config.eval.rows_per_source = 2
    config.eval.batch = 8
    config.checkpoint.every = 1
    config.log.seconds = 0.0
    config.log.samples = 1
    return config
