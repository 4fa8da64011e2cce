"""Structured answers: JSON of a given schema, with given values.

    format     1 when the answer is JSON and valid under `schema` (a JSON Schema), if there is one
    accuracy   the share of equal leaves: 2·|same| / (|answer's leaves| + |truth's leaves|), a leaf
               being a value with its path; texts are compared without case and outer spacing. Equal
               to the format when the ground truth is empty. 0 for an answer of the wrong format

The answer stands in `<answer>`, possibly in a code fence, or is the whole completion.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vtriune_jax.verifiers.parsing import last_answer, unfenced

_LONGEST = 2**18
_DEEPEST = 100


PARAMETERS = ("schema",)


def check(ground_truth: str, params: Mapping[str, Any]) -> None:
    """What `verify` would raise for every completion."""
    _expected(ground_truth, params)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """Accuracy and format of one completion; ValueError for a truth or schema at fault."""
    schema, truth = _expected(ground_truth, params)
    answer = last_answer(completion)
    text = unfenced((completion if answer is None else answer).strip())
    try:
        value = json.loads(text[:_LONGEST])
        given = Counter(_leaves(value))
        valid = Draft202012Validator(schema).is_valid(value)
    except (ValueError, OverflowError, RecursionError):
        valid, given = False, Counter()
    if not valid or truth is None:
        return {"accuracy": float(valid), "format": float(valid)}
    same = (truth & given).total()
    return {"accuracy": 2 * same / max(truth.total() + given.total(), 1), "format": 1.0}


def _expected(
    ground_truth: str, params: Mapping[str, Any]
) -> tuple[Any, Counter[tuple[Any, ...]] | None]:
    """The schema, and the leaves of the truth if there is one."""
    schema = params.get("schema", {})
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        _check_schema(json.dumps(schema))
        truth = Counter(_leaves(json.loads(ground_truth))) if ground_truth.strip() else None
    except (ValueError, OverflowError, SchemaError, RecursionError) as error:
        raise ValueError(f"ground truth or schema at fault: {error}") from error
    return schema, truth


@lru_cache(256)  # it takes milliseconds, and many rows have the same
def _check_schema(text: str) -> None:
    Draft202012Validator.check_schema(json.loads(text))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value that is no container, and every empty container, with its path."""
    if len(path) > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, str):
        yield (*path, " ".join(value.casefold().split()))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield (*path, float(value))
    else:
        yield (*path, repr(value))
