"""Floating-point operations of one update: what the model needs, and what the program does."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from vtriune_jax.aot.program import Program
from vtriune_jax.models import weights
from vtriune_jax.types import Vision

TOWER = "visual/"
CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""cuDNN's attention, forwards and backwards, and the matrix products in each."""


def tokens(program: Program) -> int:
    """Token slots of the batch, padding included: what the devices work on."""
    rows, length = program.batch.ids.shape
    return rows * length


def model_flops(program: Program) -> float:
    """FLOPs that one update of this batch needs, on all devices together.

        forward    2 · (matrices of the layers · tokens + head · completion tokens)
                   + 4 · layers · embed · pairs               (query and key that it sees)
        backward   the same for the gradient of the inputs, the same for that of the matrices that
                   are trained, and twice the attention

    and the vision tower likewise, over patches, if it is trained; a frozen one has run before. An
    embedding is a lookup; norms, softmax and the optimizer are not counted, nor is what the
    backward pass computes again. Slots count as full: how much of them is padding only data tell.
    """
    batch, text = program.batch, program.model.text
    rows, length = batch.ids.shape
    head = 2 * text.embed * text.vocab * batch.mask.size
    forward, trained = float(head), float(_head_trained(program) * head)
    for path, shape in _matrices(program).items():
        if path.startswith("language/layers/"):
            cost = 2 * prod(shape) * rows * length
            forward += cost
            trained += cost * (path in program.trained)
    attention = 4 * text.layers * text.embed * _pairs(batch)
    language = 2 * forward + trained + 3 * attention
    return language + (_tower_flops(program, batch.vision) if batch.vision else 0.0)


def executed_flops(program: Program) -> float:
    """FLOPs of all matrix products that the update contains, those that are repeated included."""
    return products(program.update, program.state, program.batch)


def products(function: jax.stages.Wrapped, *arguments: Any) -> float:
    """FLOPs of all matrix products of a jitted function, called with arrays or their shapes.

    What nothing needs, such as the gradient of a frozen matrix, is left out, as XLA does. The last
    argument is a batch: its rows tell which blocks the TPU's attention visits.
    """
    jaxpr = function.trace(*arguments).jaxpr.jaxpr
    return _products(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], _Blocks(arguments[-1]))


def largest_arrays(program: Program, count: int) -> list[tuple[float, str, str]]:
    """The largest values inside the update, not yet cut or fused: (bytes, shape, made by)."""
    found: dict[str, tuple[float, str, str]] = {}
    todo = [program.update.trace(program.state, program.batch).jaxpr.jaxpr]
    while todo:
        jaxpr = todo.pop()
        for eqn in jaxpr.eqns:
            todo += [sub for value in eqn.params.values() for sub in _jaxprs(value)]
            for variable in eqn.outvars:
                aval: Any = variable.aval
                size = float(prod(aval.shape) * aval.dtype.itemsize)
                found.setdefault(aval.str_short(), (size, aval.str_short(), eqn.primitive.name))
    return sorted(found.values(), reverse=True)[:count]


def _head_trained(program: Program) -> bool:
    kernel = "embed/embedding" if program.model.tied else "head/kernel"
    return f"language/{kernel}" in program.trained


def _matrices(program: Program) -> dict[str, tuple[int, ...]]:
    flat = weights.flatten(program.state.params)
    return {
        path: leaf.shape for path, leaf in flat.items() if path.endswith(("kernel", "/a", "/b"))
    }


def _pairs(batch: Any) -> float:
    """Pairs of a query and a key in the rows: half the square of a causal row or slot, and the
    prompt for each token of a slot."""
    (rows, length), (_, n, completion) = batch.ids.shape, batch.mask.shape
    slots = 0 if batch.predictors is not None else n * completion
    prompt = length - slots
    return rows * (prompt**2 / 2 + slots * (prompt + completion / 2))


def _tower_flops(program: Program, images: Vision) -> float:
    vision = program.model.vision
    windows, slots = images.segments.shape[-2:]
    patches = images.segments.size
    forward = trained = 0.0
    for path, shape in _matrices(program).items():
        if path.startswith(TOWER):
            places = patches / vision.unit_patches if "/merger/" in path else patches
            forward += 2 * prod(shape) * places
            trained += 2 * prod(shape) * places * (path in program.trained)
    full = len(vision.full_attention)
    seen = full * windows * slots + (vision.depth - full) * slots
    return 2 * forward + trained + 3 * 4 * patches * seen * vision.embed


class _Blocks:
    """How many pairs of blocks splash attention visits, in rows of the language model."""

    def __init__(self, batch: Any):
        self._batch = batch

    @functools.cached_property
    def _language(self) -> tuple[int, int]:
        from vtriune_jax.models.kernels import splash  # half a second, only where it is used

        (_, tokens), (_, n, completion) = self._batch.ids.shape, self._batch.mask.shape
        slots = None if self._batch.predictors is not None or n == 1 else (n, completion)
        return splash.visited(tokens, causal=True, slots=slots)

    def visited(self, count: int) -> int:
        """Of rows of `count` blocks; where they are not the language model's, all pairs."""
        language, pairs = self._language
        return pairs if count == language else count**2


def _products(jaxpr: Jaxpr, blocks: _Blocks) -> float:
    """FLOPs of the matrix products of a jaxpr; the bodies of scans as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            (left, _), (out,) = _shapes(eqn.invars), _shapes(eqn.outvars)
            total += 2.0 * prod(out) * prod(left[axis] for axis in contracting)
        elif eqn.primitive.name in CUDNN:
            total += CUDNN[eqn.primitive.name] * _attention(eqn)
        times = _times(eqn, blocks)
        inner = [_products(sub, blocks) for value in eqn.params.values() for sub in _jaxprs(value)]
        total += times * (max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _attention(eqn: Any) -> float:
    """FLOPs of one of the products in cuDNN's attention, which skips what causality hides."""
    (rows, queries, heads, head_dim), (_, keys, *_) = _shapes(eqn.invars)[:2]
    share = 0.5 if "CAUSAL" in str(eqn.params["mask_type"]) else 1.0
    return 2.0 * rows * heads * head_dim * queries * keys * share


def _times(eqn: Any, blocks: _Blocks) -> int:
    """How often the body of an operation runs, on all devices together."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "shard_map":
            return eqn.params["mesh"].size
        case "pallas_call":
            grid, name = eqn.params["grid_mapping"].grid, str(eqn.params.get("name"))
            if name.startswith("splash"):  # a grid of all pairs, most of which are skipped
                *rows, first, second, last = grid  # queries and keys, or keys, heads and queries
                heads, count = (second, last) if "dkv" in name else (first, second)
                return prod(rows) * heads * blocks.visited(count)
            return prod(grid)
    return 1


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [variable.aval.shape for variable in variables]


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [sub for each in value for sub in _jaxprs(each)]
    return []
