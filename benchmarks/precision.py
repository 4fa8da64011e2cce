"""How far log-probs drift with bfloat16 activations (and float32 parameters) from float32 ones.

    python benchmarks/precision.py [--models=runs/quickstart/model,/path/to/Qwen2.5-VL-3B-Instruct]

Each model answers digit pictures by sampling in float32; then the log-probs of those very tokens
are computed by the trainer in both types, and by a sampler that runs in bfloat16. Without --models:
random ones of two widths and two depths, that need no download. The table of docs/precision.md is
what this prints.

drift    |log p in bfloat16 - log p in float32| of a token: mean, 99th percentile, largest
ratio    how far from 1 the ratio of GRPO would begin were one of the two the sampler's
kl       mean of r - 1 - log r, r = p in bfloat16 / p in float32
gap      |log p of the bfloat16 trainer - of the bfloat16 sampler| on the sampler's tokens: mean
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import numpy as np
from sampler import engine_of

from configs import base
from vtriune_jax import models, sharding
from vtriune_jax.data import digits
from vtriune_jax.data.packing import pack, stack_vision
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.rows import Slots
from vtriune_jax.data.sources import load
from vtriune_jax.data.tokenizer import load_processor
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.tiny import ensure_tiny
from vtriune_jax.types import Batch, Group, Prompt

PROMPTS, COMPLETIONS, TOKENS = 16, 4, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", help="checkpoint folders, with commas between")
    args = parser.parse_args()
    print(
        f"{'model':34s} {'layers':>6s} {'width':>5s}   drift mean    99 %     max   ratio 99 %"
        "       kl  gap mean"
    )
    for name, path in given(args.models) if args.models else made():
        print(row(name, path), flush=True)


def given(paths: str) -> Iterator[tuple[str, Path]]:
    for path in paths.split(","):
        yield "/".join(Path(path).parts[-2:]), Path(path)


def made() -> Iterator[tuple[str, Path]]:
    for layers, hidden in ((4, 128), (16, 128), (4, 512), (16, 512)):
        sizes = base.get_config().model.tiny
        sizes.layers, sizes.hidden, sizes.intermediate = layers, hidden, 3 * hidden
        sizes.heads, sizes.kv_heads = hidden // 32, hidden // 64
        with tempfile.TemporaryDirectory() as folder:
            yield "random", ensure_tiny(Path(folder) / "model", sizes, digits.texts(), 0)


def row(name: str, path: Path) -> str:
    full, half = (models.load_pretrained(path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    text = full.config.text
    prompter = Prompter(load_processor(path), full.config, max_pixels=112 * 112, cot=False)
    source = load("digits/counting", "heldout", cache=Path(tempfile.gettempdir()) / "precision")
    prompts = [prompter(sample) for sample in source[:PROMPTS]]
    slots = Slots(
        prompt_tokens=max(len(prompt.ids) for prompt in prompts),
        completion_tokens=TOKENS,
        windows=max(len(prompt.vision.segments) for prompt in prompts),
        pad_id=prompter.pad_id,
    )
    tools = SimpleNamespace(prompter=prompter, prompts=prompts, slots=slots)
    groups = sampled(full, tools)
    batch = packed(groups, tools)
    kept = batch.mask > 0
    drift = (logps(half, batch, prompter) - logps(full, batch, prompter))[kept]
    own = packed(sampled(half, tools), tools)
    gap = np.abs(logps(half, own, prompter) - own.rollout_logps)[own.mask > 0]
    sizes, ratio = np.abs(drift), np.exp(drift)
    tail, off = np.quantile(sizes, 0.99), np.quantile(np.abs(ratio - 1), 0.99)
    return (
        f"{name:34s} {text.layers:6d} {text.embed:5d}   {sizes.mean():10.4f} {tail:7.4f} "
        f"{sizes.max():7.4f} {off:12.4f} {np.mean(ratio - 1 - drift):8.1e} {gap.mean():9.4f}"
    )


def sampled(model: Any, tools: Any) -> list[Group]:
    graphdef, params = models.split(model)
    prompter: Prompter = tools.prompter
    prompts: Sequence[Prompt] = tools.prompts
    engine = engine_of(graphdef, prompter)
    features = models.encode(graphdef, params, stack_vision(prompts, tools.slots))
    keys = jax.random.split(jax.random.key(0), len(prompts))
    sampling = Sampling(max_tokens=TOKENS, n=COMPLETIONS)
    return engine.generate(params, prompts, features, sampling, keys, tools.slots.prompt_tokens)


def packed(groups: Sequence[Group], tools: Any) -> Batch:
    ones = np.ones((len(groups), COMPLETIONS))
    sources = {group.prompt.sample.data_source: 0 for group in groups}
    return pack(groups, ones, ones, sources, tools.slots)


def logps(model: Any, batch: Batch, prompter: Prompter) -> np.ndarray:
    """As the update computes them."""
    graphdef, params = models.split(model)
    loss = LossConfig(banned_ids=prompter.banned_ids)
    return np.asarray(make_logps(graphdef, loss, sharding.make_mesh())(params, batch))


if __name__ == "__main__":
    main()
