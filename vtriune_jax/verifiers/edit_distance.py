"""Texts that are read off an image (OCR, documents), where most of it right is worth something.

    similarity = 1 − d / max(|answer|, |truth|),   d the Levenshtein distance
    accuracy   = the largest similarity to the ground truth or one of `accepted`, if it reaches
                 `threshold` (0.5), else 0: ANLS (Biten 2019) of one question
    format     = 1 when the completion marks an answer (`<answer>` or a box), else 0

Case and spacing do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vtriune_jax.verifiers.answers import best, final_answer, true_answers

PARAMETERS = ("accepted", "threshold")


def check(ground_truth: str, params: Mapping[str, Any]) -> None:
    """What `verify` would raise for every completion."""
    verify("", ground_truth, params, 1.0)  # to compare long texts takes long


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion."""
    threshold = params.get("threshold", 0.5)
    if not (isinstance(threshold, int | float) and 0 <= threshold <= 1):
        raise ValueError(f"threshold={threshold!r}, expected a number of 0…1")

    def similarity(answer: str, truth: str) -> float:
        answer, truth = (" ".join(text.casefold().split()) for text in (answer, truth))
        short, long = sorted((len(answer), len(truth)))
        if long == 0:
            return 1.0
        if short / long < threshold:  # it cannot be reached: spare the quadratic time
            return 0.0
        value = 1 - levenshtein(answer, truth) / long
        return value if value >= threshold else 0.0

    return best(final_answer(completion), true_answers(ground_truth, params), similarity)


def levenshtein(left: str, right: str) -> int:
    """The least number of insertions, deletions and substitutions from one text to the other."""
    codes = np.array([ord(letter) for letter in right], np.int64)
    steps = np.arange(len(right) + 1)
    row = steps
    for letter in left:
        kept = row[:-1] + (codes != ord(letter))
        row = np.concatenate([row[:1] + 1, np.minimum(row[1:] + 1, kept)])
        row = np.minimum.accumulate(row - steps) + steps  # insertions, one after the other
    return int(row[-1])
