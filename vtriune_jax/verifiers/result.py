"""What `verify` may return: finite numbers, accuracy and format of 0…1 among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_REWARDED = ("accuracy", "format")
_ROUNDING = 1e-6
"""By which a weighted mean may come out above 1."""


def checked(parts: Mapping[str, Any]) -> dict[str, float]:
    """The parts as floats; ValueError or TypeError for what is no result, KeyError for a missing
    part."""
    regular = type(parts) is dict and set(map(type, parts.values())) == {float}
    numbers = parts if regular else {name: float(value) for name, value in parts.items()}
    if not math.isfinite(sum(numbers.values())):  # or a sum that overflows
        wrong = [name for name, value in numbers.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"the verifier's {', '.join(wrong)} is not a finite number")
    for name in _REWARDED:
        if not -_ROUNDING <= numbers[name] <= 1 + _ROUNDING:
            raise ValueError(f"the verifier's {name} is {numbers[name]:g}, expected 0…1")
    return dict(numbers)
