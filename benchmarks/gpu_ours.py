"""Our side of benchmarks/gpu.py, through the doors that a run goes through.

python benchmarks/gpu_ours.py prepare FOLDER SIZE STEPS CASE…   # config.json and batches, for both
python benchmarks/gpu_ours.py run FOLDER SIZE STEPS CASE…
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import numpy as np
from gpu_work import SIZES, Work, measured
from ours import lay_out
from update_ours import draw, groups_of, loss_config
from update_work import PRESETS, RATE, arrays, say

from vtriune_jax import models, sharding
from vtriune_jax.aot import flops, topology
from vtriune_jax.aot.program import Program
from vtriune_jax.commands import keep_programs, tell_compilers
from vtriune_jax.data.packing import pack, stack_vision
from vtriune_jax.models import ModelConfig, weights
from vtriune_jax.models.pretrained import config_text
from vtriune_jax.optim import OptimConfig, make_optimizer, partition
from vtriune_jax.rl.update import init_state, jit_update, make_update
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine


def main(what: str, folder: Path, size: str, steps: str, *words: str) -> None:
    """`words` are cases, and "unroll" for layers that are compiled one by one."""
    work = SIZES[size]
    if what == "prepare":
        jax.config.update("jax_platforms", "cpu")
        prepare(folder, size, work)
        return
    tell_compilers()
    keep_programs()
    start = time.perf_counter()
    graphdef, params, config = load(folder, work, "unroll" in words)
    say(case="load", seconds=[time.perf_counter() - start])
    if "sample" in words:
        sample(graphdef, params, config, folder, work, int(steps))
    mesh = sharding.make_mesh()
    tx = make_optimizer(OptimConfig(learning_rate=RATE, weight_decay=0.0))
    state = init_state(params, tx, mesh, work.freeze, donate=True)
    for case in ("separate", "shared"):
        if case in words:
            given = graphdef, tx, mesh, config, folder, case, work, int(steps)
            state = update(state, *given)


def prepare(folder: Path, size: str, work: Work) -> None:
    config = config_of(size)
    folder.joinpath("config.json").write_text(config_text(config, "bfloat16"))
    for case in ("separate", "shared"):
        sizes = work.prompt, work.completion, work.pixels
        np.savez(folder / f"{case}.npz", **draw(config, *work.groups(case), sizes))


def config_of(size: str) -> ModelConfig:
    if size != "tiny":
        return models.named(size)
    given = SimpleNamespace(**PRESETS["nano"])
    config = models.named("3B")
    vision = replace(
        config.vision,
        **dict(depth=given.vision_depth, embed=given.vision_hidden, out=given.hidden),
        **dict(mlp=given.vision_intermediate, heads=given.vision_heads),
        full_attention=given.full_attention_layers,
    )
    text = replace(
        config.text,
        **dict(embed=given.hidden, mlp=given.intermediate, layers=given.layers),
        **dict(heads=given.heads, kv_heads=given.kv_heads, mrope_section=given.mrope_section),
    )
    return replace(config, vision=vision, text=text)


def load(folder: Path, work: Work, unroll: bool) -> tuple[Any, Any, ModelConfig]:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # CPUs only try it
    model = models.load_pretrained(folder, dtype=dtype, remat=work.remat, unroll=unroll)
    graphdef, params = models.split(model)
    return graphdef, jax.block_until_ready(params), model.config


def update(
    state: Any,
    graphdef: Any,
    tx: Any,
    mesh: Any,
    config: ModelConfig,
    folder: Path,
    case: str,
    work: Work,
    steps: int,
) -> Any:
    """GRPO updates of one case, and the state behind them.

    A frozen tower encodes the images in every step.
    """
    data = arrays(folder, case)
    groups, slots = groups_of(data, config)
    gains, ones = data["advantages"], np.ones_like(data["advantages"])
    parts = work.micro_batches if case == "separate" else 1
    vision = jax.device_put(stack_vision([group.prompt for group in groups], slots))

    def encode() -> Any:
        return models.encode(graphdef, state.params, vision) if work.freeze else None

    features = encode()
    # There before the step, as torch's.
    batch = jax.device_put(lay_out(groups, gains, ones, slots, config, parts, features))
    given = graphdef, tx, loss_config(), mesh, state
    how: dict[str, Any] = dict(num_sources=1, freeze=work.freeze, micro_batches=parts)
    trained = frozenset(weights.flatten(partition(state.params, work.freeze)[0]))
    program = Program(jit_update(*given, **how), state, batch, config, trained, held=0)
    apart = pack(groups, gains, ones, {"bench": 0}, slots, features)  # a row for each completion
    counted = {
        "flops": flops.model_flops(program),
        "torch_flops": flops.model_flops(replace(program, batch=apart)),
    }
    run = make_update(*given, **how)

    def step() -> dict[str, float]:
        nonlocal state
        own = replace(batch, features=encode()[:, None]) if work.freeze else batch
        state, sums = run(state, own)
        sums = jax.device_get(sums)
        loss, tokens = (float(x.sum()) for x in sums["loss"])
        return {"loss": loss / tokens, "grad_norm": float(sums["grad_norm"][0])}

    say(case=case, **measured(step, steps), **counted, **device())
    return state


def sample(
    graphdef: Any, params: Any, config: ModelConfig, folder: Path, work: Work, steps: int
) -> None:
    """`new_tokens` for each prompt, images encoded within the measured time."""
    groups, slots = groups_of(arrays(folder, "separate"), config)
    prompts = [group.prompt for group in groups[: work.prompts]]
    engine = LocalEngine(graphdef, stop_ids=(), banned_ids=(), pad_id=0, decode_text=lambda ids: "")
    sampling = Sampling(max_tokens=work.new_tokens, n=1)
    vision = jax.device_put(stack_vision(prompts, slots))
    seeds = count()

    def step() -> dict[str, float]:
        keys = jax.random.split(jax.random.key(next(seeds)), len(prompts))
        features = models.encode(graphdef, params, vision)
        engine.generate(params, prompts, features, sampling, keys, slots.prompt_tokens)
        return {}

    say(case="sample", **measured(step, max(1, steps // 2), warmup=1), **device())


def device() -> dict[str, Any]:
    """What it is, its peak of FLOP/s in bfloat16, and the most memory that it has held."""
    here = topology.get("local")
    memory = here.devices[0].memory_stats() or {"peak_bytes_in_use": 0}
    return {
        "device": here.devices[0].device_kind,
        "peak_flops": here.chip.flops,
        "peak_gb": memory["peak_bytes_in_use"] / 1e9,
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
