"""Config → the stages of a run as plain values: what each trains, on what, for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtriune_jax.models import lora
from vtriune_jax.optim import OptimConfig
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
    minibatches: int
    freeze: tuple[str, ...]
    optim: OptimConfig
    loss: LossConfig
    sampling: Sampling | None
    """How completions are drawn; None: demonstrations are imitated instead."""

    @property
    def samples(self) -> int:
        """Completions drawn per prompt; 0 when demonstrations are imitated."""
        return self.sampling.n if self.sampling else 0


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
                ),
                **build(keys, config.batch.completion_tokens, banned_ids),
            )
        )
        start += keys.steps
    return stages


def _sft(keys: Any, completion_tokens: int, banned_ids: tuple[int, ...]) -> dict[str, Any]:
    loss = LossConfig(kind="sft", banned_ids=banned_ids)
    return {"minibatches": 1, "loss": loss, "sampling": None}


def _grpo(keys: Any, completion_tokens: int, banned_ids: tuple[int, ...]) -> dict[str, Any]:
    """With one update per rollout batch the old log-probs are its own, else the sampler's."""
    return {
        "minibatches": keys.minibatches,
        "loss": LossConfig(
            kind="grpo",
            clip_low=keys.clip_low,
            clip_high=keys.clip_high,
            old="current" if keys.minibatches == 1 else "rollout",
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
