r"""Answers in `\boxed{}` judged by math-verify, for everything whose answer is a value or a word.

    accuracy   1 when the expressions are equal, else 0
    format     a quarter for each of the four tags that occurs exactly once, newlines included

The gold answer is read with math-verify's default extraction; of the completion only LaTeX counts,
a box before anything else. How this differs from the original is in docs/vtriune_compat.md.

math-verify's own alarms are off: they need a main thread and leave SymPy in any state. The worker
process that runs this is killed at its time limit instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify import parse as parse_math
from math_verify import verify as equal

_GOLD = (LatexExtractionConfig(), ExprExtractionConfig())
_PREDICTION = (
    LatexExtractionConfig(
        try_extract_without_anchor=False,
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=False, nits=False, boxed="all"
        ),
    ),
)
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError when the ground truth cannot be read."""
    gold = _parse(ground_truth, _GOLD)
    if not gold:
        raise ValueError(
            f"math-verify cannot read the ground truth {ground_truth!r}; write it as \\boxed{{…}}"
        )
    prediction = _parse(completion, _PREDICTION)
    return {
        "accuracy": float(bool(prediction) and equal(gold, prediction, timeout_seconds=None)),
        "format": format_score(completion),
    }


def format_score(completion: str) -> float:
    """The share of the four tags that occur exactly once."""
    return sum(completion.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def _parse(text: str, extraction: Any) -> list[Any]:
    return parse_math(text, extraction, extraction_mode="first_match", parsing_timeout=0)
