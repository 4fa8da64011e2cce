"""Every way to compute attention here, at the shapes of 3B: how long it takes, and its error.

    python benchmarks/attention.py [--rows=8] [--tokens=1024] [--rounds=20]

language   causal, 16 heads of 128, 2 of keys, one sequence a row
packed     the same, four sequences a row, which cuDNN leaves to Triton
group      a quarter of the rows, each with a prompt of 3/4 of the tokens and 8 completions
vision     16 heads of 80, a whole image a row: the full-attention layers of the tower
windows    the same patches as windows of 64

Inputs are random and bfloat16. The error is |result - XLA's in float32| / |XLA's|, the largest of
the result and the three gradients. Milliseconds forwards, and forwards and backwards: means of the
rounds, after two.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import jax.numpy as jnp
import numpy as np

from vtriune_jax.commands import tell_compilers
from vtriune_jax.models.attention import PLATFORM, attention
from vtriune_jax.models.platform import platform


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    tell_compilers()
    rows, tokens = args.rows, args.tokens
    prompt, completion = 3 * tokens // 4, tokens // 4
    cases: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "language": ((rows, tokens, 16, 2, 128), {"causal": True, "slots": (1, completion)}),
        "packed": ((rows, tokens, 16, 2, 128), {"causal": True}),
        "group": (
            (rows // 4, prompt + 8 * completion, 16, 2, 128),
            {"causal": True, "slots": (8, completion)},
        ),
        "vision": ((rows, tokens, 16, 16, 80), {"causal": False}),
        "windows": ((rows * tokens // 64, 64, 16, 16, 80), {"causal": False}),
    }
    kernels = ["xla", *(name for name, where in PLATFORM.items() if where == platform())]
    print(f"{jax.devices()[0].device_kind}, {rows} rows of {tokens} tokens")
    print("| case | kernel | forwards, ms | and backwards, ms | error |\n|---|---|--:|--:|--:|")
    for case, (shape, options) in cases.items():
        for kernel in kernels if case != "windows" else ["xla"]:  # there all are XLA's
            print(f"| {case} | {kernel} | {measured(case, shape, options, kernel, args.rounds)} |")


def measured(
    case: str, shape: tuple[int, ...], options: dict[str, Any], kernel: str, rounds: int
) -> str:
    """The cells of a row."""
    rows, tokens, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    query, key, value, weights = (
        jnp.asarray(rng.standard_normal((rows, tokens, n, head_dim)), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    sequences = 4 if case == "packed" else 1
    segments = jnp.broadcast_to(1 + jnp.arange(tokens) * sequences // tokens, (rows, tokens))
    run = partial(attention, segments=segments, kernel=kernel, **options)
    inputs = query, key, value
    forwards = jax.jit(run)
    both = with_gradients(run, weights)
    exact = partial(attention, segments=segments, kernel="xla", **options)
    wanted = with_gradients(exact, weights)(*(x.astype(jnp.float32) for x in inputs))
    pairs = zip(jax.tree.leaves(both(*inputs)[1:]), jax.tree.leaves(wanted[1:]), strict=True)
    error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
    times = [seconds(function, inputs, rounds) for function in (forwards, both)]
    return " | ".join([*(f"{1e3 * each:.3f}" for each in times), f"{error:.0e}"])


def with_gradients(run: Callable[..., jax.Array], weights: jax.Array) -> Callable[..., Any]:
    """(loss, result, gradients) of a weighted sum."""

    def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = run(*inputs)
        return (out.astype(jnp.float32) * weights).sum(), out

    @jax.jit
    def both(*inputs: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        (total, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*inputs)
        return total, out, gradients

    return both


def seconds(function: Callable[..., Any], inputs: tuple[jax.Array, ...], rounds: int) -> float:
    for _ in range(2):
        jax.block_until_ready(function(*inputs))
    start = time.perf_counter()
    for _ in range(rounds):
        found = function(*inputs)
    jax.block_until_ready(found)
    return (time.perf_counter() - start) / rounds


if __name__ == "__main__":
    main()
