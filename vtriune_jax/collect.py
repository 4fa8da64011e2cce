"""The completions of one step, judged; with dynamic sampling, until there are enough to learn from.

Dynamic sampling (DAPO, Yu 2025, section 3.2) drops the groups whose scores are all equal, before
length costs reward. Prompts are drawn until the batch is full or `stage.refill` more rounds are
used up. Prompts after the last one that found a place go back to the stream: completions of an
earlier policy never wait for a later step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from vtriune_jax import hosts
from vtriune_jax.assemble import Parts
from vtriune_jax.data import device_rows
from vtriune_jax.data.feed import Skipped
from vtriune_jax.data.stream import PromptStream
from vtriune_jax.exchange import exchanged, shares
from vtriune_jax.metrics import Refill
from vtriune_jax.stages import Stage
from vtriune_jax.steps import Encode, Features, shaped, verify
from vtriune_jax.tail import TailStream
from vtriune_jax.types import Group, Prompt, Verdict

Clock = Callable[[str], AbstractContextManager[None]]
Respond = Callable[[Any, Sequence[Prompt], Features, int], list[Group]]
"""(parameters, prompts, features, place of the first prompt in the step) → completions, as in
`steps.respond`."""


@dataclass(frozen=True)
class Collected:
    """What a step trains on, and all that it drew."""

    groups: list[Group]
    """As many as the stage has prompts, this process's share of them."""
    verdicts: list[list[Verdict]]
    """Of these groups; empty for demonstrations."""
    used: Bool[np.ndarray, " groups"]
    """False for the groups that only fill the batch."""
    features: Features
    """Of these groups' images (of several processes, of all their groups); None where sampling did
    not need them, or groups have come from another process."""
    all_groups: list[Group]
    """Everything that was drawn …"""
    all_verdicts: list[list[Verdict]]
    """… and judged, for the metrics."""
    skipped: list[Skipped]
    refill: Refill | None = None


def collect(
    stage: Stage,
    step: int,
    params: Any,
    first: tuple[list[Prompt], list[Skipped]],
    prompts: PromptStream | TailStream,
    respond: Respond,
    encode: Encode | None,
    parts: Parts,
    clock: Clock,
) -> Collected:
    """Completes and judges prompts, and chooses the groups of the batch.

    `first` are prompts taken already; dynamic sampling may take more. `encode` makes the image
    features, for a sampler in this process. Groups are numbered by the places of their prompts in
    the step, over all processes, and the choice is the same in all of them.
    """
    groups: list[Group] = []
    verdicts: list[list[Verdict]] = []
    features: list[Any] = []
    skipped: list[Skipped] = []
    numbers: list[int] = []
    learnable: list[list[int]] = []
    share = hosts.share()
    for round_ in range(stage.refill + 1):
        if round_:
            with hosts.together():
                first = prompts.take()
        drawn, passed_over = first
        place = round_ * stage.prompts + prompts.place()
        skipped += passed_over
        if encode:
            with clock("encode"):
                features.append(encode(params, drawn))
        with clock("rollout"):
            answered = respond(params, drawn, features[-1] if encode else None, place)
        with clock("verify"):
            judged = verify(stage, step, answered, parts)
        groups += answered
        verdicts += judged
        numbers += [place + share.count * i for i in range(len(answered))]
        if stage.refill:
            good = [n for n, each in zip(numbers, verdicts, strict=True) if differ(each)]
            learnable = hosts.gather(good)
        if sum(map(len, learnable)) >= stage.prompts:
            break
    verdicts = shaped(stage, groups, verdicts)
    if not stage.refill:
        used = np.ones(len(groups), bool)
        kept = features[0] if encode else None
        return Collected(groups, verdicts, used, kept, groups, verdicts, skipped)

    total = (round_ + 1) * stage.prompts
    useful = sorted(number for theirs in learnable for number in theirs)
    chosen = useful[: stage.prompts]
    seen = chosen[-1] + 1 if len(chosen) == stage.prompts else total
    dropped = sorted(set(range(seen)).difference(useful))
    missing = stage.prompts - len(chosen)
    order = spread(chosen + dropped[:missing], stage.minibatches)
    held = dict(zip(numbers, zip(groups, verdicts, strict=True), strict=True))
    if share.count == 1:
        kept = device_rows.take(features, np.array(order)) if encode else None
        batch = [held[number] for number in order]
    else:
        given = shares(order, stage.minibatches, hosts.gather(numbers))
        order, kept = given[share.index], None
        batch = exchanged(given, held, prompts.maker(total))
    prompts.give_back(total - seen)
    return Collected(
        groups=[group for group, _ in batch],
        verdicts=[list(judged) for _, judged in batch],
        used=np.isin(order, chosen),
        features=kept,
        all_groups=groups,
        all_verdicts=verdicts,
        skipped=skipped,
        refill=Refill(
            rounds=round_,
            dropped=[held[n][0].prompt.sample.data_source for n in dropped if n in held],
            missing=missing,
        ),
    )


def differ(verdicts: Sequence[Verdict]) -> bool:
    """Whether the scores of a group are not all equal, failed verifications left aside."""
    return len({verdict.score for verdict in verdicts if verdict.status == "ok"}) > 1


def spread(order: list[int], minibatches: int) -> list[int]:
    """Deals the groups out to the minibatches in turn, so that none is made of filling alone."""
    return [i for k in range(minibatches) for i in order[k::minibatches]]
