"""What both sides of benchmarks/update.py do: sizes, task and reward, and how they take turns.

Imports neither jax nor torch, as each side has only one of them to load.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        **dict(vocab_size=2176, hidden=128, intermediate=352, layers=4, heads=4, kv_heads=2),
        **dict(mrope_section=(4, 6, 6), tie=True, window_size=112, full_attention_layers=(1, 3)),
        **dict(vision_hidden=128, vision_intermediate=344, vision_depth=4, vision_heads=4),
    },
    "micro": {
        **dict(vocab_size=8320, hidden=384, intermediate=1056, layers=8, heads=6, kv_heads=2),
        **dict(mrope_section=(8, 12, 12), tie=True, window_size=112, full_attention_layers=(2, 5)),
        **dict(vision_hidden=320, vision_intermediate=856, vision_depth=6, vision_heads=4),
    },
}
"""Sizes as in `config.model.tiny`: 2.3 and 26 million parameters."""

SEQUENCES, PROMPT, COMPLETION = 8, 288, 96
"""A prompt is 3/4 of a sequence."""
PIXELS = 224
"""Height and width of an image: 64 image tokens."""
CASES = {"separate": (SEQUENCES, 1), "shared": (1, SEQUENCES)}
"""Prompts, and completions of each."""
RATE, CLIP = 1e-5, 0.2
"""AdamW without weight decay, its gradient clipped to norm 1; the clip of the probability ratio."""

STEP = {"prompts": 2, "samples": 8, "completion": 64}
"""Of the whole GRPO step."""
QUESTION = "How bright is the square, from 0 to 9? Answer with the digit and its four corners."
MARK = "BENCH "


def drawn(seed: int) -> Iterator[tuple[bytes, int]]:
    """Pictures (PNG) of a square on noise, and its brightness from 0 to 9."""
    rng = np.random.default_rng(seed)
    while True:
        canvas = rng.integers(0, 70, (PIXELS, PIXELS, 3), dtype=np.uint8)
        label, side = int(rng.integers(10)), int(rng.integers(48, 113))
        x, y = rng.integers(0, PIXELS - side, 2)
        canvas[y : y + side, x : x + side] = 80 + 19 * label
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "PNG")
        yield buffer.getvalue(), label


def reward(text: str, label: int) -> float:
    """1 for the right first digit, and up to 1 for a length that goes with it.

    A model of random weights hardly ever names a digit, and equal rewards have no gradient.
    """
    first = next((letter for letter in text if letter in "0123456789"), "")
    return (first == str(label)) + 1.0 - min(1.0, abs(len(text) - 30 * (label + 1)) / 300)


def arrays(folder: Path, case: str) -> dict[str, np.ndarray]:
    """The batch of a case, as `update_ours.py prepare` has drawn it."""
    return dict(np.load(folder / f"{case}.npz"))


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What argparse calls to read names with commas between."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        if strangers := set(found) - set(known):
            raise argparse.ArgumentTypeError(
                f"{', '.join(strangers)} is not known; choose from {', '.join(known)}"
            )
        return found

    return read


def say(**numbers: Any) -> None:
    """A line to the driver."""
    print(MARK + json.dumps(numbers), flush=True)


def wait() -> bool:
    """Until the driver gives us our turn; False when there is none left."""
    return bool(sys.stdin.readline())


def serve(step: Callable[[], dict[str, float]]) -> None:
    """One step for each line from the driver; its wall and CPU seconds back, and what it returns.

    The first step tells the results that are compared, and is warm-up.
    """
    say(ready=1)
    while wait():
        wall, cpu = time.perf_counter(), cpu_seconds()
        told = step()
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        say(**seconds, **told, peak_mb=peak_mb())


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def peak_mb() -> float:
    """VmHWM: unlike ru_maxrss it is not inherited from the process that forked this one."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
