"""Config → the stages of a run as plain values: what each trains, on what, for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vtriune_jax import sharding
from vtriune_jax.errors import UserError
from vtriune_jax.models import lora
from vtriune_jax.optim import OptimConfig
from vtriune_jax.rl.advantages import Kind
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rollout.choice import Sampling


@dataclass(frozen=True)
class Stage:
    """One part of a run with an optimizer of its own."""

    name: str
    number: int
    start: int
    """Steps of the run before this stage; metrics count on over stages."""
    steps: int
    prompts: int
    """Prompts of one step."""
    epochs: int
    """How often an update is made of every completion."""
    minibatches: int
    """Updates of one epoch."""
    advantage: Kind
    overlong_cushion: int
    """Tokens before the end of the slot from which length costs reward; 0 is off."""
    refill: int
    """Further rounds of prompts that may replace groups of equal scores; 0 keeps those."""
    freeze: tuple[str, ...]
    optim: OptimConfig
    loss: LossConfig
    sampling: Sampling | None
    """How completions are drawn; None: demonstrations are imitated instead."""

    @property
    def samples(self) -> int:
        """Completions drawn per prompt; 0 when demonstrations are imitated."""
        return self.sampling.n if self.sampling else 0

    def order(self, seed: int, step: int) -> list[int]:
        """The minibatches in the order of the step's updates: all of them, once an epoch."""
        rng = np.random.default_rng([seed, self.number, step])
        return [int(k) for _ in range(self.epochs) for k in rng.permutation(self.minibatches)]


def plan(config: Any, banned_ids: tuple[int, ...]) -> list[Stage]:
    """The stages named in `config.stages`, in order; `banned_ids` are never drawn or trained on.

    Where the model has adapters, all else is frozen.
    """
    stages, start = [], 0
    base = (lora.BASE,) if config.model.lora.rank else ()
    for number, name in enumerate(config.stages):
        keys = config[name]
        build = {"sft": _sft, "grpo": _grpo}[name]
        stages.append(
            Stage(
                name=name,
                number=number,
                start=start,
                steps=keys.steps,
                prompts=keys.prompts,
                freeze=(*keys.freeze, *base),
                optim=OptimConfig(
                    learning_rate=keys.lr,
                    warmup_steps=keys.warmup_steps,
                    b1=keys.betas[0],
                    b2=keys.betas[1],
                    weight_decay=keys.weight_decay,
                    clip_norm=keys.grad_clip,
                    mu_dtype=keys.mu_dtype,
                ),
                **build(keys, config.batch.completion_tokens, banned_ids),
            )
        )
        start += keys.steps
    return stages


def check_rows(config: Any, mesh: Mesh) -> None:
    """UserError unless every step's prompts and rows divide over the devices."""
    shards, pieces = sharding.row_shards(mesh), config.batch.micro_batches
    grpo, processes = config.grpo, jax.process_count()
    rows = grpo.minibatches * shards * pieces  # of which all completions are a multiple
    prompts = math.lcm(shards, processes * grpo.minibatches, rows // math.gcd(rows, grpo.samples))
    wrong = [
        f"{name}.prompts={given} is not a multiple of {unit}, choose {-(-given // unit) * unit}"
        for name, given, unit in (
            ("sft", config.sft.prompts, shards * pieces),
            ("grpo", grpo.prompts, prompts),
        )
        if given % unit and name in config.stages
    ]
    if wrong:
        raise UserError(
            f"{'; '.join(wrong)}, or another mesh (now data×fsdp={shards}, "
            f"batch.micro_batches={pieces}, grpo.minibatches={grpo.minibatches}, "
            f"grpo.samples={grpo.samples}, processes={processes})"
        )


def _sft(keys: Any, completion_tokens: int, banned_ids: tuple[int, ...]) -> dict[str, Any]:
    loss = LossConfig(kind="sft", banned_ids=banned_ids)
    return {
        "epochs": 1,
        "minibatches": 1,
        "advantage": "grpo",
        "overlong_cushion": 0,
        "refill": 0,
        "loss": loss,
        "sampling": None,
    }


def _grpo(keys: Any, completion_tokens: int, banned_ids: tuple[int, ...]) -> dict[str, Any]:
    """With one update per rollout batch the old log-probs are its own, whatever `old` says."""
    return {
        "epochs": keys.epochs,
        "minibatches": keys.minibatches,
        "advantage": keys.advantage,
        "overlong_cushion": keys.overlong_cushion,
        "refill": keys.refill,
        "loss": LossConfig(
            kind=keys.loss,
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            dual_clip=keys.dual_clip,
            normalise=keys.normalise,
            room=completion_tokens,
            old="current" if keys.minibatches * keys.epochs == 1 else keys.old,
            tis_cap=keys.tis_cap,
            kl_weight=keys.kl_weight,
            kl=keys.kl,
            entropy_weight=keys.entropy_weight,
            temperature=keys.temperature,
            banned_ids=banned_ids,
        ),
        "sampling": Sampling(
            max_tokens=completion_tokens,
            n=keys.samples,
            temperature=keys.temperature,
            top_p=keys.top_p,
            top_k=keys.top_k,
        ),
    }
