"""Images to patches: ours against transformers' PIL processor, on the same pictures, in one run.

    python benchmarks/images.py                        # drawn pictures
    python benchmarks/images.py --folder=/path/to/pictures --limit=64

Both go from encoded bytes to what the vision tower takes, one picture a call, in turns: a round of
theirs, a round of ours, and the medians over the rounds are compared. Theirs are normalised floats;
ours are pixels, as our tower normalises them on the device. The patches of a round are kept to its
end, as a loop keeps those of a step, so that both pay for fresh memory. With more threads a picture
is still one call; the threads take them from a queue. `cpu` is processor time of the whole process,
all threads; the ratio of it is the steadier one where other programs run. `diff` is the largest
difference of any patch value once normalised.

Measured figures are in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vtriune_jax.data import images
from vtriune_jax.models.vision import normalise

SIZES = ((1000, 750), (640, 480), (512, 512), (1600, 1200), (300, 200), (1008, 756))
"""Width and height of the drawn pictures; the first are those of the peers' benchmark."""

Convert = Callable[[bytes], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="pictures of your own, instead of drawn ones")
    parser.add_argument("--limit", type=int, default=32, help="pictures per size or folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--min_pixels", type=int, default=56 * 56)
    parser.add_argument("--max_pixels", type=int, default=28 * 28 * 1280)
    parser.add_argument("--peak", choices=("theirs", "ours"), help="the memory of one of them only")
    parser.add_argument("--picture", type=Path, help="the picture for --peak")
    args = parser.parse_args()
    size = {"shortest_edge": args.min_pixels, "longest_edge": args.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=size)

    def theirs(data: bytes) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return processor(images=[picture], return_tensors="np")["pixel_values"]

    def ours(data: bytes) -> np.ndarray:
        return images.patches([data], processor, "benchmark")[0]

    if args.peak:
        peak = peak_mib(theirs if args.peak == "theirs" else ours, args.picture.read_bytes())
        print(f"20 megapixels, {args.peak}: {peak:.0f} MiB at most, beyond what the process had")
        return
    print(
        f"{'pictures':20s} threads   theirs img/s   ours img/s   wall ×    cpu ms   cpu ×  diff",
        flush=True,
    )
    for name, blobs in pictures(args.folder, args.limit):
        worst = max(float(abs(theirs(blob) - normalise(ours(blob))).max()) for blob in blobs[:8])
        for threads in sorted({1, os.cpu_count() or 1}):
            (wall, cpu), (our_wall, our_cpu) = compare((theirs, ours), blobs, threads, args.rounds)
            print(
                f"{name:20s} {threads:7d} {1 / wall:14.1f} {1 / our_wall:12.1f} "
                f"{wall / our_wall:8.2f} {1e3 * cpu:5.1f}→{1e3 * our_cpu:<5.1f}{cpu / our_cpu:6.2f}"
                f"  {worst:.0e}",
                flush=True,
            )
    with tempfile.NamedTemporaryFile() as large:
        large.write(draw(5472, 3648, 0))
        large.flush()
        for name in ("theirs", "ours"):
            again = [sys.executable, __file__, f"--peak={name}", f"--picture={large.name}"]
            subprocess.run(again, check=True)


def pictures(folder: Path | None, limit: int) -> Sequence[tuple[str, list[bytes]]]:
    """Encoded pictures and what they are called."""
    if folder is not None:
        files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in (".jpg", ".png")]
        return [(folder.parent.name[:20], [file.read_bytes() for file in files[:limit]])]
    drawn = [(f"{w}×{h} JPEG", [draw(w, h, seed) for seed in range(limit // 2)]) for w, h in SIZES]
    mixed = [blob for _, blobs in drawn for blob in blobs[: limit // 8]]
    return [*drawn, ("all sizes", mixed)]


def draw(width: int, height: int, seed: int) -> bytes:
    """Smooth colours and noise: compresses about as a photograph does."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int16) + rng.integers(-9, 10, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def compare(
    converts: Sequence[Convert], blobs: Sequence[bytes], threads: int, rounds: int
) -> list[tuple[float, float]]:
    """Wall and processor seconds per picture of each, the medians over rounds taken in turns."""
    spent: list[list[tuple[float, float]]] = [[] for _ in converts]
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            for convert, times in zip(converts, spent, strict=True):
                wall, cpu = time.perf_counter(), time.process_time()
                list(pool.map(convert, blobs))  # all of them stay until the round is over
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [
        (
            statistics.median(wall for wall, _ in times[1:]) / len(blobs),
            statistics.median(cpu for _, cpu in times[1:]) / len(blobs),
        )
        for times in spent
    ]


def peak_mib(convert: Convert, blob: bytes) -> float:
    """What one call adds to the memory of this process at its highest; for a fresh process."""
    convert(draw(280, 280, 0))
    before = memory_mib("VmRSS")
    convert(blob)
    return memory_mib("VmHWM") - before


def memory_mib(kind: str) -> float:
    """A line of Linux's account of this process: VmRSS is now, VmHWM the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


if __name__ == "__main__":
    main()
