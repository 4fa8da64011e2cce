"""Our side of benchmarks/update.py, through the doors that a run goes through.

python benchmarks/update_ours.py prepare FOLDER PRESET      # checkpoint and batches, for both
python benchmarks/update_ours.py separate|shared FOLDER     # updates
python benchmarks/update_ours.py step FOLDER                # whole GRPO steps
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import numpy as np
from ours import lay_out
from sampler import engine_of
from update_work import (
    CASES,
    CLIP,
    COMPLETION,
    PIXELS,
    PRESETS,
    PROMPT,
    QUESTION,
    RATE,
    STEP,
    arrays,
    drawn,
    reward,
    serve,
)

from vtriune_jax import models, sharding
from vtriune_jax.commands import keep_programs, return_memory, tell_compilers
from vtriune_jax.data import digits
from vtriune_jax.data.packing import stack_vision
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.rows import Slots
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.models import layout
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.tiny import tiny_config
from vtriune_jax.types import Batch, Completion, Group, Message, Prompt, RewardConfig, Sample

NO_REWARD = RewardConfig("mathverify", "")


def main(what: str, folder: Path, *preset: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    tell_compilers()
    keep_programs()
    return_memory()
    if what == "prepare":
        prepare(folder, *preset)
    elif what == "step":
        serve(whole_step(folder))
    else:
        serve(update_of(folder, what))


# --------------------------------------------------------------------------------- what is shared


def prepare(folder: Path, preset: str) -> None:
    """A checkpoint of random weights with its processor, and a batch for each case."""
    sizes = SimpleNamespace(**PRESETS[preset])
    write_processor(folder, digits.texts(), vocab_size=sizes.vocab_size)
    written = tiny_config(sizes, load_processor(folder).tokenizer)
    written["text_config"]["vocab_size"] = sizes.vocab_size  # wider than the tokenizer, as Qwen's
    model = models.init(ModelConfig.from_hf(written), seed=0)
    models.save_pretrained(model, folder)
    graphdef, params = models.split(model)
    for case, (groups, n) in CASES.items():
        data = draw(model.config, groups, n)
        batch = batch_of(data, model.config, micro_batches=1)
        logps = make_logps(graphdef, loss_config(), sharding.make_mesh())(params, batch)
        noise = 0.1 * np.random.default_rng(1).standard_normal(data["old_logps"].shape)
        data["old_logps"] = (np.asarray(logps).reshape(noise.shape) + noise).astype(np.float32)
        np.savez(folder / f"{case}.npz", **data)


def draw(
    config: ModelConfig,
    groups: int,
    n: int,
    sizes: tuple[int, int, int] = (PROMPT, COMPLETION, PIXELS),
) -> dict[str, np.ndarray]:
    """Random tokens with an image in each prompt, random patches, normalised advantages."""
    rng, vision = np.random.default_rng(0), config.vision
    length, completion, pixels = sizes
    side = pixels // vision.patch_size
    units = side**2 // vision.unit_patches
    text = min(config.banned_ids) - 32  # below all special tokens
    before, after = 16, length - 16 - units
    prompt = np.concatenate(
        [
            rng.integers(0, text, (groups, before)),
            np.full((groups, units), config.image_token_id),
            rng.integers(0, text, (groups, after)),
        ],
        axis=1,
    )
    prompt[:, before - 1], prompt[:, before + units] = config.banned_ids[2:]
    gains = rng.standard_normal(groups * n)
    gains = (gains - gains.mean()) / gains.std()
    return {
        "prompt_ids": prompt,
        "completion_ids": rng.integers(0, text, (groups, n, completion)),
        "pixel_values": rng.standard_normal((groups, side**2, vision.patch), np.float32),
        "image_grid_thw": np.tile([1, side, side], (groups, 1)),
        "advantages": gains.reshape(groups, n).astype(np.float32),
        "old_logps": np.zeros((groups, n, completion), np.float32),
    }


# ------------------------------------------------------------------------------------- the steps


def update_of(folder: Path, case: str) -> Any:
    """A step of `serve`: one update, both towers trained."""
    # The best on CPUs: small pieces for their caches.
    micro_batches = 4 if CASES[case][1] == 1 else 1
    graphdef, params, config = load(folder)
    batch = batch_of(arrays(folder, case), config, micro_batches)
    state, update = training(graphdef, params, micro_batches)
    del params

    def step() -> dict[str, float]:
        nonlocal state
        state, sums = update(state, batch)
        sums = jax.device_get(sums)
        loss, tokens = (float(x.sum()) for x in sums["loss"])
        return {"loss": loss / tokens, "grad_norm": float(sums["grad_norm"][0])}

    return step


def whole_step(folder: Path) -> Any:
    """A step of `serve`: sample, reward, update."""
    graphdef, params, config = load(folder)
    prompter = Prompter(load_processor(folder), config, cot=False)
    rows = list(islice(drawn(seed=0), 64))

    def prompt(number: int) -> Prompt:
        message = Message("user", f"<image>{QUESTION}")
        return prompter(Sample("bench", str(number), (rows[number][0],), (message,), NO_REWARD))

    first = prompt(0)  # all are of one size
    windows = len(first.vision.segments)
    slots = Slots(len(first.ids), STEP["completion"], windows, prompter.pad_id)
    engine = engine_of(graphdef, prompter)
    sampling = Sampling(max_tokens=STEP["completion"], n=STEP["samples"])
    state, update = training(graphdef, params, micro_batches=1, old="current")
    del params
    number = 0

    def step() -> dict[str, float]:
        nonlocal state, number
        clock = [time.perf_counter()]
        own = [prompt((STEP["prompts"] * number + k) % len(rows)) for k in range(STEP["prompts"])]
        keys = jax.random.split(jax.random.key(number), len(own))
        features = models.encode(graphdef, state.params, stack_vision(own, slots))
        groups = engine.generate(state.params, own, features, sampling, keys, slots.prompt_tokens)
        clock.append(time.perf_counter())
        scores = np.array(
            [
                [reward(c.text, rows[int(g.prompt.sample.id)][1]) for c in g.completions]
                for g in groups
            ]
        )
        values, weights, _ = group_advantages(scores, np.ones_like(scores, bool))
        batch = lay_out(groups, values, weights, slots, config, unit=1)
        state, sums = update(state, batch)
        jax.device_get(sums)
        clock.append(time.perf_counter())
        number += 1
        tokens = sum(len(c.ids) for g in groups for c in g.completions)
        return {
            "tokens": float(tokens),
            "reward": float(scores.mean()),
            "sampling": clock[1] - clock[0],
            "update": clock[2] - clock[1],
        }

    return step


# ------------------------------------------------------------------------------------- the parts


def load(folder: Path) -> tuple[Any, Any, ModelConfig]:
    model = models.load_pretrained(folder, remat="none", unroll=True)  # the best on CPUs
    return *models.split(model), model.config


def loss_config() -> LossConfig:
    return LossConfig(clip_low=CLIP, clip_high=CLIP, old="rollout")


def training(
    graphdef: Any, params: Any, micro_batches: int, old: Any = "rollout"
) -> tuple[Any, Any]:
    """A state and an update of all parameters."""
    mesh = sharding.make_mesh()
    tx = make_optimizer(OptimConfig(learning_rate=RATE, weight_decay=0.0))
    loss = replace(loss_config(), old=old)
    state = init_state(params, tx, mesh)
    return state, make_update(
        graphdef, tx, loss, mesh, state, num_sources=1, micro_batches=micro_batches
    )


def batch_of(data: dict[str, np.ndarray], config: ModelConfig, micro_batches: int) -> Batch:
    """The drawn arrays in the rows that a run would choose."""
    groups, slots = groups_of(data, config)
    gains = data["advantages"]
    return lay_out(groups, gains, np.ones_like(gains), slots, config, micro_batches)


def groups_of(data: dict[str, np.ndarray], config: ModelConfig) -> tuple[list[Group], Slots]:
    """The drawn arrays as the sampler would give them, and slots that they fill."""
    groups = [
        Group(
            prompt_of(ids, patches, grid[None], config),
            tuple(
                Completion(ids.astype(np.int32), logps, "", "length")
                for ids, logps in zip(completions, old, strict=True)
            ),
        )
        for ids, patches, grid, completions, old in zip(
            *(data[name] for name in ("prompt_ids", "pixel_values", "image_grid_thw")),
            *(data[name] for name in ("completion_ids", "old_logps")),
            strict=True,
        )
    ]
    windows = max(len(group.prompt.vision.segments) for group in groups)
    lengths = data["prompt_ids"].shape[1], data["completion_ids"].shape[2]
    return groups, Slots(*lengths, windows, pad_id=0)


def prompt_of(ids: np.ndarray, patches: np.ndarray, grid: np.ndarray, config: ModelConfig) -> Any:
    ids = ids.astype(np.int32)
    vision, unit_index = layout.pack_vision(patches, grid, config)
    return Prompt(
        sample=Sample("bench", "0", (), (), NO_REWARD),
        ids=ids,
        positions=layout.mrope_positions(ids, grid, config),
        image_index=layout.image_index(ids, unit_index, config),
        vision=vision,
        grid_thw=grid,
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
