"""What a verdict costs: our verifier service against one that judges as one would write it down.

    python benchmarks/rewards.py [--cores 1 2] [--scale 1.0]

`plain_server.py` is V-Triune's way: FastAPI, one completion per request, the published detection
reward and all its sub-scores in loops (`plain_detection.py`), math-verify. Costs are CPU seconds of
*all* processes of a server, requests over HTTP included, and both are measured in this run; first
it is made sure that both give the same numbers. Latencies are wall time and mean something on an
idle machine only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone, not an installed package

from benchmarks import plain_detection
from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers import detection
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.router import task

THOUGHTS = "The picture shows a street, and I go through it from left to right. " * 18


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    options.add_argument("--scale", type=float, default=1.0, help="of the number of completions")
    options.add_argument("--op", action="store_true", help=argparse.SUPPRESS)  # in a child
    args = options.parse_args()
    if args.op:
        print(json.dumps(op(int(8192 * min(args.scale, 1.0)) // 128 * 128)))
        return
    check()
    for cores in args.cores:
        print(f"\n{cores} core{'s' * (cores > 1)}: CPU per completion, all processes of the server")
        print(f"{'':34}{'plain':>11}{'ours':>11}{'times':>8}")
        print_costs(cores, args.scale)
        print_service(cores, args.scale)
    command = [sys.executable, __file__, "--op", f"--scale={args.scale}"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(pinned(1, command), env=env, check=True, stdout=subprocess.PIPE)
    plain, ours = json.loads(done.stdout)
    print("\nthe detection reward alone, jitted, 8,192 pairs of 5-20 boxes, 1 core")
    print_line("per pair, without text and HTTP", plain, ours)


# ------------------------------------------------------------------------------------ questions


def detection_items(count: int, seed: int = 0) -> list[Item]:
    """Groups of 8 answers of 5-20 boxes, most near the true ones, some astray or mislabelled."""
    rng = random.Random(seed)
    labels = ("person", "car", "dog", "traffic light", "bicycle")
    items = []
    while len(items) < count:
        true, progress = [], rng.random()
        for _ in range(rng.randint(5, 20)):
            x, y, size = rng.randint(0, 800), rng.randint(0, 800), rng.randint(20, 190)
            box = [x, y, x + size, y + size]
            true.append({"bbox_2d": box, "label": rng.choice(labels)})
        reward = RewardConfig("detection", f"<answer>\n{true}\n</answer>", format_ratio=0.1)
        for _ in range(8):
            said = []
            for entry in rng.sample(true, len(true)):
                error = rng.choice((0, 0, 0, 1, 2, 5, 30))
                box = [value + rng.randint(-error, error) for value in entry["bbox_2d"]]
                label = entry["label"] if rng.random() < 0.9 else rng.choice(labels)
                if rng.random() < 0.95 or len(said) < 4:
                    said.append({"bbox_2d": box, "label": label})
            items.append(Item(completion(len(items), json.dumps(said)), reward, progress))
    return items[:count]


NUMBERS = (
    lambda a, b: f"{a * b}",
    lambda a, b: f"{a / 4 + b}",
    lambda a, b: rf"\frac{{{a}}}{{{b}}}",
    lambda a, b: rf"{a}\sqrt{{{b}}}",
)
EXPRESSIONS = (
    lambda a, b: rf"{a}x^2 - {b}x + 1",
    lambda a, b: rf"\frac{{{a}\pi}}{{{b}}}",
    lambda a, b: f"({a}, {b})",
    lambda a, b: rf"{a * b}\%",
    lambda a, b: rf"{a}\text{{ cm}}",
    lambda a, b: rf"\text{{option {a} {b}}}",
    lambda a, b: f"x = {a - b}",
)


def math_items(
    count: int, seed: int = 0, repeating: bool = True, kinds: Sequence[Callable] = NUMBERS
) -> list[Item]:
    """Groups of 8 answers; half are right.

    Of the others two are the same in about every second group, unless not `repeating`: then no
    answer occurs twice, and the truth not either.
    """
    rng = random.Random(seed)
    items = []
    while len(items) < count:
        kind, a, b = rng.choice(kinds), rng.randint(2, 999), rng.randint(2, 999)
        reward = RewardConfig("mathverify", rf"\boxed{{{kind(a, b)}}}")
        for _ in range(8 if repeating else 1):
            shift = rng.randint(1, 6 if repeating else 999) * (rng.random() < 0.5)
            answer = rf"\boxed{{{kind(a + shift, b)}}}"
            items.append(Item(completion(len(items), answer), reward))
    return items[:count]


def completion(number: int, answer: str) -> str:
    """About 300 tokens; no two are the same."""
    return f"<think>\n{number} {THOUGHTS}\n</think>\n<answer>\n{answer}\n</answer>"


def as_judge(item: Item) -> dict[str, object]:
    """The same as a request to the plain server."""
    params = {"is_training": True, "step": round(item.progress * 1e6), "total_steps": 10**6}
    return {
        "response": item.completion,
        "prompt": "",
        "answer": "",
        "solution": item.reward.ground_truth,
        "data_source": "benchmark",
        "reward_verifier": item.reward.verifier,
        "reward_verifier_parm": json.dumps(params),
        "format_ratio": item.reward.format_ratio,
        "accuracy_ratio": item.reward.accuracy_ratio,
    }


def check() -> None:
    """That the plain implementation and our verifier agree in every sub-score."""
    items, worst, names = detection_items(200, seed=1), 0.0, set()
    for item, ours in zip(items, detection.verify_batch([task(i, {}) for i in items]), strict=True):
        plain = plain_detection.score(item.completion, item.reward.ground_truth, item.progress)
        names = plain.keys() & ours.keys()
        worst = max([worst, *(abs(plain[name] - ours[name]) for name in names)])
    if worst > 1e-9 or len(names) < 26:
        sys.exit(f"the two detection rewards differ by {worst:g}: the comparison means nothing")
    print(f"both detection rewards agree: {len(names)} scores of 200 answers, to {worst:.0e}")


# -------------------------------------------------------------------------------------- servers


def pinned(cores: int, command: Sequence[str]) -> list[str]:
    """The command on that many cores."""
    return ["taskset", "-c", f"0-{cores - 1}", *command]


@contextlib.contextmanager
def running(cores: int, command: Sequence[str], path: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server of that command; its process and the address, once it answers at `path`."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(pinned(cores, [part.format(port=port) for part in command]))
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}{path}").close()
                break
            time.sleep(0.01)
        yield psutil.Process(process.pid), address
    finally:
        process.terminate()
        process.wait()


def ours(cores: int, *flags: str) -> contextlib.AbstractContextManager:
    module = ["-m", "vtriune_jax.verifiers.server", "--port", "{port}", "--workers", f"{cores}"]
    os.environ["PYTHONPATH"] = str(ROOT)
    return running(cores, [sys.executable, *module, *flags], "/health")


def plain(cores: int) -> contextlib.AbstractContextManager:
    script = str(ROOT / "benchmarks" / "plain_server.py")
    return running(cores, [sys.executable, script, "{port}", f"{cores}"], "/")


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process and all below it; none of them has ended in a measurement."""
    return sum(sum(each.cpu_times()[:2]) for each in family(process))


def ask_ours(address: str, items: Sequence[Item]) -> None:
    with VerifierClient([address]) as client:
        failed = [v for v in client.score(items) if v.status != "ok"]
    if failed:
        sys.exit(f"{len(failed)} of {len(items)} were not judged: {failed[0].reason}")


def ask_plain(address: str, items: Sequence[Item]) -> None:
    async def ask() -> None:
        connector = aiohttp.TCPConnector(limit=32)
        async with aiohttp.ClientSession(address, connector=connector) as session:

            async def one(item: Item) -> None:
                async with session.post("/judge", json=as_judge(item)) as answer:
                    answer.raise_for_status()
                    await answer.read()

            await asyncio.gather(*map(one, items))

    asyncio.run(ask())


def cost(process: psutil.Process, ask, address: str, items: Sequence[Item]) -> float:
    """CPU seconds per completion."""
    before = cpu_seconds(process)
    ask(address, items)
    return (cpu_seconds(process) - before) / len(items)


# -------------------------------------------------------------------------------------- figures


def print_costs(cores: int, scale: float) -> None:
    """Both servers are up and asked in turn, each three times; the medians count."""
    numbers = math_items(int(6_144 * scale))
    lines = {
        "detection, 5-20 boxes": (detection_items(int(24_576 * scale)), 256),
        "math, numbers": (numbers, 512),
        "math, no number twice": (math_items(int(6_144 * scale), repeating=False), 512),
        "math, no expression twice": (
            math_items(int(1_536 * scale), repeating=False, kinds=EXPRESSIONS),
            512,
        ),
    }
    medians = {}
    with (
        plain(cores) as (plain_process, plain_address),
        ours(cores, "--cache", "0") as (our_process, our_address),
    ):
        warm = [*detection_items(256, seed=2), *math_items(256, seed=2)]
        ask_plain(plain_address, warm)
        ask_ours(our_address, warm)
        for name, (items, few) in lines.items():
            costs = []
            for k in range(3):
                some = items[k * len(items) // 3 : (k + 1) * len(items) // 3]
                plain_cost = cost(plain_process, ask_plain, plain_address, some[: int(few * scale)])
                costs.append((plain_cost, cost(our_process, ask_ours, our_address, some)))
            medians[name] = [statistics.median(each) for each in zip(*costs, strict=True)]
            print_line(name, *medians[name])
    with ours(cores) as (process, address):
        ask_ours(address, numbers)
        again = cost(process, ask_ours, address, numbers * 2)
        print_line("math, completions seen before", medians["math, numbers"][0], again)


def print_line(name: str, plain: float, ours: float) -> None:
    print(
        f"{name:34}{1e6 * plain:>8,.1f} µs{1e6 * ours:>8,.1f} µs{plain / ours:>8,.1f}", flush=True
    )


def print_service(cores: int, scale: float) -> None:
    """Start-up, memory, and the latency of batches of 64 under four clients at once."""
    start = time.monotonic()
    with ours(cores, "--cache", "0") as (process, address):
        seconds = time.monotonic() - start
        batches = 16 * max(1, int(6 * scale))
        for name, make in (("detection", detection_items), ("math", math_items)):
            items = make(64 * batches, seed=3)
            ask_ours(address, items[: 64 * 4])
            with (
                ThreadPoolExecutor(4) as threads,
                contextlib.ExitStack() as stack,
            ):
                clients = [stack.enter_context(VerifierClient([address])) for _ in range(4)]

                def timed(k: int, items=items, clients=clients) -> list[float]:
                    taken = []
                    for start in range(64 * k, len(items), 64 * 4):
                        began = time.monotonic()
                        clients[k].score(items[start : start + 64])
                        taken.append(time.monotonic() - began)
                    return taken

                taken = sorted(t for each in threads.map(timed, range(4)) for t in each)
            print(
                f"{name}, batches of 64 of 4 clients: p50 {1e3 * taken[len(taken) // 2]:.0f} ms, "
                f"p99 {1e3 * taken[int(0.99 * len(taken))]:.0f} ms"
            )
        memory = [each.memory_info().rss / 2**20 for each in family(process)]
        print(
            f"ready after {seconds:.1f} s; memory {sum(memory):.0f} MiB "
            f"(server {memory[0]:.0f}, workers {', '.join(f'{m:.0f}' for m in memory[1:])})",
            flush=True,
        )


def op(rows: int) -> tuple[float, float]:
    """CPU seconds per pair of the plain functions and of the jitted op, on padded arrays."""
    import jax
    import numpy as np

    from vtriune_jax.rewards.arrays import in_chunks
    from vtriune_jax.rewards.buckets import pad
    from vtriune_jax.rewards.detection import WEIGHTS, detection_parts

    items = detection_items(rows, seed=4)
    texts = [(item.completion, item.reward.ground_truth) for item in items]
    pairs = [(plain_detection.read(said), plain_detection.read(true)) for said, true in texts]
    sample = pairs[:200]
    before = time.process_time()
    for predicted, true in sample:
        plain_detection.scores(predicted, true, 0.5)
    plain = (time.process_time() - before) / len(sample)

    words: dict[str, int] = {}
    sides = [
        pad(
            [[box["bbox_2d"] for box in boxes] for boxes in side],
            [[words.setdefault(box["label"], len(words)) for box in boxes] for boxes in side],
        )
        for side in zip(*pairs, strict=True)
    ]
    weights = np.tile([float(name == WEIGHTS[0]) for name in WEIGHTS], (rows, 1))
    args = jax.device_put((*sides, np.full(rows, 0.5), weights, np.full(rows, 0.3)))
    run = jax.jit(in_chunks(detection_parts, 128))
    jax.block_until_ready(run(*args))
    before = time.process_time()
    for _ in range(5):
        jax.block_until_ready(run(*args))
    return plain, (time.process_time() - before) / (5 * rows)


if __name__ == "__main__":
    main()
