"""Sends every item to the verifier that its row names and makes one verdict of the parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from vtriune_jax.rewards.shaping import combine
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.item import Item, with_defaults
from vtriune_jax.verifiers.pool import Answer, Pool
from vtriune_jax.verifiers.result import checked
from vtriune_jax.verifiers.worker import describe, guarded

TIME_LIMIT = 5.0
"""Seconds that one completion may take in a worker."""


class Router:
    """The verifiers of one process, in a pool of workers.

    `score` may be called from several threads at once. `close` ends the workers.
    """

    def __init__(
        self,
        workers: int = 0,
        limit: float = TIME_LIMIT,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """`workers` = 0 takes one per CPU core; none is started before it is needed. `defaults` are
        parameters of verifiers (`iou_threshold`, say) for rows that do not give them."""
        self.pool = Pool(workers or os.cpu_count() or 1, limit)
        self._defaults = dict(defaults or {})

    def submit(self, items: Sequence[Item]) -> Future[list[Answer]]:
        """Begin to judge; what the future gives is for `collect`."""
        known = known_verifiers()
        calls = [
            (known[item.reward.verifier], task(item, self._defaults))
            for item in items
            if item.reward.verifier in known
        ]
        return self.pool.submit(calls)

    def collect(self, items: Sequence[Item], answers: Sequence[Answer]) -> list[Verdict]:
        """The answers to what was submitted as verdicts, one per item, in order."""
        known, given = known_verifiers(), iter(answers)
        return [
            _verdict(item, next(given))
            if item.reward.verifier in known
            else Verdict(
                "error",
                reason=f"unknown verifier {item.reward.verifier!r}; known are {', '.join(known)}",
            )
            for item in items
        ]

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge and wait: one verdict per item, in order, whatever the completions are."""
        return self.collect(items, self.submit(items).result())

    def close(self) -> None:
        """Finish what is being judged, refuse what waits, end the workers."""
        self.pool.close()


def task(item: Item, defaults: Mapping[str, Any]) -> tuple[str, str, dict[str, Any], float]:
    """The arguments of `verify`: plain Python, so that a worker needs none of our types."""
    reward = item.reward
    params = with_defaults(reward.params, defaults) | {"grid": item.grid}
    if item.threshold is not None:
        params["iou_threshold"] = item.threshold
    return item.completion, reward.ground_truth, params, item.progress


def _verdict(item: Item, answer: Answer) -> Verdict:
    """Parts → score; a reason, an exception or parts that are none → a verdict without a score."""
    if isinstance(answer, TimeoutError):
        return Verdict("timeout", reason=str(answer))
    verdict = guarded(_combined, item, answer) if isinstance(answer, Mapping) else answer
    if isinstance(verdict, Verdict):
        return verdict
    return Verdict("error", reason=verdict if isinstance(verdict, str) else describe(verdict))


def _combined(item: Item, parts: Mapping[str, Any]) -> Verdict:
    numbers = checked(parts)
    ratios = item.reward.accuracy_ratio, item.reward.format_ratio
    if not sum(ratios) > 0 or min(ratios) < 0:
        raise ValueError(
            f"accuracy_ratio={ratios[0]}, format_ratio={ratios[1]}; "
            "expected two numbers ≥ 0 that are not both 0"
        )
    score = combine(numbers["accuracy"], numbers["format"], *ratios)
    return Verdict("ok", float(score), numbers)
