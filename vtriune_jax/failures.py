"""Completions that could not be judged: why, said while it can still be mended.

    verifier error in cells, row c1: ValueError: the ground truth holds no box: 'two' … (masked, …)

How many there are tell the metrics; here are the reasons, one of each kind for each data source.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vtriune_jax import hosts
from vtriune_jax.errors import UserError
from vtriune_jax.types import Group, Sample, Verdict
from vtriune_jax.verifiers.client import UNANSWERED

MOST = 20
"""Lines in a run."""
_LONGEST = 300
_VARIES = re.compile(r"[0-9'\"(\[{].*", re.DOTALL)
"""From the first number or quotation on, reasons of one kind differ."""


class Failures:
    """The reasons that a run has told already."""

    def __init__(self) -> None:
        self._told: set[tuple[str, ...]] = set()

    def tell(
        self,
        groups: Sequence[Group],
        verdicts: Sequence[Sequence[Verdict]],
        what: str,
        *,
        first: bool = False,
    ) -> None:
        """The first process prints the reasons that are new; all call it together, in the main
        thread, each with its own groups.

        Raises:
          UserError: these are the `first` of a run, `what`, and none of them could be judged for
            want of something to compare with or because of the verifier. Where time or servers were
            wanting the run goes on.
        """
        count = faults = 0
        new: dict[tuple[str, ...], str] = {}
        reason = ""
        for group, judged in zip(groups, verdicts, strict=True):
            count += len(judged)
            for verdict in judged:
                if verdict.status == "ok":
                    continue
                line, kind = _line(group.prompt.sample, verdict)
                reason = reason or line
                faults += verdict.status == "error" and not verdict.reason.startswith(UNANSWERED)
                if kind not in self._told and len(self._told) + len(new) < MOST:
                    new.setdefault(kind, line)
        everyone = hosts.gather([count, faults, reason, list(new.items())])
        for kind, line in (pair for *_, theirs in everyone for pair in theirs):
            if tuple(kind) not in self._told and len(self._told) < MOST:
                self._told.add(tuple(kind))
                if hosts.is_first():
                    print(f"{line} (masked, counted as failed)", flush=True)
        counts, faulty, reasons, _ = zip(*everyone, strict=True)
        if first and sum(counts) == sum(faulty) > 0:
            raise UserError(
                f"none of {sum(counts)} {what} completions could be judged, the first because: "
                f"{next(filter(None, reasons))}; correct reward_model of the rows, or the verifier"
            )


def _line(sample: Sample, verdict: Verdict) -> tuple[str, tuple[str, ...]]:
    """The line that tells of a failure, and its kind."""
    reason = " ".join(verdict.reason.split())
    kind = (sample.data_source, verdict.status, _VARIES.sub("", reason))
    reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}…"
    return (
        f"verifier {verdict.status} in {sample.data_source}, row {sample.id}: {reason}",
        kind,
    )
