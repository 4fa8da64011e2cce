"""Speeds of an H100 that nobody measured: its data sheet, and shares of it that are usual.

They stand in for flags that are not given, and the output names each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from vtriune_jax.errors import UserError
from vtriune_jax.models.pretrained import read_config
from vtriune_jax.models.sizes import SIZES, named

MEMORY_RATE, FLOPS = 3.35e12, 989e12
"""Bytes and bfloat16 FLOP per second of an H100 SXM."""
DECODE_SHARE, PREFILL_SHARE, UPDATE_SHARE = 0.6, 0.5, 0.4
"""Shares of the memory rate, and of the FLOPs twice."""
LINK_RATE = 1e9
"""Bytes per second of the way of the weights, to a disk or from it."""


class Size(NamedTuple):
    """What speeds depend on."""

    parameters: float
    kv_bytes: float
    """Of the keys and values of a token, in bfloat16."""


def model_size(keys: Any) -> Size:
    """Of the language model of `config.model`; the vision tower is small beside it."""
    if not keys.path:
        sizes = keys.tiny
        return _size(
            *(sizes.layers, sizes.hidden, sizes.intermediate, sizes.heads, sizes.kv_heads),
            sizes.vocab_size,
        )
    folder = Path(keys.path).expanduser()
    found = re.search(r"Qwen2\.5-VL-(\d+B)", keys.path, re.IGNORECASE)
    if not folder.is_dir() and not found:
        raise UserError(
            f"model.path={keys.path} is no folder, nor the name of a published model, "
            f"Qwen2.5-VL-{{{','.join(SIZES)}}}-Instruct; or give all speeds by flags"
        )
    model = read_config(folder) if folder.is_dir() or not found else named(found[1].upper())
    text = model.text
    return _size(text.layers, text.embed, text.mlp, text.heads, text.kv_heads, text.vocab)


def _size(layers: int, embed: int, mlp: int, heads: int, kv_heads: int, vocab: int) -> Size:
    kv = kv_heads * embed // heads
    each = 2 * embed**2 + 2 * embed * kv + 3 * embed * mlp
    return Size(layers * each + 2 * vocab * embed, 4.0 * layers * kv)


def decode(model: Size, gpus: int, context: float, most: int) -> tuple[tuple[int, float], ...]:
    """Tokens per second with 1 and with `most` in flight.

    For a token of each, the weights and all keys and values come from memory once.
    """
    rate = DECODE_SHARE * MEMORY_RATE * gpus
    weights, own = 2 * model.parameters, context * model.kv_bytes
    return tuple((n, n * rate / (weights + n * own)) for n in (1, max(most, 2)))


def prefill(model: Size, gpus: int) -> float:
    """Prompt tokens per second."""
    return PREFILL_SHARE * FLOPS * gpus / (2 * model.parameters)


def update(model: Size, tokens: float) -> tuple[float, int]:
    """Seconds to learn from so many tokens, on one chip."""
    return 6 * model.parameters * tokens / (UPDATE_SHARE * FLOPS), 1


def transfer(model: Size) -> float:
    """Seconds of the weights' way in bfloat16."""
    return 2 * model.parameters / LINK_RATE
