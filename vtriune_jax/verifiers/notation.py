"""JSON at the speed of C: `orjson`, and the standard library for what it refuses."""

from __future__ import annotations

import json
from typing import Any

import orjson


def loads(text: str | bytes) -> Any:
    """As `json.loads`, NaN and lone surrogates included; only integers beyond 64 bits are floats.

    ValueError or RecursionError for what is no JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def dumps(value: Any) -> bytes:
    """Like `json.dumps`, for finite numbers and dataclasses; NaN may be written as null."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:  # lone surrogates, types derived from float
        return json.dumps(value, default=vars).encode()
