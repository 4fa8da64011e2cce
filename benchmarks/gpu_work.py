"""What both sides of benchmarks/gpu.py do: sizes and cases. Imports neither jax nor torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One size of the model: rows in tokens, images in pixels, and how each side computes."""

    sequences: int
    prompt: int
    completion: int
    pixels: int
    """Height and width of an image, one in each prompt."""
    freeze: tuple[str, ...] = ()
    remat: str = "dots"
    micro_batches: int = 1
    """Of ours, with separate sequences."""
    at_once: int = 8
    """Sequences of a micro-batch of torch's, at most: halved while memory is short."""
    checkpointing: bool = False
    """Of torch's layers."""
    prompts: int = 16
    new_tokens: int = 256
    """Of the sampler."""

    def groups(self, case: str) -> tuple[int, int]:
        """Prompts, and completions of each."""
        return (self.sequences // 8, 8) if case == "shared" else (self.sequences, 1)


SIZES = {
    "tiny": Work(16, 96, 32, 112, micro_batches=2, prompts=2, new_tokens=8),
    "3B": Work(32, 768, 256, 448, micro_batches=2),
    "7B": Work(
        16, 768, 256, 448, freeze=("^visual/",), remat="full", at_once=2, checkpointing=True
    ),
}
"""`tiny`, where there is no GPU, tries the scripts. Of 7B the vision tower is frozen, as V-Triune
does, so that parameters, moments and gradients in float32 fit into one H200."""


def measured(step: Callable[[], dict[str, float]], steps: int, warmup: int = 2) -> dict[str, Any]:
    """Seconds of steps after the warm-up and of the very first one, and what that one told."""
    seconds, told = [], []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        told.append(step())
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[warmup:], "first_s": seconds[0], **told[0]}


def scratch(size: str) -> Path:
    """Where a checkpoint of this size has room, in memory if possible."""
    needed = {"tiny": 2**28, "3B": 9 * 2**30, "7B": 18 * 2**30}[size]
    for place in (Path("/dev/shm"), Path("/tmp")):
        room = os.statvfs(place)
        if room.f_bavail * room.f_frsize > needed:
            return place
    raise SystemExit(f"{size}: no {needed / 2**30:.0f} GiB in /dev/shm or /tmp")
