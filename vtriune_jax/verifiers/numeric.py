"""Values that are read off a chart: a number may be a little off, any other text may not.

    accuracy   1 when |answer − truth| ≤ tolerance · |truth|, with `tolerance` = 0.05 the relaxed
               accuracy of ChartQA (Masry 2022); texts that are no numbers must be equal but for
               case, spacing and punctuation around them
    format     1 when the completion marks an answer (`<answer>` or a box), else 0

A percent sign divides by 100; thousands separators and currency signs are dropped. `accepted` holds
other right answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtriune_jax.verifiers.answers import (
    best,
    final_answer,
    judging_itself,
    normalized,
    number,
    tolerance,
    true_answers,
)

PARAMETERS = ("accepted", "tolerance")


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion."""
    most = tolerance(params, 0.05)

    def close(answer: str, truth: str) -> float:
        given, expected = number(answer), number(truth)
        if given is None or expected is None:
            return float(normalized(answer) == normalized(truth))
        return float(abs(given - expected) <= most * abs(expected))

    return best(final_answer(completion), true_answers(ground_truth, params), close)


check = judging_itself(verify)
