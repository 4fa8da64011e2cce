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
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig, normalize_latex
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from math_verify import parse as parse_math
from math_verify import verify as equal

from vtriune_jax.verifiers.math_shortcuts import only_box, verdict

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
_LAST_BOX = replace(_PREDICTION[0].normalization_config, boxed="last")
_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")

_READABLE = re.compile(r"[\d\\$]")
"""A number or LaTeX, without which math-verify finds nothing in a truth."""

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off


PARAMETERS = ()


def check(ground_truth: str, params: Mapping[str, Any]) -> None:
    """ValueError for some of the truths that cannot be read, without asking math-verify."""
    if not _READABLE.search(ground_truth):
        raise _unreadable(ground_truth)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError when the ground truth cannot be read."""
    box = only_box(completion)
    right = verdict(box, ground_truth) if box else None
    if right is None:
        right = asked(completion, ground_truth, box)
    return {"accuracy": float(right), "format": format_score(completion)}


def asked(completion: str, ground_truth: str, box: str | None = None) -> bool:
    """What math-verify says; spared the search through the completion if it has only this box."""
    gold = _gold(ground_truth)
    if not gold:
        raise _unreadable(ground_truth)
    texts = [each for each in gold if isinstance(each, str)]
    if box and normalize_latex(box, _LAST_BOX).strip() in texts:  # it compares these, too
        return True
    prediction = _Prediction(_parse(box or completion, _PREDICTION))
    return bool(prediction) and _right(ground_truth, prediction)


def format_score(completion: str) -> float:
    """The share of the four tags that occur exactly once."""
    return sum(completion.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def _unreadable(ground_truth: str) -> ValueError:
    return ValueError(
        f"math-verify cannot read the ground truth {ground_truth!r}; write it as \\boxed{{…}}"
    )


class _Prediction(list):
    """What was read in a completion: an expression and its text, or only the text.

    The hash is the text's, since an expression (a matrix, say) may have none. Equality asks for
    both: the text of `$50$ percent` is 50, too.
    """

    def __hash__(self) -> int:
        return hash(tuple(each for each in self if isinstance(each, str)))


# The completions of a prompt share the truth, and many of them the answer.
@lru_cache(1024)
def _gold(text: str) -> list[Any]:
    return _parse(text, _GOLD)


@lru_cache(1024)
def _right(ground_truth: str, prediction: _Prediction) -> bool:
    return equal(_gold(ground_truth), prediction, timeout_seconds=None)


def _parse(text: str, extraction: Any) -> list[Any]:
    return parse_math(text, extraction, extraction_mode="first_match", parsing_timeout=0)
