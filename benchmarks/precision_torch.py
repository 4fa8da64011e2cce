"""How far log-probs of ours and of torch are from transformers' in float64, type by type.

    python benchmarks/precision_torch.py [--model=FOLDER]

Of random tokens behind a prompt with an image. Without --model: random weights of 3B's depth, 768
wide. Needs torch (requirements-dev.txt). Printed are root mean square and maximum of the error.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from update_ours import batch_of, draw, loss_config
from update_torch import inputs_of, log_probs

from vtriune_jax import models, sharding
from vtriune_jax.models import ModelConfig
from vtriune_jax.models.pretrained import read_config
from vtriune_jax.rl.policy import make_logps

SEQUENCES, SIZES = 4, (288, 96, 224)
"""Tokens of prompt and completion, pixels of a side."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or made(Path(scratch))
        data = draw(read_config(folder), SEQUENCES, 1, SIZES)
        exact = next(of_torch(folder, data, (torch.float64,)))
        found = {
            "ours, float32": of_ours(folder, data, "float32"),
            "ours, bfloat16": of_ours(folder, data, "bfloat16"),
        }
        names = ("transformers, float32", "transformers, autocast", "transformers, bfloat16")
        kinds = (torch.float32, None, torch.bfloat16)
        found |= zip(names, of_torch(folder, data, kinds), strict=True)
    for name, logps in found.items():
        error = logps.reshape(exact.shape) - exact
        print(f"{name:24s} {np.sqrt((error**2).mean()):.1e} {np.abs(error).max():.1e}")


def made(folder: Path) -> Path:
    """A checkpoint of random weights."""
    whole = models.named("3B")
    vision = replace(whole.vision, embed=384, mlp=768, heads=4, out=768)
    text = replace(whole.text, embed=768, mlp=3840, heads=12, kv_heads=2, mrope_section=(8, 12, 12))
    model = models.init(replace(whole, vision=vision, text=text), seed=0)
    models.save_pretrained(model, folder)
    return folder


def of_torch(
    folder: Path, data: dict[str, np.ndarray], kinds: tuple[torch.dtype | None, ...]
) -> Iterator[np.ndarray]:
    """Log-probs in each type; None is float32 with autocast to bfloat16."""
    for kind in kinds:
        # Read in its type: `to` would round the frequencies of the rotary embedding as well.
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=kind or torch.float32, attn_implementation="sdpa"
        )
        batch = {name: torch.from_numpy(array) for name, array in data.items()}
        inputs, completions = inputs_of(model, batch)
        if kind:
            inputs["pixel_values"] = inputs["pixel_values"].to(kind)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kind is None):
            yield log_probs(model, inputs, completions).double().numpy()


def of_ours(folder: Path, data: dict[str, Any], dtype: str) -> np.ndarray:
    model = models.load_pretrained(folder, dtype=dtype)
    config: ModelConfig = model.config
    graphdef, params = models.split(model)
    logps = make_logps(graphdef, loss_config(), sharding.make_mesh())
    return np.asarray(logps(params, batch_of(data, config, micro_batches=1)))


if __name__ == "__main__":
    main()
