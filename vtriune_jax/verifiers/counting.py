"""How many there are.

    accuracy   1 when the answer's number is within `tolerance` (0) of the ground truth's, else 0
    format     1 when the completion marks an answer (`<answer>` or a box), else 0

`error` is the distance itself, if there is a number. Digits and the words up to twenty are read; of
an answer in which several numbers stand ("of 5 dogs 3 are brown") the last one counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vtriune_jax.verifiers.answers import (
    final_answer,
    judging_itself,
    number,
    numbers_in,
    parts,
    tolerance,
    true_answers,
)

PARAMETERS = ("tolerance",)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError for a truth that is no number."""
    (text,) = true_answers(ground_truth, {})
    truth = number(text)
    if truth is None:
        raise ValueError(f"the ground truth {text!r} is not a number")
    most = tolerance(params, 0.0)
    answer = final_answer(completion)
    found = numbers_in(answer or "")
    if not found:
        return parts(answer, 0.0)
    error = abs(found[-1] - truth)
    return parts(answer, error <= most) | {"error": error}


check = judging_itself(verify)
