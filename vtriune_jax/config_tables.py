"""What the values of a config may be: one line a key, and what several keys must satisfy together.

A new key needs a line in `configs/base.py` and, unless it is a free string or a boolean, one here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Test = Callable[..., bool]


def positive(value: float) -> bool:
    """More than 0, and finite."""
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    """At least 0, and finite."""
    return 0 <= value < math.inf


def one_of(*choices: str) -> tuple[Test, str]:
    """One of some words."""
    return choices.__contains__, "one of " + ", ".join(f'"{choice}"' for choice in choices)


def strings(values: tuple[Any, ...]) -> bool:
    """Non-empty strings only."""
    return all(isinstance(value, str) and value for value in values)


def counts(values: tuple[Any, ...]) -> bool:
    """Integers from 0 on."""
    return all(type(value) is int and value >= 0 for value in values)


def weighted(values: tuple[Any, ...]) -> bool:
    """Some (source, weight) pairs."""
    pairs = [value for value in values if isinstance(value, tuple | list) and len(value) == 2]
    return 0 < len(pairs) == len(values) and all(
        isinstance(source, str) and source and type(weight) in (int, float) and positive(weight)
        for source, weight in pairs
    )


def stages(values: tuple[Any, ...]) -> bool:
    """ "sft" and "grpo", each at most once."""
    return sorted(map(str, values)) in (["sft"], ["grpo"], ["grpo", "sft"])


def betas(values: tuple[Any, ...]) -> bool:
    """Two numbers in [0, 1)."""
    return len(values) == 2 and all(type(beta) in (int, float) and 0 <= beta < 1 for beta in values)


def regexes(values: tuple[Any, ...]) -> bool:
    """Regular expressions that compile."""
    try:
        return strings(values) and all(re.compile(value) for value in values)
    except re.error:
        return False


RULES: tuple[tuple[str, Test, str], ...] = (
    (r"stages", stages, '"sft", "grpo" or both, each once'),
    (r"model\.dtype", *one_of("float32", "bfloat16")),
    (r"model\.remat", *one_of("none", "dots", "attention", "full")),
    (r"model\.attention", *one_of("auto", "xla", "splash", "triton", "cudnn")),
    (r"model\.lora\.rank", not_negative, "0 (off) or more"),
    (r"model\.lora\.alpha", positive, "above 0, and finite"),
    (
        r"model\.lora\.target",
        lambda regex: regexes((regex,)),
        'a regular expression, as in "attn/"',
    ),
    (r"model\.lora\.base_dtype", *one_of("float32", "bfloat16")),
    (r"model\.tiny\.(mrope_section|full_attention_layers)", counts, "integers from 0 on"),
    (r"model\.tiny\.(vocab_size|hidden|intermediate|layers|heads|kv_heads)", positive, "above 0"),
    (r"model\.tiny\.(vision_\w+|window_size)", positive, "above 0"),
    (r"data\.train", weighted, '(source, weight above 0) pairs, as in (("digits/counting", 1.0),)'),
    (
        r"data\.heldout|(verifiers|rollout)\.addresses",
        strings,
        'strings, as in ("digits/counting",)',
    ),
    (r"data\.(min|max)_pixels", lambda area: area >= 28 * 28, "at least 784, one 28×28 token"),
    (r"data\.on_bad_row", *one_of("error", "skip")),
    (r"data\.threads", positive, "above 0"),
    (r"batch\.(\w+_tokens|micro_batches)", positive, "above 0"),
    (r"batch\.windows", not_negative, "0 or more"),
    (r"batch\.layout", *one_of("auto", "single", "group", "packed")),
    (r"(sft|grpo)\.(steps|warmup_steps|weight_decay)", not_negative, "0 or more"),
    (r"(sft|grpo)\.(prompts|lr|grad_clip)", positive, "above 0, and finite"),
    (r"(sft|grpo)\.mu_dtype", *one_of("float32", "bfloat16")),
    (r"(sft|grpo)\.betas", betas, "two numbers in [0, 1)"),
    (r"(sft|grpo)\.freeze", regexes, 'regular expressions, as in ("^visual/",)'),
    (r"grpo\.samples", lambda n: n >= 2, "at least 2: advantages compare completions"),
    (r"grpo\.(epochs|minibatches|clip_high|temperature)", positive, "above 0, and finite"),
    (r"grpo\.clip_low", lambda low: 0 < low <= 1, "above 0 and at most 1"),
    (r"grpo\.dual_clip", lambda c: c == 0 or 1 < c < math.inf, "0 (off) or above 1, as in 3.0"),
    (r"grpo\.(tis_cap|refill|overlong_cushion)", not_negative, "0 (off) or more"),
    (r"grpo\.(kl_weight|entropy_weight)", not_negative, "0 (off) or more"),
    (r"grpo\.loss", *one_of("grpo", "gspo", "cispo")),
    (r"grpo\.normalise", *one_of("token", "sequence", "dr")),
    (r"grpo\.old", *one_of("recomputed", "rollout")),
    (r"grpo\.kl", *one_of("k1", "k2", "k3", "mse")),
    (
        r"grpo\.advantage",
        *one_of("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"),
    ),
    (r"grpo\.top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
    (r"grpo\.top_k", not_negative, "0 (off) or more"),
    (r"rollout\.engine", *one_of("local", "sglang")),
    (r"rollout\.(ahead|carry|over_sampling|probe_prompts)", not_negative, "0 or more"),
    (r"rollout\.(pieces|deadline_seconds|probe_gap)", positive, "above 0, and finite"),
    (r"rollout\.weights_dtype", *one_of("float32", "bfloat16")),
    (r"mesh\.\w+", lambda size: size == -1 or size > 0, "above 0, or -1 for the rest"),
    (r"verifiers\.mode", *one_of("server", "in_process")),
    (r"verifiers\.(workers|timeout_seconds|deadline_seconds)", positive, "above 0, and finite"),
    (r"eval\.batch", positive, "above 0"),
    (r"eval\.(rows_per_source|temperature)", not_negative, "0 or more"),
    (r"eval\.iou_threshold", lambda iou: 0 < iou <= 1, "above 0 and at most 1"),
    (r"checkpoint\.(every|keep)", positive, "above 0"),
    (r"log\.seconds", not_negative, "0 or more"),
    (r"seed|log\.samples", not_negative, "0 or more"),
)
"""key → what its value must be like, besides having the type of base's; one line a key at most."""

DIVISIBLE: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("model.tiny.hidden",), ("model.tiny.heads",)),
    (("model.tiny.heads",), ("model.tiny.kv_heads",)),
    (("model.tiny.vision_hidden",), ("model.tiny.vision_heads",)),
    (("sft.prompts",), ("batch.micro_batches",)),
    (("grpo.prompts", "grpo.samples"), ("grpo.minibatches", "batch.micro_batches")),
)
"""The product of the first keys is a multiple of the product of the second ones."""

RELATIONS: tuple[tuple[Test, str, tuple[str, ...]], ...] = (
    (
        lambda low, high: low <= high,
        "{0} must not exceed {1}",
        ("data.min_pixels", "data.max_pixels"),
    ),
    (
        lambda prompts, minibatches: prompts % minibatches == 0,
        "{0} must be a multiple of {1}: a group stays in one minibatch",
        ("grpo.prompts", "grpo.minibatches"),
    ),
    (
        lambda minibatches, epochs, top_p, top_k: (
            minibatches * epochs == 1 or (top_p == 1 and top_k == 0)
        ),
        "{0} × {1} above 1 needs top_p=1 and top_k=0, not {2} and {3}: the ratio is to the whole "
        "sampling distribution",
        ("grpo.minibatches", "grpo.epochs", "grpo.top_p", "grpo.top_k"),
    ),
    (
        lambda cap, old, minibatches, epochs: (
            not cap or old == "recomputed" or minibatches * epochs == 1
        ),
        '{0} needs grpo.old="recomputed", not {1}, whose ratio is to the sampler already',
        ("grpo.tis_cap", "grpo.old", "grpo.minibatches", "grpo.epochs"),
    ),
    (
        lambda ahead, cap: not ahead or cap > 0,
        "{0} trains on completions of an earlier policy: {1} must be above 0, as 2.0",
        ("rollout.ahead", "grpo.tis_cap"),
    ),
    (
        lambda ahead, refill: ahead <= 1 or not refill,
        "{0} above 1 needs refill=0, not {1}: how many prompts a step takes must be known before "
        "the next",
        ("rollout.ahead", "grpo.refill"),
    ),
    (
        lambda refill, advantage: not refill or advantage != "reinforce++",
        "{0} must be 0 with {1}, which learns from groups of equal scores too",
        ("grpo.refill", "grpo.advantage"),
    ),
    (
        lambda engine, addresses: (engine == "sglang") == bool(addresses),
        '{0} and {1} do not go together: "sglang" needs addresses, "local" has none',
        ("rollout.engine", "rollout.addresses"),
    ),
    (
        lambda extra, engine, refill: not extra or (engine == "sglang" and not refill),
        '{0} needs the engine "sglang" and refill=0, not {1} and {2}',
        ("rollout.over_sampling", "rollout.engine", "grpo.refill"),
    ),
    (
        lambda engine, top_p, top_k: engine == "local" or (top_p == 1 and top_k == 0),
        "{0} needs top_p=1 and top_k=0, not {1} and {2}: servers tell log-probs of what they leave",
        ("rollout.engine", "grpo.top_p", "grpo.top_k"),
    ),
    (
        lambda dual_clip, loss: not dual_clip or loss != "cispo",
        "{0} does nothing with {1}, whose weight is clipped for every advantage; set it to 0",
        ("grpo.dual_clip", "grpo.loss"),
    ),
    (
        lambda cushion, slot: cushion <= slot,
        "{0} must not exceed {1}",
        ("grpo.overlong_cushion", "batch.completion_tokens"),
    ),
    (
        lambda section, hidden, heads: 2 * sum(section) * heads == hidden,
        "{0} must sum to half a head: {1} / {2} / 2",
        ("model.tiny.mrope_section", "model.tiny.hidden", "model.tiny.heads"),
    ),
    (
        lambda size: size % 28 == 0,
        "{0} must be a multiple of 28, the side of an image token",
        ("model.tiny.window_size",),
    ),
    (
        lambda layers, depth: all(layer < depth for layer in layers),
        "{0} must be below {1}: layers count from 0",
        ("model.tiny.full_attention_layers", "model.tiny.vision_depth"),
    ),
    (
        lambda addresses, mode: not addresses or mode == "server",
        '{0} needs verifiers.mode="server", not {1}',
        ("verifiers.addresses", "verifiers.mode"),
    ),
    (
        lambda *mesh: mesh.count(-1) <= 1,
        "{0}, {1}, {2}: at most one can be -1, the rest",
        ("mesh.data", "mesh.fsdp", "mesh.tensor"),
    ),
)
"""What several keys must satisfy together; {0} is the first one with its value."""

FREE = (
    r"data\.(cache|threads)|model\.(attention|remat|unroll)|batch\.(layout|micro_batches)"
    r"|(verifiers|mesh|checkpoint|log)\..*"
    r"|rollout\.(pieces|addresses|deadline_seconds|weights_folder\w*|probe_\w+)"
)
"""Keys that a resumed run may change, beside the steps of its last stage: how long, on what and how
loudly, not what is learnt."""
