"""One update in many layouts on eight devices; run by update_layouts_test.py, prints JSON.

JAX_NUM_CPU_DEVICES=8 PYTHONPATH=. python update_layouts.py few|all
"""

import json
import re
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.rl.tiny_groups import GRIDS, SLOTS, SOURCES, make_group
from tests.rl.tiny_update import CONFIG, SFT, build, make_batch
from vtriune_jax import sharding
from vtriune_jax.data.packing import pack
from vtriune_jax.data.rows import choose, needs
from vtriune_jax.models import LoRAConfig, lora
from vtriune_jax.rl.logprobs import token_logps
from vtriune_jax.rl.losses import LossConfig

LORA = replace(CONFIG, lora=LoRAConfig(rank=4, alpha=8.0))

REST = {"entropy_weight": 0.1, "banned_ids": CONFIG.banned_ids}
GSPO = LossConfig(
    "gspo", 0.05, 0.05, 3.0, "sequence", "recomputed", tis_cap=1.1, kl_weight=0.1, **REST
)
CISPO = LossConfig("cispo", normalise="dr", old="rollout", kl_weight=0.1, kl="k2", **REST)

LAYOUTS = {
    "one device": ((1, 1, 1), 1),
    "8,1,1": ((8, 1, 1), 1),
    "1,8,1": ((1, 8, 1), 1),
    "2,2,2": ((2, 2, 2), 1),
    "4 micro-batches": ((1, 1, 1), 4),
    "2,2,2 and 2 micro-batches": ((2, 2, 2), 2),
}
SLOW = {
    "group rows: 1,8,1",
    "packed rows: 8,1,1",
    "grpo: 2,2,2",
    "cispo: one device",
    "cispo: 2,2,2 and 2 micro-batches",
}
"""Not run by default: their rows, meshes and micro-batches come up in others. Each takes 4 s."""


def run(mesh, micro_batches, batch, **options):
    """State and sums after one update, on the host, and what of the state was left behind."""
    update, state, *_ = build(mesh, micro_batches=micro_batches, **options)
    after, sums = update(state, sharding.shard_rows(batch, mesh))
    kept = sum(not leaf.is_deleted() for leaf in jax.tree.leaves(state))
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(after.params))
    return jax.device_get({"state": after, "sums": sums}), kept, cut


def differences(got, want) -> dict[str, float]:
    """Relative difference of every array, by its norm."""
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True)
    return {
        jax.tree_util.keystr(path): float(
            np.linalg.norm(np.subtract(a, b)) / max(np.linalg.norm(b), 1e-30)
        )
        for (path, a), b in pairs
    }


def mesh_of(sizes):
    """A mesh over as many of the eight devices as it needs."""
    return sharding.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])


def groups_in_rows(kind):
    """8 groups of 2 completions, one of which failed, in rows of the kind, a multiple of 8."""
    rng = np.random.default_rng(0)
    groups = [
        make_group(rng, text, grids, lengths, source)
        for text, grids, lengths, source in zip(
            (1, 2, 3, 4) * 2, GRIDS * 2, ((1, 6), (3, 3)) * 4, "abcbacab", strict=True
        )
    ]
    features = np.random.default_rng(1).normal(size=(8, 8, CONFIG.text.embed)).astype(np.float32)
    values, weights = rng.normal(size=(8, 2)), np.ones((8, 2))
    weights[3, 1] = 0.0
    rows = choose(kind, needs(groups, SLOTS, 1, 8), SLOTS, 8, 2, 8, CONFIG, False)
    if rows.n != {"single": 1, "group": 2, "packed": 2}[kind]:
        raise ValueError(f"these are not {kind} rows: {rows}")
    return pack(groups, values, weights, SOURCES, SLOTS, features, rows, unit=8)


def rows_report(left_out):
    """Every kind of rows on several meshes, against single rows on one device."""
    report, want = {}, None
    for kind, name in (
        ("single", "one device"),
        ("group", "one device"),
        ("group", "1,8,1"),
        ("group", "2,2,2 and 2 micro-batches"),
        ("packed", "8,1,1"),
        ("packed", "2,2,2 and 2 micro-batches"),
    ):
        if f"{kind} rows: {name}" in left_out:
            continue
        sizes, micro_batches = LAYOUTS[name]
        got, kept, cut = run(mesh_of(sizes), micro_batches, groups_in_rows(kind))
        want = want or got
        entry = {"differences": differences(got, want), "kept": kept, "cut": cut}
        report[f"{kind} rows: {name}"] = entry
    return report


def arrays_of_logits(vocab=96, rows=4, tokens=12):
    """Shapes [.., vocab or its part] on a device of (data=2, tensor=4), in chunks of two tokens."""
    mesh = sharding.make_mesh(2, 1, 4)
    by_rows, by_vocab = NamedSharding(mesh, sharding.ROWS), NamedSharding(mesh, P(None, "tensor"))

    def loss(hidden, head, targets):
        logps, entropy = token_logps(
            hidden, head, targets, max_logits=2 * rows * vocab, entropy_gradient=True
        )
        return (logps + entropy).sum()

    gradient = jax.jit(
        jax.grad(loss, (0, 1)),
        in_shardings=(by_rows, by_vocab, by_rows),
        out_shardings=(by_rows, by_vocab),
    )
    shapes = (rows, tokens, 8), (8, vocab), (rows, tokens)
    types = jnp.float32, jnp.float32, jnp.int32
    arguments = map(jax.ShapeDtypeStruct, shapes, types)
    text = gradient.lower(*arguments).compile().as_text()
    return sorted(set(re.findall(rf"f32\[[\d,]*\b(?:{vocab}|{vocab // 4})\]", text)))


def main() -> None:
    """Compare every layout with the first."""
    left_out = SLOW if sys.argv[1] == "few" else set()
    report = rows_report(left_out)
    for kind, batch, options in (
        ("grpo", make_batch(), {}),
        ("sft", make_batch(vision=True), {"loss": SFT, "freeze": ()}),
        ("lora", make_batch(), {"config": LORA, "freeze": (lora.BASE,)}),
        ("gspo", make_batch(), {"loss": GSPO}),
        ("cispo", make_batch(), {"loss": CISPO}),
    ):
        names = LAYOUTS if kind == "grpo" else ("one device", "2,2,2 and 2 micro-batches")
        want = None
        for name in names:
            if f"{kind}: {name}" in left_out:
                continue
            sizes, micro_batches = LAYOUTS[name]
            got, kept, cut = run(mesh_of(sizes), micro_batches, batch, **options)
            want = want or got
            report[f"{kind}: {name}"] = {
                "differences": differences(got, want),
                "kept": kept,
                "cut": cut,
            }
    print(json.dumps({"updates": report, "logits": arrays_of_logits()}))


if __name__ == "__main__":
    main()
