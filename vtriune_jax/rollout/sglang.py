"""Rollouts by a fleet of SGLang servers: tokens in, tokens out, with log-probs and weight versions.

    with Fleet("servers.txt") as fleet:
        engine = SGLangEngine(fleet, …)
        groups = engine.generate(params, prompts, None, sampling, keys, prompt_tokens)

    rollout = engine.submit(prompts, sampling, needed=96).result()      # of 128: the fastest 96
    ahead = engine.submit(others, sampling, needed=96, begun=rollout.begun)     # the rest goes on

The servers have weights of their own, which `Fleet.post` changes; sampling is random, so that only
log-probs can be compared with those of the in-process engine, `local.LocalEngine`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.errand import Errand, Manner
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.tally import Tally
from vtriune_jax.rollout.wire import WirePrompt, check_sampling, wire_prompt
from vtriune_jax.types import Group, Prompt


@dataclass(frozen=True)
class Rollout:
    """What became of prompts: every one of them is in one of the two, once."""

    groups: tuple[Group, ...]
    """Complete, in the order of the prompts."""
    begun: tuple[Group, ...]
    """The others, to be continued; completions under way have finish "abort", and may be empty."""


class SGLangEngine:
    """Has completions drawn by the servers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        image_id: int,
        decode_text: Callable[[Sequence[int]], str],
        pictures: Callable[[Prompt], Sequence[bytes]],
        deadline: float = 3600.0,
        backoff: float = 0.2,
    ) -> None:
        """`fleet` stays its owner's, who closes it.

        `stop_ids`, `banned_ids` and `decode_text` are as `LocalEngine` has them; `image_id` is the
        placeholder's, `pictures` gives a prompt's images as the trainer sees them
        (`Prompter.pictures`). In seconds: `deadline`, from `submit` to the result whatever
        happens; `backoff`, the pause after a failed request, doubled each time.
        """
        self._fleet, self._image_id, self._pictures = fleet, image_id, pictures
        self._deadline = deadline
        self._manner = Manner(
            tuple(stop_ids), tuple(banned_ids), decode_text, backoff, uuid.uuid4().hex[:8]
        )
        self._tally = Tally()
        self._homes: dict[tuple[str, str], str] = {}
        """Sample → the server that has begun it, of the last rollout that was cut short."""

    def generate(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        features: Any,
        sampling: Sampling,
        keys: Any,
        prompt_tokens: int,
    ) -> list[Group]:
        """Draw `sampling.n` completions of every prompt, as `LocalEngine.generate`.

        `params`, `features` and `keys` are not used: the servers have the weights, encode the
        images and draw the random numbers. Raises UserError when a prompt is longer than
        `prompt_tokens`, and as `submit`'s future.
        """
        for prompt in prompts:
            if len(prompt.ids) > prompt_tokens:
                raise UserError(
                    f"{prompt.sample.place}: the prompt has {len(prompt.ids)} tokens, more "
                    f"than the {prompt_tokens} allowed; raise batch.prompt_tokens or drop the row"
                )
        return list(self.submit(prompts, sampling).result().groups)

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        needed: int | None = None,
        begun: Sequence[Group] = (),
    ) -> Future[Rollout]:
        """Start to complete `prompts`, and to continue groups that are `begun`, which come first.

        The result is there when all are complete, or, with `needed`, so many: these are then the
        groups, and the others are interrupted. May be called from any thread, several times at
        once. The future raises UserError when a prompt cannot be completed, or not all before the
        deadline, naming the servers, what they said and what to do.
        """
        check_sampling(sampling)
        tasks = [(group.prompt, group.completions) for group in begun]
        tasks += [(prompt, ()) for prompt in prompts]
        errands = [
            Errand(
                self._fleet,
                self._manner,
                self._tally,
                prompt,
                sampling,
                completions,
                self._homes.pop(key(prompt), "") if completions else "",
            )
            for prompt, completions in tasks
        ]
        needed = len(errands) if needed is None else min(needed, len(errands))
        return self._fleet.run(self._rollout(errands, needed))

    def stats(self) -> dict[str, float]:
        """Progress, speed, and what went wrong: see `tally.Tally`."""
        return self._tally.snapshot(self._fleet)

    async def _rollout(self, errands: Sequence[Errand], needed: int) -> Rollout:
        complete: list[Errand] = []
        tasks = {
            asyncio.create_task(errand.run(partial(self._wire_prompt, errand.prompt))): errand
            for errand in errands
        }
        self._tally.pending += len(tasks)
        ended: asyncio.Queue[asyncio.Task[None]] = asyncio.Queue()
        for task in tasks:
            task.add_done_callback(ended.put_nowait)
        stopping = False
        try:
            async with asyncio.timeout(self._deadline):
                for _ in range(len(tasks)):
                    task = await ended.get()
                    if not (task.cancelled() and stopping):
                        task.result()
                    if not tasks[task].open:
                        complete.append(tasks[task])
                    if len(complete) >= needed and not stopping:
                        stopping = True
                        for other, errand in tasks.items():
                            if not other.done():
                                errand.stop(other)
        except TimeoutError:
            raise self._too_late([each for each in errands if each.open], len(errands)) from None
        finally:
            self._tally.pending -= len(tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        chosen = set(map(id, complete[:needed]))
        left = [errand for errand in errands if id(errand) not in chosen]
        if left:
            self._homes = {key(errand.prompt): errand.server for errand in left}
        return Rollout(
            groups=tuple(errand.group() for errand in errands if id(errand) in chosen),
            begun=tuple(errand.group() for errand in left),
        )

    async def _wire_prompt(self, prompt: Prompt) -> WirePrompt:
        convert = partial(wire_prompt, prompt, self._image_id, self._pictures)
        return await asyncio.to_thread(convert) if len(prompt.grid_thw) else convert()

    def _too_late(self, left: Sequence[Errand], count: int) -> UserError:
        first = left[0].prompt.sample.place
        said = next((errand.complaint for errand in left if errand.complaint), "")
        said = f" (last failure: {said})" if said else ""
        return UserError(
            f"rollout: {len(left)} of {count} prompts, the first {first}, are not complete after "
            f"{self._deadline:g} s{said}; servers: {self._fleet.describe()}; mend or add servers, "
            "or raise rollout.deadline_seconds"
        )


def key(prompt: Prompt) -> tuple[str, str]:
    """What tells samples apart."""
    return prompt.sample.data_source, prompt.sample.id
