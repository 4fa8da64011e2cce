"""Questions with lettered options.

    accuracy   1 when exactly the right letters are chosen, else 0
    format     1 when the completion marks an answer (`<answer>` or a box), else 0

Read are `B`, `(b)`, `B. a dog`, `A, C`, `A and C`, `the answer is B`, and, when the row gives the
texts of the options as `choices`, the text of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vtriune_jax.verifiers.answers import (
    final_answer,
    judging_itself,
    normalized,
    parts,
    true_answers,
)

_LETTERS = re.compile(r"\W*([a-z]\)?(?>(?:(?:\s*[,;&/]\s*|\s+and\s+|\s+)\(?[a-z]\)?)*))\W*", re.I)
_LEADING = re.compile(r"\W*([a-z])\s*[.):](?:\s|$)", re.I)
_STATED = re.compile(r"\b(?:answer|option|choice)(?:\s+is|\s*:)?\s*\W{0,3}([a-z])\b", re.I)


PARAMETERS = ("choices",)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError for a truth without letters."""
    choices = params.get("choices", ())
    (text,) = true_answers(ground_truth, {})
    truth = chosen(text, choices)
    if not truth:
        raise ValueError(f"the ground truth {text!r} names no option")
    answer = final_answer(completion)
    return parts(answer, answer is not None and chosen(answer, choices) == truth)


check = judging_itself(verify)


def chosen(text: str, choices: Sequence[str] = ()) -> frozenset[str]:
    """The letters that a text chooses, in capitals; empty when that is unclear."""
    named = [k for k, choice in enumerate(choices) if normalized(choice) == normalized(text)]
    if len(named) == 1:
        return frozenset(chr(ord("A") + named[0]))
    if letters := _LETTERS.fullmatch(text):
        return frozenset(re.findall(r"\b[A-Z]\b", letters[1].upper()))
    if leading := _LEADING.match(text):
        return frozenset(leading[1].upper())
    stated = _STATED.findall(text)
    return frozenset(stated[-1].upper()) if stated else frozenset()
