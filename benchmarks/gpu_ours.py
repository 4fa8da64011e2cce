"""Our side of benchmarks/gpu.py, through the doors that a run goes through.

python benchmarks/gpu_ours.py prepare FOLDER SIZE STEPS CASE…   # config.json and batches, for both
python benchmarks/gpu_ours.py run FOLDER SIZE STEPS CASE…
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import numpy as np
from gpu_work import SIZES, Work, say
from update_ours import draw, groups_of, loss_config
from update_work import PRESETS, RATE, arrays

from vtriune_jax import models, sharding
from vtriune_jax.aot import flops
from vtriune_jax.aot.program import Program
from vtriune_jax.aot.topology import GPUS
from vtriune_jax.commands import tell_compilers
from vtriune_jax.data.packing import pack, stack_vision
from vtriune_jax.data.rows import choose, needs
from vtriune_jax.main import cache_folder
from vtriune_jax.models import ModelConfig, weights
from vtriune_jax.models.pretrained import config_text
from vtriune_jax.optim import OptimConfig, make_optimizer, partition
from vtriune_jax.rl.update import init_state, jit_update, make_update
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.types import Batch

WARMUP = 2


def main(what: str, folder: Path, size: str, steps: str, *cases: str) -> None:
    work = SIZES[size]
    if what == "prepare":
        jax.config.update("jax_platforms", "cpu")
        prepare(folder, size, work)
        return
    tell_compilers()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    start = time.perf_counter()
    graphdef, params, config = load(folder, work)
    say("load", seconds=[time.perf_counter() - start])
    if "sample" in cases:
        sample(graphdef, params, config, folder, work, int(steps))
    mesh = sharding.make_mesh()
    tx = make_optimizer(OptimConfig(learning_rate=RATE, weight_decay=0.0))
    state = init_state(params, tx, mesh, work.freeze, donate=True)
    for case in ("separate", "shared"):
        if case in cases:
            run = Updates(graphdef, tx, mesh, config, folder, case, work, state)
            state = run.measure(state, int(steps))


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


def load(folder: Path, work: Work) -> tuple[Any, Any, ModelConfig]:
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # CPUs only try it
    model = models.load_pretrained(folder, dtype=dtype, remat=work.remat)
    graphdef, params = models.split(model)
    return graphdef, jax.block_until_ready(params), model.config


class Updates:
    """GRPO updates of one case; a frozen tower encodes the images in every step."""

    def __init__(
        self,
        graphdef: Any,
        tx: Any,
        mesh: Any,
        config: ModelConfig,
        folder: Path,
        case: str,
        work: Work,
        state: Any,
    ):
        self._case, self._graphdef = case, graphdef
        data = arrays(folder, case)
        groups, slots = groups_of(data, config)
        gains = data["advantages"]
        parts = work.micro_batches if case == "separate" else 1
        asked = needs(groups, slots, 1, parts)
        count = len(groups), len(groups[0].completions), parts
        rows = choose("auto", asked, slots, *count, config, vision_trained=not work.freeze)
        features = None
        if work.freeze:
            vision = stack_vision([group.prompt for group in groups], slots)
            self._vision = jax.device_put(vision)
            features = self._encode(state.params)
        batch = pack(
            *(groups, gains, np.ones_like(gains), {"bench": 0}, slots, features, rows), unit=parts
        )
        self._batch: Batch = jax.device_put(batch)  # as torch's
        how = dict(num_sources=1, freeze=work.freeze, micro_batches=parts)
        made = (graphdef, tx, loss_config(), mesh, state)
        self._update = make_update(*made, **how)
        trained = frozenset(weights.flatten(partition(state.params, work.freeze)[0]))
        program = partial(Program, jit_update(*made, **how), model=config, trained=trained)
        shapes = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        abstract = shapes(state), shapes(self._batch)
        self._flops = flops.model_flops(program(*abstract))
        # A sequence for each completion, with its prompt and image.
        each = choose("single", asked, slots, *count, config, vision_trained=not work.freeze)
        whole = pack(groups, gains, np.ones_like(gains), {"bench": 0}, slots, features, each)
        self._torch_flops = flops.model_flops(program(abstract[0], shapes(whole)))

    def measure(self, state: Any, steps: int) -> Any:
        seconds, first = [], {}
        for _ in range(WARMUP + steps):
            start = time.perf_counter()
            batch = self._batch
            if batch.features is not None:
                batch = replace(batch, features=self._encode(state.params)[:, None])
            state, sums = self._update(state, batch)
            sums = jax.device_get(sums)
            seconds.append(time.perf_counter() - start)
            loss, tokens = (float(x.sum()) for x in sums["loss"])
            first = first or {"loss": loss / tokens, "grad_norm": float(sums["grad_norm"][0])}
        say(
            self._case,
            **dict(seconds=seconds[WARMUP:], first_s=seconds[0], **first, **told()),
            flops=self._flops,
            torch_flops=self._torch_flops,
        )
        return state

    def _encode(self, params: Any) -> Any:
        return models.encode(self._graphdef, params, self._vision)


def sample(
    graphdef: Any, params: Any, config: ModelConfig, folder: Path, work: Work, steps: int
) -> None:
    """`new_tokens` for each prompt, images encoded within the measured time."""
    groups, slots = groups_of(arrays(folder, "separate"), config)
    prompts = [group.prompt for group in groups[: work.prompts]]
    engine = LocalEngine(graphdef, stop_ids=(), banned_ids=(), pad_id=0, decode_text=lambda ids: "")
    sampling = Sampling(max_tokens=work.new_tokens, n=1)
    vision = jax.device_put(stack_vision(prompts, slots))
    seconds = []
    for number in range(1 + max(1, steps // 2)):
        start = time.perf_counter()
        keys = jax.random.split(jax.random.key(number), len(prompts))
        features = models.encode(graphdef, params, vision)
        engine.generate(params, prompts, features, sampling, keys, slots.prompt_tokens)
        seconds.append(time.perf_counter() - start)
    say("sample", seconds=seconds[1:], first_s=seconds[0], flops=0, torch_flops=0, **told())


def told() -> dict[str, float]:
    """The most memory that the device has held, and its peak of FLOP/s in bfloat16."""
    device = jax.devices()[0]
    peaks = [chip.flops for name, chip in GPUS.items() if name in device.device_kind]
    memory = device.memory_stats() or {"peak_bytes_in_use": 0}
    return {
        "device": device.device_kind,
        "peak_gb": memory["peak_bytes_in_use"] / 1e9,
        "peak_flops": (peaks or [1e12])[0],
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
