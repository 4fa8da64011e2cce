"""Weighted, seeded, resumable order of samples over several sources.

Which source comes next: the one furthest behind its share, so that weights hold at every moment and
not only on average. Which of its rows: the next of a permutation that is drawn anew, from the seed,
each time the source has been walked through. The state is therefore one integer per source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vtriune_jax.data.sources import Source
from vtriune_jax.errors import UserError
from vtriune_jax.types import Sample


class Mixture:
    """Endless stream over `(source, weight)` pairs; source names must differ."""

    def __init__(self, sources: Sequence[tuple[Source, float]], seed: int):
        if not sources:
            raise UserError("the mixture has no data source; give at least one")
        names = [source.name for source, _ in sources]
        for source, weight in sources:
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"data source {source.name} has weight {weight}; "
                    "weights must be above 0, remove the source to leave it out"
                )
            if names.count(source.name) > 1:
                raise UserError(
                    f"data source {source.name} is listed twice; list it once with a larger weight"
                )
        total = sum(weight for _, weight in sources)
        self._sources = [source for source, _ in sources]
        self._shares = np.array([weight / total for _, weight in sources])
        self._seed = seed
        self._drawn = np.zeros(len(sources), np.int64)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, count: int, mine: slice = slice(None)) -> list[Sample]:
        """The next `count` samples; those of them that are `mine` are read and returned."""
        rows = [self._next() for _ in range(count)]
        return [source[row] for source, row in rows[mine]]

    def substitute(self, *place: int) -> Sample:
        """A sample for one that cannot be used, drawn at random.

        It follows from the seed and the numbers of its place alone, and leaves the order of the
        others as it is: that of a run over several processes, each of which sees its own bad rows.
        """
        rng = np.random.default_rng([self._seed, len(self._sources), *place])
        source = self._sources[rng.choice(len(self._sources), p=self._shares)]
        return source[int(rng.integers(len(source)))]

    def state(self) -> dict[str, int]:
        """How often each source was drawn from, and its size; JSON-able, for `restore`."""
        drawn = {f"drawn/{s.name}": int(n) for s, n in zip(self._sources, self._drawn, strict=True)}
        return drawn | {f"rows/{source.name}": len(source) for source in self._sources}

    def restore(self, state: Mapping[str, int]) -> Mixture:
        """Go on from `state`, exactly; raises `UserError` when it belongs to other sources."""
        now = self.state()
        for key in sorted(now.keys() | state.keys()):
            if key not in now or key not in state:
                raise UserError(
                    f"data source {key.partition('/')[2]} is in "
                    f"{'the checkpoint' if key in state else 'the config'} only; "
                    "resume with the same sources or start in a new workdir"
                )
            if key.startswith("rows/") and now[key] != state[key]:
                raise UserError(
                    f"data source {key.partition('/')[2]} has {now[key]} rows, the checkpoint saw "
                    f"{state[key]}; restore the data or start in a new workdir"
                )
        self._drawn[:] = [state[f"drawn/{source.name}"] for source in self._sources]
        return self

    def _next(self) -> tuple[Source, int]:
        behind = self._shares * (self._drawn.sum() + 1) - self._drawn
        index = int(np.argmax(behind))
        source = self._sources[index]
        epoch, place = divmod(int(self._drawn[index]), len(source))
        self._drawn[index] += 1
        return source, int(self._order(index, epoch)[place])

    def _order(self, index: int, epoch: int) -> np.ndarray:
        if self._orders.get(index, (-1, None))[0] != epoch:
            rng = np.random.default_rng([self._seed, index, epoch])
            self._orders[index] = epoch, rng.permutation(len(self._sources[index]))
        return self._orders[index][1]
