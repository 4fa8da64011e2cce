"""What a completion costs the trainer's host: processor time of the rollout client.

    python benchmarks/rollout_client.py                  # 1, 64 and 1,024 completions in flight
    python benchmarks/rollout_client.py --tokens=2048 --servers=4

The fake server of the tests runs as processes of its own; `cpu` is processor time of this one, all
threads: building requests, the network, parsing, checking, and the text for the verifiers. Each
prompt has a picture of `--side` pixels squared, a PNG as the model sees it, and `--n` completions
(at 1 in flight: one). Completions a second are mostly the fake server's doing.

What was measured is in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import numpy as np
from PIL import Image

from tests.rollout.fake_sglang import FakeServer
from tests.rollout.made_up import BANNED, PAD, STOP, make_prompt, write_folder
from vtriune_jax.data import digits
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.sglang import SGLangEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--in_flight", type=int, nargs="*", default=[1, 64, 1024])
    parser.add_argument("--completions", type=int, default=1024, help="at most, in one measurement")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--side", type=int, default=448, help="pixels of the picture; 0: none")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        write_processor(Path(home) / "processor", digits.texts(), vocab_size=1000)
        tokenizer = load_processor(Path(home) / "processor").tokenizer
        folder = write_folder(Path(home) / "weights", 1, 1)
        print("in flight  completions  cpu ms per completion  completions/s")
        for in_flight in args.in_flight:
            for _ in range(args.rounds):
                measure(args, in_flight, folder, tokenizer)


def measure(args: argparse.Namespace, in_flight: int, folder: Path, tokenizer) -> None:
    """One line: as many at a time as the servers say that they can have."""
    n = min(args.n, in_flight)
    units = args.side // 28
    pictures = [(picture(args.side), units, units)] if args.side else []
    prompts = [
        make_prompt(k, pictures, name=str(k))
        for k in range(max(min(args.completions, 200 * in_flight) // n, 1))
    ]
    sampling = Sampling(max_tokens=args.tokens, n=n)
    with contextlib.ExitStack() as stack:
        flags = {"model_path": folder, "capacity": max(n, in_flight // args.servers)}
        servers = [FakeServer(process=True, **flags) for _ in range(args.servers)]
        addresses = [stack.enter_context(server).address for server in servers]
        fleet = stack.enter_context(Fleet(addresses))
        engine = SGLangEngine(
            fleet,
            stop_ids=[STOP],
            banned_ids=BANNED,
            image_id=PAD,
            decode_text=partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True),
            pictures=lambda prompt: prompt.sample.images,
        )
        fleet.wait_ready(60)
        engine.submit(prompts[:1], sampling).result()
        cpu, wall = time.process_time(), time.perf_counter()
        groups = engine.submit(prompts, sampling).result().groups
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        count = sum(len(group.completions) for group in groups)
        length = np.mean([len(drawn.ids) for group in groups for drawn in group.completions])
        print(
            f"{in_flight:9d}  {count:11d}  {1000 * cpu / count:21.3f}  {count / wall:13.1f}"
            f"   ({length:.0f} tokens each, {engine.stats()['retries']:.0f} retries)",
            flush=True,
        )


def picture(side: int) -> bytes:
    """A square PNG, as large a file as one of a photograph."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8))
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
