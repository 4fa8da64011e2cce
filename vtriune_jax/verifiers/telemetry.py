"""Counters of the service in the text format that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

_PREFIX = "vtriune_verifier"
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds, the upper ends of the buckets of the latency's histogram."""


class Telemetry:
    """What has happened so far. Not for several threads."""

    def __init__(self) -> None:
        self.completions: Counter[tuple[str, str]] = Counter()
        """By verifier and status."""
        self.responses: Counter[tuple[str, str]] = Counter()
        """By path and HTTP status."""
        self.cache: Counter[tuple[str]] = Counter()
        """Hits and misses."""
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0

    def took(self, seconds: float) -> None:
        """A request was judged."""
        self._buckets[bisect_left(_BOUNDS, seconds)] += 1
        self._seconds += seconds

    def text(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> str:
        """Everything, with some numbers of the moment (`gauges`) and totals that others count."""
        lines: list[str] = []
        for name, value in gauges.items():
            lines += [f"# TYPE {_PREFIX}_{name} gauge", f"{_PREFIX}_{name} {value:g}"]
        for name, value in counters.items():
            lines += [f"# TYPE {_PREFIX}_{name} counter", f"{_PREFIX}_{name} {value:g}"]
        lines += _labelled("completions_total", ("verifier", "status"), self.completions)
        lines += _labelled("responses_total", ("path", "code"), self.responses)
        lines += _labelled("cache_total", ("result",), self.cache)
        return "\n".join([*lines, *self._histogram(), ""])

    def _histogram(self) -> Iterator[str]:
        name = f"{_PREFIX}_request_seconds"
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self._buckets, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._seconds:.6f}"
        yield f"{name}_count {total}"


def _labelled(name: str, labels: tuple[str, ...], counts: Counter) -> Iterator[str]:
    yield f"# TYPE {_PREFIX}_{name} counter"
    for values, count in sorted(counts.items()):
        # a quotation mark or line break cannot occur: the values are names of ours
        pairs = ",".join(f'{k}="{v}"' for k, v in zip(labels, values, strict=True))
        yield f"{_PREFIX}_{name}{{{pairs}}} {count}"
