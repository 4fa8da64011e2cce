"""The prompts of a stage, in order, from wherever a checkpoint left off; and who answers them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from vtriune_jax import hosts
from vtriune_jax.ahead import Prompts
from vtriune_jax.assemble import Parts
from vtriune_jax.collect import Respond
from vtriune_jax.data.feed import Feed, Skipped
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import check_fits
from vtriune_jax.data.stream import Chunk, PromptStream, Ticket
from vtriune_jax.stages import Stage
from vtriune_jax.steps import demonstration, respond
from vtriune_jax.tail import TailStream
from vtriune_jax.types import Prompt, Sample

START: Mapping[str, Any] = {"done": 0, "taken": 0, "data": {}, "seconds": 0.0}
"""Where a stage begins, as a checkpoint says it."""


def prompts_ahead(stage: Stage, position: Mapping[str, Any], parts: Parts, source: Feed) -> Prompts:
    """The prompts of the remaining steps, the next ones prepared while the last ones are used.

    Without dynamic sampling or over-sampling a step has one chunk, of its own number. Of several
    processes each prepares its own share of a chunk.
    """
    share = hosts.share()
    mixture = Mixture(parts.train, seed=parts.config.seed + stage.number)

    def draw(number: int, mixture: Mixture, mine: slice) -> tuple[list[Prompt], list[Skipped]]:
        def make(sample: Sample) -> Prompt:
            prompt = parts.prompter(sample, number)
            answer = 0 if stage.sampling else len(demonstration(prompt, parts).ids)
            check_fits(prompt, answer, parts.slots)
            return prompt

        return source.draw(mixture, stage.prompts, make, number, mine)

    def again(ticket: Ticket) -> Prompt:
        there = Mixture(parts.train, seed=parts.config.seed + stage.number).restore(ticket["data"])
        chunk, place = divmod(ticket["number"], stage.prompts)
        return draw(chunk, there, slice(place, place + 1))[0][0]

    def prepare(number: int) -> Chunk:
        before = mixture.state()
        return Chunk(number, *draw(number, mixture, share.slice), before, mixture.state())

    served = parts.served if stage.sampling else None
    mine = position.get("left", [])[share.slice]
    left = [(again(ticket), ticket) for ticket in mine]
    if position["data"]:
        mixture.restore(position["data"])
    extra = math.ceil(parts.config.rollout.over_sampling * stage.prompts) if served else 0
    extra = -(-extra // share.count) * share.count
    first, begun = divmod(position["taken"], stage.prompts)
    most = (stage.steps - position["done"]) * (stage.refill + 1) + bool(begun)
    most += math.ceil(extra * (parts.config.rollout.ahead + 1) / stage.prompts)
    chunks = source.ahead(prepare, range(first, first + most))
    stream = PromptStream(
        chunks,
        stage.prompts,
        position["taken"],
        mixture.state(),
        index=share.index,
        count=share.count,
        again=again,
    )
    return TailStream(stream, extra, served.may_continue, left) if served and extra else stream


def responder(stage: Stage, step: int, prompts: Prompts, parts: Parts) -> Respond:
    """What completes the prompts of a step: all of them, or of more prompts the first ones.

    What goes wrong with a fleet on one process ends all: here, or, if this is called in a thread,
    where the step is taken (`Ahead.take`).
    """
    answer: Respond = partial(respond, stage, step, parts)
    if not (parts.served and stage.sampling):
        return answer
    if isinstance(prompts, TailStream):
        tail, submit = prompts, partial(parts.served.submit, stage.sampling)
        answer = lambda params, drawn, features, before: tail.answer(submit, drawn)  # noqa: E731
    return answer if parts.config.rollout.ahead else hosts.together()(answer)
