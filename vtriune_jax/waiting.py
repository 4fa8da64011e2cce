"""Completions that wait for their step, as arrays: so they travel in a checkpoint.

A run that goes on is given them in place of new ones; what follows from them (texts, verdicts, the
choice of groups) is made again. The prompts are drawn again from their position in the data.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vtriune_jax import hosts
from vtriune_jax.types import Completion, Group, Prompt

FINISHES = ("stop", "length")


def to_arrays(groups: Sequence[Group], first: int = 0) -> dict[str, np.ndarray]:
    """The completions of some groups of equally many, all behind one another; {} of none.

    Of several processes, which call it together, each gives its own groups, and gets those of all
    in the order of their prompts, of which number `first` of the stage is the first.
    """
    own = _arrays([group.completions for group in groups])
    count = hosts.share().count
    if count == 1:
        return own
    everyone = [_unpacked(data) for data in hosts.gather_bytes(_packed(own))]
    rows = [from_arrays(everyone[(first + k) % count], lambda _: "") for k in range(count)]
    return _arrays([each for abreast in zip(*rows, strict=True) for each in abreast])


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as arrays:
        return dict(arrays)


def _arrays(rows: Sequence[Sequence[Completion]]) -> dict[str, np.ndarray]:
    if not rows:
        return {}
    completions = [each for row in rows for each in row]
    shape = len(rows), len(rows[0])
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
    """Like `respond` (see `collect.Respond`), but answers from `waiting` as far as that reaches.

    What waits is of all processes; each takes what belongs to its own prompts.
    """
    count = hosts.share().count

    def answer(params: Any, prompts: Sequence[Prompt], features: Any, drawn: int) -> list[Group]:
        if drawn >= len(waiting):
            return respond(params, prompts, features, drawn)
        ready = waiting[drawn : drawn + count * len(prompts) : count]
        return [Group(*pair) for pair in zip(prompts, ready, strict=True)]

    return answer
