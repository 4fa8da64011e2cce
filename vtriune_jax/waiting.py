"""Completions that wait for their step, as arrays: so they travel in a checkpoint.

A run that goes on is given them in place of new ones; what follows from them (texts, verdicts, the
choice of groups) is made again. The prompts are drawn again from their position in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vtriune_jax.types import Completion, Group, Prompt

FINISHES = ("stop", "length")


def to_arrays(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """The completions of some groups of equally many, all behind one another; {} of none."""
    if not groups:
        return {}
    completions = [each for group in groups for each in group.completions]
    shape = len(groups), len(groups[0].completions)
    return {
        "ids": np.concatenate([each.ids for each in completions]).astype(np.int32),
        "logps": np.concatenate([each.logps for each in completions]).astype(np.float32),
        "lengths": np.array([len(each.ids) for each in completions], np.int32).reshape(shape),
        "finish": np.array([FINISHES.index(c.finish) for c in completions], np.int32),
    }


def from_arrays(
    arrays: Mapping[str, np.ndarray], decode: Callable[[list[int]], str]
) -> list[tuple[Completion, ...]]:
    """The completions of each group; `decode` makes the text of ids without the stop token."""
    if not arrays:
        return []
    groups, n = arrays["lengths"].shape
    ends = np.cumsum(arrays["lengths"].ravel())[:-1]
    rows = zip(
        np.split(arrays["ids"], ends),
        np.split(arrays["logps"], ends),
        (FINISHES[k] for k in arrays["finish"]),
        strict=True,
    )
    completions = [
        Completion(
            ids=ids,
            logps=logps,
            text=decode((ids[:-1] if finish == "stop" else ids).tolist()),
            finish=finish,
        )
        for ids, logps, finish in rows
    ]
    return [tuple(completions[k * n : (k + 1) * n]) for k in range(groups)]


def first_from(
    waiting: Sequence[tuple[Completion, ...]], respond: Callable[..., list[Group]]
) -> Callable[..., list[Group]]:
    """Like `respond` (see `collect.Respond`), but answers from `waiting` as far as that reaches."""

    def answer(params: Any, prompts: Sequence[Prompt], features: Any, drawn: int) -> list[Group]:
        if drawn >= len(waiting):
            return respond(params, prompts, features, drawn)
        ready = waiting[drawn : drawn + len(prompts)]
        return [Group(*pair) for pair in zip(prompts, ready, strict=True)]

    return answer
