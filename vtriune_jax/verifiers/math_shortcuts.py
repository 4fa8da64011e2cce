r"""What math-verify would find and say, for usual answers, without asking it.

Only where that follows from its source for sure (a test asks both, many thousand times):

* Of a completion with a single `\boxed{…}` it reads what that holds, whatever is around it.
* It takes integers, decimals, fractions of integers and surds as they are written.
* Equal texts are equal, since it compares the texts, too; equal fractions of integers are the same
  object.
* Two numbers further apart than its rounding to six decimals are not equal by any of its ways.

All else (0.5 and 1/2, percentages, words, several boxes, …) is left to math-verify.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_APART = 3e-6
"""Numbers that differ by more are not the same when rounded to six decimals, as floats either."""
_LARGEST = 1e8
"""Below this such a difference is far more than a float's precision."""
_LONGEST = 2_000
"""Characters of an answer beyond which no shortcut is tried."""
_BOX = r"\boxed{"
_BRACE = re.compile("[{}]")
_DELIMITER = re.compile(r"\$|\\\]|\\\)|\]\s")
_PERCENT = re.compile(rf"(?:{_DELIMITER.pattern})\s*+(?:\\?%|[Pp]ercent|[Pp]ct)")
_NATURAL = r"(?:0|[1-9][0-9]{0,7})"
_DECIMAL = re.compile(rf"-?{_NATURAL}(?:\.[0-9]{{1,8}})?")
_FRACTION = re.compile(rf"(-?)\\[dt]?frac\{{(-?{_NATURAL})\}}\{{({_NATURAL})\}}")
_SURD = re.compile(rf"(-?{_NATURAL}|-?)\\sqrt\{{({_NATURAL})\}}")


class _Number(NamedTuple):
    text: str
    value: float
    exact: Fraction | None
    """Of integers and fractions."""


def only_box(completion: str) -> str | None:
    """The single `\\boxed{…}` of a completion if math-verify reads this and nothing else."""
    start = completion.find(_BOX)
    if start < 0 or completion.find("\\boxed", start + 1) >= 0:
        return None
    if completion.find("\\boxed") < start or "\\fbox" in completion or "I hope" in completion:
        return None
    end = _closed(completion, start + len(_BOX))
    if end is None or _PERCENT.search(completion, end):
        return None
    box = completion[start:end]
    # an environment that ends in the box would cut it off
    return None if _DELIMITER.search(box) else box


def verdict(box: str, ground_truth: str) -> bool | None:
    """Whether the answer in a box is right; None where math-verify must be asked."""
    truth = _number(ground_truth)
    answer = truth and _number(box)
    if not (truth and answer):
        return None
    if abs(answer.value - truth.value) > _APART:
        return False
    if answer.exact is None or truth.exact is None:
        # 0.5 is 1/2 where it is the truth
        return True if answer.text == truth.text != "0.5" else None
    return answer.exact == truth.exact


def _closed(text: str, start: int) -> int | None:
    """Where the brace opened before `start` is closed, if there is something in it."""
    depth = 1
    for brace in _BRACE.finditer(text, start, start + _LONGEST):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.end() if brace.start() > start else None
    return None


@lru_cache(1024)
def _number(box: str) -> _Number | None:
    r"""The number in a text that is `\boxed{number}`."""
    if not (box.startswith(_BOX) and box.endswith("}")):
        return None
    text = box[len(_BOX) : -1].strip()
    if _DECIMAL.fullmatch(text):
        return _Number(text, float(text), None if "." in text else Fraction(text))
    if (match := _FRACTION.fullmatch(text)) and match[3] != "0":
        exact = Fraction(int(match[2]), int(match[3])) * (-1 if match[1] else 1)
        return _Number(text, float(exact), exact)
    if match := _SURD.fullmatch(text):
        factor = float(match[1]) if match[1].strip("-") else float(match[1] + "1")
        value = factor * math.sqrt(float(match[2]))
        return _Number(text, value, None) if abs(value) < _LARGEST else None
    return None
