"""The verifiers without a server, for small runs and tests; looks like `client.VerifierClient`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.router import TIME_LIMIT, Router


class InProcess:
    """A router of this process, asked from threads."""

    def __init__(self, workers: int = 0, limit: float = TIME_LIMIT) -> None:
        self._router = Router(workers, limit)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="verifiers")

    def submit(self, items: Sequence[Item]) -> Future[list[Verdict]]:
        """Start to judge; the verdicts come in the order of the items."""
        return self._threads.submit(self._router.score, items)

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge and wait."""
        return self.submit(items).result()

    def close(self) -> None:
        """Finish what was begun and end the workers."""
        self._threads.shutdown()
        self._router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
