"""What the partitioner makes of the update on eight devices; run by sharded_program_test.py.

JAX_NUM_CPU_DEVICES=8 PYTHONPATH=. python sharded_program.py
"""

import json
import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.rl.tiny_update import CONFIG, FREEZE, GRPO, SOURCES, TX, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.aot.hlo import Module
from vtriune_jax.models.attention import on_each_device
from vtriune_jax.models.kernels import splash, xla
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import abstract_state, jit_update

NARROW = replace(CONFIG, dtype="bfloat16", remat="full", tied=False)


def lowered(loss: LossConfig) -> jax.stages.Lowered:
    """The update of one micro-batch, its parameters cut over eight devices."""
    mesh = sharding.make_mesh(1, 8, 1)
    graphdef, params = models.abstract(NARROW)
    state = abstract_state(params, TX, FREEZE)
    update = jit_update(graphdef, TX, loss, mesh, state, num_sources=SOURCES, freeze=FREEZE)
    return update.lower(state, make_batch())


def collectives() -> dict[str, list[str]]:
    """Kind → types and shapes that devices send, before the CPU's compiler widens bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partition.*"}
        lowered(GRPO).compile(compiler_options=options)
        (file,) = Path(folder).glob("*after_spmd-partitioning*")
        text = file.read_text()
    found: dict[str, list[str]] = {}
    for shape, kind in re.findall(r"= (\w+\[[\d,]*\])\S* (all-gather|all-reduce)\(", text):
        found.setdefault(kind, []).append(shape)
    return found


def head_sums() -> int:
    """How often the head's gradient is added up over devices, with logits in many chunks."""
    program = Module(lowered(replace(GRPO, max_logits=1)).compile().as_text())
    embed, vocab = NARROW.text.embed, NARROW.text.vocab
    return sum(
        times
        for name, times in program.turns()
        for line in program.computations[name]
        if re.match("all-reduce|reduce-scatter", line.opcode)
        and re.search(rf"f32\[({embed},{vocab}|{embed // 8},{vocab})\]", line.shape)
    )


def kernel_error(sizes: tuple[int, int, int], kv_heads: int) -> float:
    """How far splash under a mesh is from XLA's attention without one, gradients included.

    The largest relative difference of an array, by its norm.
    """
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(8, 150, n, 32)), jnp.float32) for n in (4, kv_heads, kv_heads)
    )
    segments = jnp.asarray(rng.integers(1, 3, (8, 1)).repeat(150, 1).cumsum(1) // 100 + 1)
    mesh = sharding.make_mesh(*sizes)

    def cut(*args):
        run = partial(splash.attention, causal=True, interpret=True)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return on_each_device(run, *args)

    def result(run, inputs, segments):
        def loss(inputs):
            return jnp.sin(run(*inputs, segments)).sum()

        return jax.jit(jax.value_and_grad(loss))(inputs)

    ours = result(cut, *sharding.shard_rows(((query, key, value), segments), mesh))
    theirs = result(partial(xla.attention, causal=True), (query, key, value), segments)
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)) for a, b in pairs)


def main() -> None:
    """Print the findings as JSON."""
    errors = {
        "rows": kernel_error((2, 4, 1), 2),
        "rows and heads, keys' heads repeated": kernel_error((2, 1, 4), 2),
        "heads that do not divide": kernel_error((1, 1, 8), 1),
    }
    found = {"collectives": collectives(), "head sums": head_sums(), "errors": errors}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
