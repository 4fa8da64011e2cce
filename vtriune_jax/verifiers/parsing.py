"""What all verifiers read out of a completion: the last answer, and a list of labelled boxes in it.

Completions are hostile: every function here takes linear time and answers, whatever the text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import reduce
from itertools import chain
from json import JSONDecodeError
from operator import iadd
from typing import Any, NamedTuple

from vtriune_jax.verifiers.notation import loads

_OPEN, _CLOSE = "<answer>", "</answer>"
_FENCE = "```"
_LONGEST = 2**18
"""Characters beyond which a text is no list of boxes: far more than a model may write, and little
enough that hostile ones are read in a fraction of a second."""
LARGEST = 1e9
"""Coordinates beyond this are no pixels of any image (and would overflow an area)."""
_NUMBERS = {int, float}
"""bool is none."""

# JSON, or what Python prints. In single quotes an apostrophe ends the string only where a string
# may end, so that 'dog's bowl' is read as meant. Atomic throughout: nothing is tried twice.
# (Of groups, Python's possessive repetition fails before 3.11.5, its atomic groups work.)
_TOKEN = re.compile(
    r"""\s*+(?:
      (?P<double>"(?>(?:[^"\\]++|\\.)*)")
    | '(?P<single>(?>(?:[^'\\]++|\\.|'(?!\s*+(?:[,:}\]]|\Z)))*))'
    | (?P<plain>[\[\]{},:] | -?[0-9][-+.0-9eE]*+ | (?:true|false|null|True|False|None)\b)
    )\s*+""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED = re.compile(r'\\.|"', re.DOTALL)
_JSON_ESCAPES = {r"\'": "'", '"': r"\""}
_JSON_WORDS = {"True": "true", "False": "false", "None": "null"}


class LabelledBox(NamedTuple):
    """One object of an answer, in the units of the text."""

    coords: tuple[float, float, float, float]
    label: str


def last_answer(text: str) -> str | None:
    """What stands in the last complete <answer>…</answer>, stripped; None without one.

    The last, since the reasoning before it may well mention the tag.
    """
    start = text.rfind(_OPEN, 0, max(text.rfind(_CLOSE), 0))
    if start < 0:
        return None
    return text[start + len(_OPEN) : text.index(_CLOSE, start)].strip()


def parse_boxes(text: str) -> list[LabelledBox]:
    """The boxes of a list `[{"bbox_2d": [x1, y1, x2, y2], "label": "…"}, …]`, labels lower-cased.

    JSON and Python quoting, a code fence and one extra pair of brackets are all fine. Of a list
    that was cut off, the complete objects count. Objects without four ordered finite numbers and a
    label are dropped, and so are repetitions of the same coordinates. Empty without such a list.
    """
    return _boxes(parse_list(text))


class Columns(NamedTuple):
    """Labelled boxes, the numbers and the words by themselves."""

    coords: bytes
    """x1, y1, x2, y2 of one box after the other, in float64."""
    labels: list[str]


def columns(boxes: Sequence[LabelledBox]) -> Columns:
    """The same boxes in columns."""
    numbers = list(chain.from_iterable(box.coords for box in boxes))
    return Columns(struct.pack(f"{len(numbers)}d", *numbers), [box.label for box in boxes])


def parse_columns(text: str) -> Columns:
    """What `parse_boxes` finds, faster, except that corners may be out of order or too far away and
    boxes repeated: the caller must see to that, who can do it for many texts at once."""
    entries = parse_list(text)
    if "rue" in text or "alse" in text:  # True and False would be packed as numbers
        return columns(_boxes(entries))
    try:
        coords = [entry["bbox_2d"] for entry in entries]
        labels = [entry["label"].lower() for entry in entries]
        numbers = reduce(iadd, coords, [])
        packed = struct.pack(f"{len(numbers)}d", *numbers)
    except (AttributeError, KeyError, TypeError, OverflowError, struct.error):
        return columns(_boxes(entries))
    regular = set(map(len, coords)) <= {4}
    return Columns(packed, labels) if regular else columns(_boxes(entries))


def parse_list(text: str) -> list[Any]:
    """A list in JSON or Python notation, mended when it was cut off; empty when that fails.

    A code fence around it and one extra pair of brackets are removed.
    """
    return _unnest(_parse_list(unfenced(text.strip())))


def unfenced(text: str) -> str:
    """What a Markdown code fence around the whole text holds, or the text."""
    if not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return text
    inside = text[len(_FENCE) : -len(_FENCE)]
    return inside.lstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()


def _boxes(entries: Sequence[Any]) -> list[LabelledBox]:
    boxes: dict[tuple[float, float, float, float], str] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        try:
            coords, label = entry["bbox_2d"], entry["label"]
        except KeyError:
            entry = {key.lower(): value for key, value in entry.items()}
            coords, label = entry.get("bbox_2d"), entry.get("label")
        if not isinstance(coords, list) or not isinstance(label, str):
            continue
        if len(coords) != 4:
            coords = _unnest(coords)
        if len(coords) != 4 or not _NUMBERS.issuperset(map(type, coords)):
            continue
        x1, y1, x2, y2 = coords
        if -LARGEST <= x1 <= x2 <= LARGEST and -LARGEST <= y1 <= y2 <= LARGEST:  # NaN is not
            boxes.setdefault((x1, y1, x2, y2), label.lower())
    return list(map(LabelledBox, boxes.keys(), boxes.values()))


def _parse_list(text: str) -> list[Any]:
    if len(text) > _LONGEST:
        return []
    attempts = [text]
    if not text.endswith("]"):
        attempts = [text + "]", text + "}]", text.rpartition("},")[0] + "}]"]
    for attempt in attempts:
        try:
            value = _decode(attempt)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list):
            return value
    return []


def _decode(text: str) -> Any:
    """Parse; ValueError or RecursionError where the text is neither notation.

    Texts of one kind of quotes and no escapes, i.e. nearly all, are left to the C parser: where it
    succeeds, a string can have ended only where the tokens would end it.
    """
    if "\\" not in text and ('"' not in text or "'" not in text):
        try:
            return loads(text.replace("'", '"'))
        except JSONDecodeError:
            pass
    return loads(_to_json(text))


def _to_json(text: str) -> str:
    """Python's strings and constants → JSON's; ValueError where neither is legal."""
    out, position = [], 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(f"unexpected character at {position}")
        position = token.end()
        if (single := token["single"]) is not None:
            single = _ESCAPED.sub(lambda m: _JSON_ESCAPES.get(m[0], m[0]), single)
            out.append(f'"{single}"')
        else:
            plain = token["double"] or token["plain"]
            out.append(_JSON_WORDS.get(plain, plain))
    return "".join(out)


def _unnest(value: list[Any]) -> list[Any]:
    """Remove one superfluous pair of brackets."""
    return value[0] if len(value) == 1 and isinstance(value[0], list) else value
