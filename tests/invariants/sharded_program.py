"""What the partitioner makes of update and sampler on 8 devices; run by sharded_program_test.py.

JAX_NUM_CPU_DEVICES=8 PYTHONPATH=. python sharded_program.py
"""

import json
import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from tests.rl.tiny_update import CONFIG, FREEZE, GRPO, SOURCES, TX, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.aot.hlo import Module
from vtriune_jax.models.attention import on_each_device
from vtriune_jax.models.kernels import splash, xla
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import abstract_state, jit_update
from vtriune_jax.rollout import local
from vtriune_jax.rollout.choice import Sampling

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


def sampler_sends() -> dict[str, list[str]]:
    """Kind and shape of all that devices send in the loop over tokens, and outside of loops."""
    mesh, groups, prompt = sharding.make_mesh(1, 8, 1), 16, 12
    graphdef, params = models.abstract(NARROW)
    places = sharding.shardings(params, mesh)

    def on_rows(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, sharding.ROWS)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places
    )
    tokens = on_rows(groups, prompt)
    prompts = local.PaddedPrompts(tokens, on_rows(groups, 3, prompt), tokens, tokens)
    given = params, prompts, None, on_rows(groups, dtype=jax.random.key(0).dtype)
    ids = local.Ids(stop=(1,), banned=NARROW.banned_ids, pad=0)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = local.sample.lower(graphdef, ids, Sampling(max_tokens=32, n=4), *given).compile()
    module = Module(program.as_text())
    found: dict[str, list[str]] = {"loop": [], "outside": []}
    for name, times in module.turns():
        if times == 1:  # the loop's turns are not known; one over layers has two
            where = "outside" if name == module.entry else "loop"
            found[where] += [
                f"{line.opcode} {line.shape}"
                for line in module.computations[name]
                if re.match("all-|reduce-scatter|collective", line.opcode)
            ]
    return found


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
    print(json.dumps(found | {"sampler": sampler_sends()}))


if __name__ == "__main__":
    main()
