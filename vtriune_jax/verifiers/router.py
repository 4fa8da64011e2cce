"""Sends every item to the verifier that its row names and makes one verdict of the parts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from importlib import import_module
from typing import Any

from vtriune_jax.rewards.shaping import combine
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.pool import Pool
from vtriune_jax.verifiers.worker import describe, guarded

TIME_LIMIT = 5.0
"""Seconds that one completion may take in a worker."""


class Router:
    """The verifiers of one process: those on batches run here, the others in a pool of workers.

    `score` may be called from several threads at once. `close` ends the workers.
    """

    def __init__(self, workers: int = 0, limit: float = TIME_LIMIT) -> None:
        """`workers` = 0 takes one per CPU core; none is started before it is needed."""
        self._pool = Pool(workers or os.cpu_count() or 1, limit)

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in order, whatever the completions are."""
        kinds = known_verifiers()
        answers: list[Any] = []
        batches: dict[str, list[int]] = {}
        for k, item in enumerate(items):
            name = item.reward.verifier
            kind = kinds.get(name)
            if kind == "verify":
                answers.append(self._pool.submit(name, _arguments(item)))
            elif kind == "verify_batch":
                batches.setdefault(name, []).append(k)
                answers.append(None)
            else:
                answers.append(f"unknown verifier {name!r}; known are {', '.join(kinds)}")
        for name, places in batches.items():  # while the workers are busy
            for k, answer in zip(places, _batch(name, [items[k] for k in places]), strict=True):
                answers[k] = answer
        return [_verdict(item, answer) for item, answer in zip(items, answers, strict=True)]

    def close(self) -> None:
        """Finish what is being judged, cancel what waits, end the workers."""
        self._pool.close()


def _arguments(item: Item) -> tuple[str, str, dict[str, Any], float]:
    reward = item.reward
    return item.completion, reward.ground_truth, dict(reward.params), item.progress


def _batch(name: str, items: Sequence[Item]) -> Sequence[Any]:
    module = guarded(import_module, f"vtriune_jax.verifiers.{name}")
    answers = module if isinstance(module, Exception) else guarded(module.verify_batch, items)
    return [answers] * len(items) if isinstance(answers, Exception) else answers


def _verdict(item: Item, answer: Any) -> Verdict:
    """Parts → score; a reason, an exception or parts that are none → a verdict without a score."""
    if isinstance(answer, Future):
        answer = guarded(answer.result)
    if isinstance(answer, TimeoutError):
        return Verdict("timeout", reason=str(answer))
    if isinstance(answer, Mapping):
        answer = guarded(_combined, item, answer)
    if isinstance(answer, Verdict):
        return answer
    return Verdict("error", reason=answer if isinstance(answer, str) else describe(answer))


def _combined(item: Item, parts: Mapping[str, Any]) -> Verdict:
    numbers = {name: float(value) for name, value in parts.items()}
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise ValueError(f"the verifier's {', '.join(wrong)} is not a finite number")
    ratios = item.reward.accuracy_ratio, item.reward.format_ratio
    if not sum(ratios) > 0 or min(ratios) < 0:
        raise ValueError(
            f"accuracy_ratio={ratios[0]}, format_ratio={ratios[1]}; "
            "expected two numbers ≥ 0 that are not both 0"
        )
    score = combine(numbers["accuracy"], numbers["format"], *ratios)
    return Verdict("ok", float(score), numbers)
