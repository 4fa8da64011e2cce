"""Metrics per data source, from the sums of the update and from groups with their verdicts.

Everything is a pair (sum, count) until the very end: pairs of several steps or hosts may be added,
and a division happens once. A pair with count 0 leaves its name out, so that no metric is ever a
NaN or a 0 that nobody measured. Names are `<metric>/<data source>`, a `/` in the source becoming
`_`; a name without a source is over all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import jax
import numpy as np
from jax.typing import ArrayLike

from vtriune_jax import hosts
from vtriune_jax.rl.normalise import MAXIMA
from vtriune_jax.types import Completion, Group, Verdict

Sums = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""What the update returns: name → (sum, count), both of shape [] or both [sources]."""

COUNTED = frozenset(
    {
        *("skipped_rows", "skipped_steps", "verifier_timeout", "verifier_error"),
        *("refill_rounds", "dropped_groups", "missing_groups"),
    }
)
"""Metrics reported as a number of events; all others are sum / count."""

CORRECT = 0.5
"""The accuracy from which a completion counts as correct, see `is_correct`."""

REFLECTION_WORDS = (
    "re-check",
    "re-evaluate",
    "re-examine",
    "re-think",
    "recheck",
    "reevaluate",
    "reexamine",
    "reevaluation",
    "rethink",
    "check again",
    "think again",
    "try again",
    "verify",
    "wait",
    "yet",
)
"""V-Triune's fifteen words. It looks for them as substrings, where "wait" also fires in "waiter"
and "yet" in "Yeti": on the picture of a restaurant that is no reflection. We match whole words, so
our ratios are slightly below the published ones."""

_REFLECTION = re.compile(rf"\b(?:{'|'.join(map(re.escape, REFLECTION_WORDS))})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Refill:
    """What dynamic sampling did in a step."""

    rounds: int
    """Of further prompts."""
    dropped: Sequence[str]
    """The data source of each group whose scores were all equal."""
    missing: int
    """Groups that the batch lacks nevertheless."""


@dataclass(frozen=True)
class SourceMean:
    """The mean reward of one data source in an evaluation."""

    reward: float | None
    """None when no completion could be judged: an unknown reward is not a reward of 0."""
    count: int
    """Completions that were judged; the mean is over these."""
    failed: int = 0
    """Completions whose verification failed; they are in neither mean nor count."""


def finish(
    sums: Sums,
    groups: Sequence[Group],
    verdicts: Sequence[Sequence[Verdict]],
    sources: Sequence[str],
    seconds: Mapping[str, float],
    skipped: Sequence[str] = (),
    refill: Refill | None = None,
    told: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> dict[str, float]:
    """One step's metrics as plain floats, over all processes.

    Of several processes each gives its own groups and rows; sums of the update are of all already.

    Args:
      sums: from the update; an array [sources] gives `<name>/<source>` and, added up, `<name>`
        (of MAXIMA, the largest).
      groups: all groups that the step drew; empty for supervised steps.
      verdicts: one per completion, nested as in `groups`.
      sources: the names behind the index of the arrays [sources].
      seconds: stage → wall time, reported as `time/<stage>`.
      skipped: the source of each row that was passed over because it is broken or does not fit.
      refill: of a step with dynamic sampling.
      told: name → (sum, count) of what else there is to say.
    """
    own = _added(
        *((name, *pair) for name, pair in told.items()),
        *_group_pairs(groups, verdicts),
        *_event_pairs("skipped_rows", skipped),
        *(_refill_pairs(refill) if refill else ()),
    )
    everyone = [pair for theirs in hosts.gather(own) for pair in theirs]
    pairs = {name: pair for name, *pair in _added(*_update_pairs(sums, sources), *everyone)}
    metrics = {
        name: total if name.split("/")[0] in COUNTED else total / count
        for name, (total, count) in sorted(pairs.items())
        if count
    }
    return metrics | {f"time/{stage}": float(value) for stage, value in seconds.items()}


def per_source_means(
    groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]
) -> dict[str, SourceMean]:
    """Mean reward per data source (by its own name), as an evaluation reports it.

    Failed verifications are masked and counted, never taken for a reward of 0. Groups are of all
    processes together.
    """
    scores: dict[str, list[float]] = {}
    failed: dict[str, int] = {}
    rows = [
        (group.prompt.sample.data_source, [v.score if v.status == "ok" else None for v in judged])
        for group, judged in zip(groups, verdicts, strict=True)
    ]
    for source, found in (row for theirs in hosts.gather(rows) for row in theirs):
        valid = [score for score in found if score is not None]
        scores.setdefault(source, []).extend(valid)
        failed[source] = failed.get(source, 0) + len(found) - len(valid)
    return {
        source: SourceMean(
            sum(values) / len(values) if values else None, len(values), failed[source]
        )
        for source, values in sorted(scores.items())
    }


def mean_over_sources(means: Mapping[str, SourceMean]) -> float | None:
    """The mean of the sources' means: every source weighs the same, however many rows it has."""
    known = [mean.reward for mean in means.values() if mean.reward is not None]
    return sum(known) / len(known) if known else None


def metric_name(source: str) -> str:
    """A data source as the last part of a metric name."""
    return source.replace("/", "_")


def is_correct(verdict: Verdict) -> bool:
    """Whether a judged completion is called correct: `iou_50`, if reported, else accuracy, ≥ 0.5.

    For a 0/1 verifier this is "accuracy is 1". For boxes "exactly 1" would ask for a pixel-perfect
    set, which practically never happens, and any bound on the accuracy itself would move with the
    dynamic IoU threshold; the IoU collected at the fixed threshold 0.5 does neither.
    """
    return verdict.parts.get("iou_50", verdict.parts.get("accuracy", verdict.score)) >= CORRECT


def reflects(text: str) -> bool:
    """Whether the text contains one of `REFLECTION_WORDS` as a whole word, in any case."""
    return _REFLECTION.search(text) is not None


def _added(*named: tuple[str, float, float]) -> list[tuple[str, float, float]]:
    """One pair for every name."""
    pairs: dict[str, tuple[float, float]] = {}
    for name, total, count in named:
        before = pairs.get(name, (0.0, 0.0))
        pairs[name] = before[0] + total, before[1] + count
    return [(name, *pair) for name, pair in pairs.items()]


def _update_pairs(sums: Sums, sources: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    for name, (total, count) in jax.device_get(dict(sums)).items():
        name = "skipped_steps" if name == "skipped" else name
        over_all = np.max if name in MAXIMA else np.sum
        yield name, float(over_all(total)), float(over_all(count))
        if np.ndim(total):
            for source, part, parts in zip(sources, total, count, strict=True):
                yield f"{name}/{metric_name(source)}", float(part), float(parts)


def _group_pairs(
    groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]
) -> Iterator[tuple[str, float, float]]:
    for group, judged in zip(groups, verdicts, strict=True):
        source = metric_name(group.prompt.sample.data_source)
        scores = [verdict.score for verdict in judged if verdict.status == "ok"]
        if len(scores) > 1:
            yield f"zero_variance/{source}", float(len(set(scores)) == 1), 1.0
        for completion, verdict in zip(group.completions, judged, strict=True):
            for name, value in _completion_values(completion, verdict):
                yield f"{name}/{source}", value, 1.0
            if verdict.status == "ok":
                yield "reward", verdict.score, 1.0


def _event_pairs(name: str, sources: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    for source in sources:
        yield name, 1.0, 1.0
        yield f"{name}/{metric_name(source)}", 1.0, 1.0


def _refill_pairs(refill: Refill) -> Iterator[tuple[str, float, float]]:
    yield from _event_pairs("dropped_groups", refill.dropped)
    if hosts.is_first():  # the others know the same
        yield "refill_rounds", float(refill.rounds), 1.0
        yield "missing_groups", float(refill.missing), 1.0


def _completion_values(completion: Completion, verdict: Verdict) -> Iterator[tuple[str, float]]:
    """The values one completion adds to the means of its source."""
    length, reflecting = float(len(completion.ids)), reflects(completion.text)
    yield "length", length
    yield "truncated", float(completion.finish == "length")
    yield "reflection", float(reflecting)
    yield "verifier_failed", float(verdict.status != "ok")
    yield "verifier_timeout", float(verdict.status == "timeout")
    yield "verifier_error", float(verdict.status == "error")
    if verdict.status != "ok":
        return
    yield "reward", verdict.score
    for part, value in verdict.parts.items():
        yield f"reward_{part}", float(value)
    correct = is_correct(verdict)
    answer = "correct" if correct else "wrong"
    yield "correct", float(correct)
    yield f"length_{answer}", length
    yield f"reflection_in_{answer}", float(reflecting)
    yield f"correct_{'with' if reflecting else 'without'}_reflection", float(correct)
