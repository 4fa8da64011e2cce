"""What a verifier is asked, and how questions and verdicts travel as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from vtriune_jax.errors import UserError
from vtriune_jax.types import RewardConfig, Verdict
from vtriune_jax.verifiers.notation import dumps, loads

TOKEN = "VTRIUNE_VERIFIER_TOKEN"
"""The environment variable with the token of server and client."""
_STATUSES = ("ok", "timeout", "error")


@dataclass(frozen=True)
class Item:
    """One completion to judge."""

    completion: str
    reward: RewardConfig
    progress: float = 0.0
    """Training progress in 0…1."""
    grid: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels of each processed image."""
    threshold: float | None = None
    """An IoU threshold that overrides the row's and the dynamic one: evaluations before and after
    training compare only at the same."""


def with_defaults(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, and a default where there is none or it is null: a Parquet file has every field
    in every row."""
    return {**defaults, **{name: value for name, value in params.items() if value is not None}}


def encode_items(items: Sequence[Item]) -> bytes:
    """Items → the body of a request. ASCII, so that even a lone surrogate survives the trip."""
    return json.dumps({"items": [_plain(item) for item in items]}).encode()


def decode_items(body: bytes) -> list[Item]:
    """The body of a request → items; `UserError` says what is malformed."""
    try:
        rows = loads(body)["items"]
        return [_item(row) for row in rows]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(
            f"not a list of items ({type(error).__name__}: {error}); expected "
            '{"items": [{"completion": …, "reward": {"verifier": …, "ground_truth": …}, …}]}'
        ) from error


def encode_verdicts(verdicts: Sequence[Verdict]) -> bytes:
    """Verdicts → the body of an answer."""
    return dumps({"verdicts": verdicts})


def decode_verdicts(body: bytes) -> list[Verdict]:
    """The body of an answer → verdicts; ValueError when it is none, of finite numbers."""
    try:
        return [_verdict(row) for row in loads(body)["verdicts"]]
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"not a list of verdicts ({type(error).__name__}: {error})") from error


def _plain(item: Item) -> dict[str, Any]:
    reward = {**vars(item.reward), "params": dict(item.reward.params)}
    return {**vars(item), "reward": reward}


def _verdict(row: Mapping[str, Any]) -> Verdict:
    verdict = Verdict(**row)
    numbers = (verdict.score, *dict(verdict.parts).values())
    if not (
        verdict.status in _STATUSES
        and isinstance(verdict.reason, str)
        and all(type(number) in (int, float) and isfinite(number) for number in numbers)
    ):
        raise TypeError(f"{str(row)[:100]} is no verdict")
    return verdict


def _item(row: Mapping[str, Any]) -> Item:
    if not isinstance(row, dict) or not isinstance(row["reward"], dict):
        raise TypeError("an item and its reward must be objects")
    grid = tuple((int(height), int(width)) for height, width in row.get("grid", ()))
    item = Item(**{**row, "reward": RewardConfig(**row["reward"]), "grid": grid})
    texts = item.completion, item.reward.ground_truth, item.reward.verifier
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("completion, ground_truth and verifier must be strings")
    if not isinstance(item.reward.params, dict):
        raise TypeError("params must be an object")
    return item
