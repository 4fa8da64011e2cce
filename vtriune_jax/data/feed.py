"""Samples → prompts on threads, ahead of the loop; a bad row stops the run or is skipped.

However many threads there are, the prompts, their order and the position in the data are the same:
they share the work and choose nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from vtriune_jax.data.mixture import Mixture
from vtriune_jax.errors import UserError
from vtriune_jax.types import Prompt, Sample

GIVE_UP = 1000
"""Bad rows in succession after which there seems to be no good one."""

T = TypeVar("T")
Make = Callable[[Sample], Prompt]


@dataclass(frozen=True)
class Skipped:
    """A row that was passed over, and why."""

    data_source: str
    fault: str


@dataclass(frozen=True)
class Feed:
    """Threads that make prompts, one that leads them, and what to do with bad rows."""

    makers: ThreadPoolExecutor
    leader: ThreadPoolExecutor
    on_bad_row: Literal["error", "skip"]

    def ahead(self, prepare: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
        """`prepare(number)` of each number in turn, the next one while the caller uses the last."""
        begun: Future[T] | None = None
        for number in numbers:
            before, begun = begun, self.leader.submit(prepare, number)
            if before:
                yield before.result()
        if begun:
            yield begun.result()

    def prompts(self, samples: Iterable[Sample], make: Make) -> list[Prompt | Skipped]:
        """The prompt of every sample, in order, or what is wrong with it.

        Raises the UserError of the first bad sample if bad ones are not to be skipped.
        """
        begun = [(sample, self.makers.submit(make, sample)) for sample in samples]
        found: list[Prompt | Skipped] = []
        for sample, future in begun:
            try:
                found.append(future.result())
            except UserError as fault:
                if self.on_bad_row == "error":
                    raise
                found.append(Skipped(sample.data_source, str(fault)))
        return found

    def draw(
        self, mixture: Mixture, count: int, make: Make, number: int = 0, mine: slice = slice(None)
    ) -> tuple[list[Prompt], list[Skipped]]:
        """Those of the next `count` prompts that are `mine`, and the bad rows on the way.

        For every bad row another one is drawn, by the `number` of this draw and the row's place in
        it, so that no process need know of the bad rows of another. Raises UserError when that does
        not end (`GIVE_UP`).
        """
        waiting = dict(zip(range(count)[mine], mixture.take(count, mine), strict=True))
        found: dict[int, Prompt] = {}
        skipped: list[Skipped] = []
        barren = attempt = 0
        while waiting:
            made = dict(zip(waiting, self.prompts(waiting.values(), make), strict=True))
            bad = {place: row for place, row in made.items() if isinstance(row, Skipped)}
            skipped += bad.values()
            barren = barren + len(bad) if len(bad) == len(made) else 0
            if barren >= GIVE_UP:
                raise UserError(
                    f"none of {barren} rows in succession can be used, the last one because: "
                    f"{skipped[-1].fault}"
                )
            found |= {p: row for p, row in made.items() if not isinstance(row, Skipped)}
            waiting = {place: mixture.substitute(number, place, attempt) for place in bad}
            attempt += 1
        return [found[place] for place in sorted(found)], skipped


@contextlib.contextmanager
def feed(threads: int, on_bad_row: Literal["error", "skip"]) -> Iterator[Feed]:
    """A feed of so many threads; on exit what they have not begun is dropped."""
    makers = ThreadPoolExecutor(threads, thread_name_prefix="prompt")
    leader = ThreadPoolExecutor(1, thread_name_prefix="prompts")
    try:
        yield Feed(makers, leader, on_bad_row)
    finally:
        for pool in (makers, leader):
            pool.shutdown(cancel_futures=True)


def tell(skipped: list[Skipped], whose: str) -> None:
    """One line about bad rows that were passed over, if there are any."""
    if skipped:
        print(f"{whose}: bad rows skipped: {len(skipped)}, the first: {skipped[0].fault}")


def tell_once(skipped: Iterable[Skipped], whose: str, told: set[str]) -> None:
    """A line about the first bad row of each source that is not in `told` yet, and then is."""
    for row in skipped:
        if row.data_source not in told:
            told.add(row.data_source)
            print(
                f"{whose}: a bad row of {row.data_source} is skipped ({row.fault}); further ones "
                "are only counted: skipped_rows in metrics.jsonl",
                flush=True,
            )
