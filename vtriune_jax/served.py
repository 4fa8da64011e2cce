"""A fleet of SGLang servers as a run's engine: it samples, and follows the trainer's weights."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from vtriune_jax import hosts
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.rows import Slots
from vtriune_jax.export import PROCESSOR_FILES
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.probing import choose, completion_logps
from vtriune_jax.rollout.addresses import Addresses
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.probe import Probe
from vtriune_jax.rollout.publish import Publisher
from vtriune_jax.rollout.sglang import Rollout, SGLangEngine
from vtriune_jax.rollout.sync import WeightSync
from vtriune_jax.types import Group, Prompt, Sample

START_SECONDS = 600.0
"""For the first server to be ready: large models take minutes to load."""


class ServedEngine:
    """Samples like `LocalEngine`, but from the weights that were pushed last."""

    def __init__(self, fleet: Fleet, engine: SGLangEngine, sync: WeightSync, carry: int):
        """`carry`: how many versions behind the tokens of a completion may be to be continued."""
        self._fleet, self._engine, self._sync, self._carry = fleet, engine, sync, carry
        self.generate = engine.generate
        self._version: int | None = None

    def push(self, params: Any, version: int) -> dict[str, float]:
        """Gives the servers these parameters, unless they have this version; metrics of that, and
        of the fleet since the last push. All processes call it together."""
        if version == self._version:
            return {}
        record = self._sync.push(params, version)
        self._version = version
        stats = of_all(hosts.gather(self._engine.stats()))
        return record | {f"rollout/{name}": x for name, x in stats.items()}

    def submit(
        self, sampling: Sampling, prompts: Sequence[Prompt], needed: int, begun: Sequence[Group]
    ) -> Future[Rollout]:
        """See `SGLangEngine.submit`."""
        return self._engine.submit(prompts, sampling, needed, begun)

    def may_continue(self, group: Group) -> bool:
        """Whether no token of an interrupted group is too old."""
        versions = {str(v) for each in group.completions for v, _, _ in each.versions}
        return all(self._fleet.lag(version) <= self._carry for version in versions)


@contextlib.contextmanager
def serve(
    config: Any,
    workdir: Path,
    *,
    checkpoint: Path,
    model_config: ModelConfig,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    prompter: Prompter,
    slots: Slots,
    examples: Sequence[Sample],
) -> Iterator[ServedEngine]:
    """Finds the servers of `config.rollout` and prepares the way of the weights to them.

    `checkpoint` is what the servers have started with; the probe looks at `examples`. Raises
    UserError when no server is there in time, or when they cannot be given such weights.
    """
    keys = config.rollout
    folder = Path(keys.weights_folder or workdir / "weights").expanduser()
    longest = slots.prompt_tokens + slots.completion_tokens
    share = hosts.share()
    mark = hosts.from_first(lambda: f"-{uuid.uuid4().hex[:8]}") if share.count > 1 else ""
    with contextlib.ExitStack() as stack:
        with hosts.together():
            publisher = Publisher(
                folder,
                model_config,
                reference=checkpoint,
                frozen=config.grpo.freeze,
                dtype=keys.weights_dtype,
                extras=[path for name in PROCESSOR_FILES if (path := checkpoint / name).exists()],
            )
            probe = None
            if keys.probe_prompts:
                groups = choose(examples, prompter, keys.probe_prompts)
                probe = Probe(
                    groups,
                    completion_logps(graphdef, groups, slots.pad_id, mesh),
                    image_id=model_config.image_token_id,
                    pictures=prompter.pictures,
                    limit=keys.probe_gap,
                )
            fleet = stack.enter_context(
                Fleet(addresses(keys.addresses), tokens_per_completion=longest, share=share)
            )
            engine = SGLangEngine(
                fleet,
                stop_ids=prompter.stop_ids,
                banned_ids=prompter.banned_ids,
                image_id=model_config.image_token_id,
                decode_text=prompter.decode,
                pictures=prompter.pictures,
                deadline=keys.deadline_seconds,
            )
            there = keys.weights_folder_there
            sync = WeightSync(fleet, publisher, server_dir=there, mark=mark, probe=probe)
            fleet.wait_ready(START_SECONDS)
        yield ServedEngine(fleet, engine, sync, keys.carry)


def of_all(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The stats of a fleet, of what each process knows of it: what each has done adds up, and a
    server is ready that is so for all."""
    first, *others = stats
    tokens = sum(each["tokens_per_s"] for each in stats)
    lag = sum(each["version_lag"] * each["tokens_per_s"] for each in stats)
    ready = min(each["servers_ready"] for each in stats)
    quarantines = max(each["quarantines"] for each in stats)
    added = {name: sum((each.get(name, 0.0) for each in others), x) for name, x in first.items()}
    return added | {
        "version_lag": lag / tokens if tokens else 0.0,
        "servers": first["servers"],
        "servers_ready": ready,
        "quarantines": quarantines,
    }


def addresses(given: Sequence[str]) -> Addresses:
    """URLs as they are; a single path is the file that lists them."""
    [first, *others] = given
    return list(given) if others or "://" in first else Path(first).expanduser()
