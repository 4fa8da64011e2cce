"""The completions of one step, judged; with dynamic sampling, until there are enough to learn from.

Dynamic sampling (DAPO, Yu 2025, section 3.2) drops the groups whose scores are all equal: their
advantages are 0. Prompts are drawn until the batch is full or `stage.refill` more rounds are used
up. Prompts after the last one that found a place go back to the stream: completions of an earlier
policy never wait for a later step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from vtriune_jax.assemble import Parts
from vtriune_jax.data.feed import Skipped
from vtriune_jax.data.stream import PromptStream
from vtriune_jax.metrics import Refill
from vtriune_jax.stages import Stage
from vtriune_jax.steps import Encode, Features, shaped, verify
from vtriune_jax.tail import TailStream
from vtriune_jax.types import Group, Prompt, Verdict

Clock = Callable[[str], AbstractContextManager[None]]
Respond = Callable[[Any, Sequence[Prompt], Features, int], list[Group]]
"""(parameters, prompts, features, prompts drawn before) → completions, as in `steps.respond`."""


@dataclass(frozen=True)
class Collected:
    """What a step trains on, and all that it drew."""

    groups: list[Group]
    """As many as the stage has prompts."""
    verdicts: list[list[Verdict]]
    """Of these groups; empty for demonstrations."""
    used: Bool[np.ndarray, " groups"]
    """False for the groups that only fill the batch."""
    features: Features
    """Of these groups' images; None where sampling did not need them."""
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
    features, for a sampler in this process.
    """
    groups: list[Group] = []
    verdicts: list[list[Verdict]] = []
    features: list[Any] = []
    skipped: list[Skipped] = []
    learnable: list[int] = []
    for round_ in range(stage.refill + 1):
        drawn, passed_over = prompts.take() if round_ else first
        skipped += passed_over
        if encode:
            with clock("encode"):
                features.append(encode(params, drawn))
        with clock("rollout"):
            answered = respond(params, drawn, features[-1] if encode else None, len(groups))
        with clock("verify"):
            judged = verify(stage, step, answered, parts)
        learnable += [len(groups) + i for i, each in enumerate(judged) if differ(each)]
        groups += answered
        verdicts += judged
        if len(learnable) >= stage.prompts:
            break
    verdicts = shaped(stage, groups, verdicts)
    if not stage.refill:
        used = np.ones(len(groups), bool)
        kept = features[0] if encode else None
        return Collected(groups, verdicts, used, kept, groups, verdicts, skipped)

    chosen = learnable[: stage.prompts]
    seen = chosen[-1] + 1 if len(chosen) == stage.prompts else len(groups)
    prompts.give_back(len(groups) - seen)
    dropped = [i for i in range(seen) if i not in set(learnable)]
    missing = stage.prompts - len(chosen)
    order = spread(chosen + dropped[:missing], stage.minibatches)
    return Collected(
        groups=[groups[i] for i in order],
        verdicts=[verdicts[i] for i in order],
        used=np.isin(order, chosen),
        features=jnp.concatenate(features)[np.array(order)] if encode else None,
        all_groups=groups,
        all_verdicts=verdicts,
        skipped=skipped,
        refill=Refill(
            rounds=round_,
            dropped=[groups[i].prompt.sample.data_source for i in dropped],
            missing=missing,
        ),
    )


def differ(verdicts: Sequence[Verdict]) -> bool:
    """Whether the scores of a group are not all equal, failed verifications left aside."""
    return len({verdict.score for verdict in verdicts if verdict.status == "ok"}) > 1


def spread(order: list[int], minibatches: int) -> list[int]:
    """Deals the groups out to the minibatches in turn, so that none is made of filling alone."""
    return [i for k in range(minibatches) for i in order[k::minibatches]]
