"""Short answers: where a completion states its own, and what texts and numbers have in common.

Completions are hostile: every function here takes linear time and answers, whatever the text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vtriune_jax.verifiers.parsing import last_answer

LONGEST = 2**14
"""Characters beyond which a text is no short answer."""

_BOX = r"\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
_NUMBER = re.compile(
    r"[-+−]?(?:[0-9]{1,3}(?>(?:,[0-9]{3})+)(?:\.[0-9]++)?|[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)"
    r"(?:[eE][-+]?[0-9]{1,3})?"
)
_DECORATION = re.compile(r"[\s$€£¥]")
_EDGES = " \t\r\n.,;:!?\"'`“”‘’()[]{}*_"

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
)
NUMBER_WORDS = {word: number for number, word in enumerate(_WORDS.split())}


def final_answer(completion: str) -> str | None:
    r"""What stands in the last <answer>…</answer>, and there or else anywhere in the last \boxed{}.

    None without either, or when it is longer than any short answer.
    """
    tagged = last_answer(completion)
    answer = _last_box(completion if tagged is None else tagged)
    answer = tagged if answer is None else answer
    if answer is None or len(answer) > LONGEST:
        return None
    return _TEXT.sub(r"\1", answer).strip()


def judging_itself(verify: Callable[..., Any]) -> Callable[[str, Mapping[str, Any]], None]:
    """A `check` that raises what `verify` does for every completion: the truth is the answer."""

    def check(ground_truth: str, params: Mapping[str, Any]) -> None:
        verify(f"<answer>{ground_truth}</answer>", ground_truth, params, 1.0)

    return check


def true_answers(ground_truth: str, params: Mapping[str, Any]) -> list[str]:
    """The answer of the row, as plain text or marked like a completion's, and `accepted` others.

    ValueError when there is none.
    """
    first = final_answer(ground_truth)
    answers = [ground_truth.strip() if first is None else first, *params.get("accepted", ())]
    if not answers[0] or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"ground truth {answers!r}; expected texts that are not empty")
    return answers


def normalized(text: str) -> str:
    """Without differences of case, width, spacing and of punctuation around it."""
    text = unicodedata.normalize("NFKC", text[:LONGEST]).casefold()
    return " ".join(text.split()).strip(_EDGES)


def number(text: str) -> float | None:
    """The text as one number, or None: `-1,234.5`, `$3`, `12 %` (0.12), `1e3`, `seven`."""
    text = _DECORATION.sub("", text[:LONGEST]).rstrip(".")
    percent = text.endswith(("%", r"\%"))
    text = text.rstrip("%\\") if percent else text
    if text.casefold() in NUMBER_WORDS:
        value = float(NUMBER_WORDS[text.casefold()])
    elif _NUMBER.fullmatch(text):
        value = float(text.replace(",", "").replace("−", "-"))
    else:
        return None
    return (value / 100 if percent else value) if math.isfinite(value) else None


def numbers_in(text: str) -> list[float]:
    """All numbers in a text, in digits or words, in order."""
    words = "|".join(NUMBER_WORDS)
    found = re.finditer(rf"{_NUMBER.pattern}|\b(?:{words})\b", text[:LONGEST], re.IGNORECASE)
    return [value for match in found if (value := number(match[0])) is not None]


def tolerance(params: Mapping[str, Any], default: float) -> float:
    """The row's `tolerance`; ValueError unless it is a number ≥ 0."""
    value = params.get("tolerance", default)
    if not (isinstance(value, int | float) and value >= 0):
        raise ValueError(f"tolerance={value!r}, expected a number ≥ 0")
    return value


def parts(answer: str | None, accuracy: float) -> dict[str, float]:
    """Parts of a reward whose format is that the completion marks an answer at all."""
    return {"accuracy": float(accuracy), "format": float(answer is not None)}


def best(answer: str | None, truths: Sequence[str], similarity: Any) -> dict[str, float]:
    """`parts` with the largest similarity of the answer to any of the truths."""
    if answer is None:
        return parts(None, 0.0)
    return parts(answer, max(similarity(answer, truth) for truth in truths))


def _last_box(text: str) -> str | None:
    r"""Content of the last \boxed{…} if its braces balance before it is too long for an answer."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start + len(_BOX), start + len(_BOX) + LONGEST + 1):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return text[start + len(_BOX) : brace.start()]
    return None
