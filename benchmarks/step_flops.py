"""FLOPs of a config's whole GRPO step against the same step as verl makes it; nothing is compiled.

    python benchmarks/step_flops.py [--config=configs/orsta_7b.py] [--config.KEY=VALUE …]

The matrix products of each program are counted as it is lowered, for one device and in one
micro-batch: what remat repeats, and what masked attention computes in vain, is in it. Prompts and
completions fill their slots on both sides, so that no padding counts against either.

ours    the vision tower once per prompt, then updates on the rows that the config chooses
verl    V-Triune's trainer: each completion in a sequence of its own with prompt and image. One
        forward pass for the old log-probs, one for the reference's (its script has a KL penalty;
        the paper has none), forward and backward; the frozen tower runs in all of them. The head on
        the tokens of prompts, which verl computes too, is not counted. Gradient checkpointing is
        on, as in its script.

Passes before the update are counted on our side too, where the config asks for them. Sampling is
not counted on either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax

from vtriune_jax import config as configs
from vtriune_jax import models, sharding
from vtriune_jax.aot import flops
from vtriune_jax.aot.program import Program, abstract_batch, abstract_images, build
from vtriune_jax.data.rows import Rows
from vtriune_jax.main import split_overrides
from vtriune_jax.rl.policy import policy_logps
from vtriune_jax.stages import Stage, plan
from vtriune_jax.types import Batch

CONFIG = str(configs.REPOSITORY / "configs" / "orsta_7b.py")
MESH = sharding.make_mesh(devices=jax.devices()[:1])

Costs = dict[str, float]
"""Part of a step → FLOPs."""


def main(argv: list[str]) -> None:
    keys, others = split_overrides(argv)
    path = CONFIG
    for word in others:
        path = word.removeprefix("--config=")
    ours, verl = compare(path, keys)
    for who, costs in (("ours", ours), ("verl", verl)):
        for name, cost in costs.items():
            print(f"{who}  {name:14} {cost:.3e}")
    updates = ours["updates"] / verl["updates"]
    print(f"ours / verl    updates {updates:.2f}, step {ratio(ours, verl):.2f}")
    without = ratio(ours, verl, but="reference")
    print(f"               step, if neither has a reference {without:.2f}")


def compare(path: str, keys: Sequence[tuple[str, str]]) -> tuple[Costs, Costs]:
    """What our step and verl's are made of, by a config and overrides."""
    whole = [*keys, ("batch.micro_batches", "1")]
    plain = (("batch.layout", "single"), ("model.remat", "full"))
    return of_ours(configs.load(path, whole)), of_verl(configs.load(path, [*whole, *plain]))


def ratio(ours: Costs, verl: Costs, but: str = "") -> float:
    """FLOPs of our step by those of verl's, without one of the parts."""
    own, theirs = (
        sum(cost for name, cost in costs.items() if name != but) for costs in (ours, verl)
    )
    return own / theirs


def of_ours(config: Any) -> Costs:
    """FLOPs of the programs of a step, all its minibatches together."""
    program, stage = stage_of(config)
    batch, found = program.batch, {}
    if batch.features is not None:
        graphdef, _ = models.abstract(program.model)
        vision = abstract_images(config.batch, program.model, stage.prompts)
        found["tower"] = flops.products(models.encode, graphdef, program.state.params, vision)
    if stage.loss.old == "recomputed":
        needed = stage.minibatches - (stage.epochs == 1)  # the first update finds its own
        found["old log-probs"] = forward(program, stage, batch) * needed
    if stage.loss.kl_weight:
        found["reference"] = forward(program, stage, batch) * stage.minibatches
    updates = stage.minibatches * stage.epochs
    return found | {"updates": flops.executed_flops(program) * updates}


def of_verl(config: Any) -> Costs:
    """The same of verl's, `config` being one of single rows."""
    program, stage = stage_of(config)
    keys, count = config.batch, len(program.batch.ids)
    rows = Rows("single", 1, keys.completion_tokens, keys.prompt_tokens + keys.completion_tokens)
    images = abstract_batch(keys, program.model, count, rows, vision_frozen=False).vision
    batch = replace(program.batch, features=None, vision=images)
    before = forward(program, stage, batch) * stage.minibatches
    update = flops.products(program.update, program.state, batch)
    return {
        "old log-probs": before,
        "reference": before,
        "updates": update * stage.minibatches * stage.epochs,
    }


def stage_of(config: Any) -> tuple[Program, Stage]:
    program = build(config, MESH)
    return program, plan(config, program.model.banned_ids)[-1]


def forward(program: Program, stage: Stage, batch: Batch) -> float:
    """FLOPs of the log-probs of a minibatch."""
    graphdef, _ = models.abstract(program.model)

    @jax.jit
    def logps(params: Any, batch: Batch) -> jax.Array:
        return policy_logps(graphdef, params, batch, stage.loss, MESH)[0]

    return flops.products(logps, program.state.params, batch)


if __name__ == "__main__":
    main(sys.argv[1:])
