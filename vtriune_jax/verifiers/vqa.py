"""Open questions that several people have answered.

    accuracy   min(n / 3, 1), n = how many of them gave this answer: VQA's soft accuracy (Antol
               2015); with fewer than three answers, n out of all
    format     1 when the completion marks an answer (`<answer>` or a box), else 0

`answers`, a list, holds what people said; without it the ground truth is the only answer. Compared
are texts without case, punctuation and articles, small numbers in digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vtriune_jax.verifiers.answers import (
    NUMBER_WORDS,
    final_answer,
    judging_itself,
    normalized,
    parts,
    true_answers,
)

_AGREEING = 3
_ARTICLES = {"a", "an", "the"}
_APOSTROPHE = re.compile(r"['’]")
_PUNCTUATION = re.compile(r"[^\w\s.,:]|[.,:](?![0-9])|(?<![0-9])[.,:]")


PARAMETERS = ("answers",)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion."""
    said = [plain(text) for text in params.get("answers") or true_answers(ground_truth, {})]
    answer = final_answer(completion)
    agreeing = 0 if answer is None else said.count(plain(answer))
    return parts(answer, min(agreeing / min(_AGREEING, len(said)), 1.0))


check = judging_itself(verify)


def plain(text: str) -> str:
    """Words without case, punctuation and articles; small numbers in digits."""
    text = _PUNCTUATION.sub(" ", _APOSTROPHE.sub("", normalized(text)))
    words = [str(NUMBER_WORDS.get(word, word)) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES)
