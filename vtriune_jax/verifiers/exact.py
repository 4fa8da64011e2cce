"""One text that must be the same.

    accuracy   1 when the answer equals the ground truth or one of `accepted`, else 0
    format     1 when the completion marks an answer (`<answer>` or a box), else 0

The texts are compared without differences of case, spacing and punctuation around them, or with
`case_sensitive` = true character by character.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtriune_jax.verifiers.answers import (
    best,
    final_answer,
    judging_itself,
    normalized,
    true_answers,
)

PARAMETERS = ("accepted", "case_sensitive")


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion."""
    read = str.strip if params.get("case_sensitive") else normalized
    truths = true_answers(ground_truth, params)
    return best(final_answer(completion), truths, lambda a, b: float(read(a) == read(b)))


check = judging_itself(verify)
