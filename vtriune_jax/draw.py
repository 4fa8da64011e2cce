"""The prompts of a stage, in order, from wherever a checkpoint left off; and who answers them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from vtriune_jax.ahead import Prompts
from vtriune_jax.assemble import Parts
from vtriune_jax.collect import Respond
from vtriune_jax.data.feed import Feed
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

    Without dynamic sampling or over-sampling a step has one chunk, of its own number.
    """
    mixture = Mixture(parts.train, seed=parts.config.seed + stage.number)

    def prepare(number: int, mixture: Mixture = mixture) -> Chunk:
        def make(sample: Sample) -> Prompt:
            prompt = parts.prompter(sample, number)
            answer = 0 if stage.sampling else len(demonstration(prompt, parts).ids)
            check_fits(prompt, answer, parts.slots)
            return prompt

        before = mixture.state()
        good, bad = source.draw(mixture, stage.prompts, make)
        return Chunk(number, good, bad, before, mixture.state())

    def again(ticket: Ticket) -> tuple[Prompt, Ticket]:
        there = Mixture(parts.train, seed=parts.config.seed + stage.number).restore(ticket["data"])
        chunk, place = divmod(ticket["number"], stage.prompts)
        return prepare(chunk, there).prompts[place], ticket

    served = parts.served if stage.sampling else None
    left = [again(ticket) for ticket in position.get("left", ())]
    if position["data"]:
        mixture.restore(position["data"])
    extra = math.ceil(parts.config.rollout.over_sampling * stage.prompts) if served else 0
    first, begun = divmod(position["taken"], stage.prompts)
    most = (stage.steps - position["done"]) * (stage.refill + 1) + bool(begun)
    most += math.ceil(extra * (parts.config.rollout.ahead + 1) / stage.prompts)
    chunks = source.ahead(prepare, range(first, first + most))
    stream = PromptStream(chunks, stage.prompts, position["taken"], mixture.state())
    return TailStream(stream, extra, served.may_continue, left) if served and extra else stream


def responder(stage: Stage, step: int, prompts: Prompts, parts: Parts) -> Respond:
    """What completes the prompts of a step: all of them, or of more prompts the first ones."""
    if not (isinstance(prompts, TailStream) and parts.served and stage.sampling):
        return partial(respond, stage, step, parts)
    submit = partial(parts.served.submit, stage.sampling)
    return lambda params, drawn, features, before: prompts.answer(submit, drawn)
