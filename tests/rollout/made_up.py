"""Checkpoint folders and prompts for the fake server with its pseudo-model: made in no time."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from vtriune_jax.types import Prompt, RewardConfig, Sample, Vision

VOCAB, STOP = 400, 10
START, END, PAD, VIDEO_PAD = 390, 391, 392, 393
BANNED = (PAD, VIDEO_PAD, START, END)


def write_folder(folder: Path, language: int, vision: int, width: int = 4) -> Path:
    """What the fake server looks at of a checkpoint; the numbers are seeds of its weights."""
    folder.mkdir(parents=True)
    config = {"vocab_size": VOCAB, "image_token_id": PAD, "eos_token_id": STOP}
    (folder / "config.json").write_text(json.dumps(config))
    limits = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 1280}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    tensors = {
        "model.norm.weight": np.random.default_rng(language).normal(size=(width,)),
        "visual.norm.weight": np.random.default_rng(vision).normal(size=(width,)),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_prompt(number: int, images=(), name: str = "") -> Prompt:
    """A prompt of a few tokens; `images` are (encoded, rows, columns of units of 28 pixels)."""
    ids = [20 + number % 100, 21, 22 + number % 7][: 2 + number % 2]
    for _, rows, columns in images:
        ids += [START, *[PAD] * (rows * columns), END, 23]
    grid = [(1, 2 * rows, 2 * columns) for _, rows, columns in images]
    reward = RewardConfig("none", "")
    return Prompt(
        sample=Sample(
            "made up", name or str(number), tuple(data for data, _, _ in images), (), reward
        ),
        ids=np.array(ids, np.int32),
        positions=np.zeros((3, len(ids)), np.int32),
        image_index=np.full(len(ids), -1, np.int32),
        vision=Vision(np.zeros((0, 1, 1)), np.zeros((0, 1, 2)), np.zeros((0, 1))),
        grid_thw=np.array(grid, np.int32).reshape(-1, 3),
    )
