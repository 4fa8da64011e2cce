"""The in-process sampler: each prompt is read once, its n completions are decoded together.

For tests, laptops and reference log-probs; a fleet of servers is for throughput. Completions are
the ids that were sampled, with their log-probs; nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from vtriune_jax import sharding
from vtriune_jax.errors import UserError
from vtriune_jax.models import KV, Qwen2_5_VL, merge
from vtriune_jax.models.layers import on_rows, whole
from vtriune_jax.models.pieces import split_rows
from vtriune_jax.rollout.choice import Sampling, next_token
from vtriune_jax.types import Completion, Group, Prompt


class LocalEngine:
    """Samples with the trainer's own parameters, in this process."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int],
        pad_id: int,
        decode_text: Callable[[Sequence[int]], str],
        mesh: Mesh | None = None,
        pieces: int = 1,
    ):
        """Take the model's structure, the ids that end or never enter a completion, and a decoder.

        `decode_text` makes the text for the verifiers; it is given the ids without the stop token.
        Rows are spread over the devices of a `mesh`, those of each process over its own. Prompts
        are completed in up to so many `pieces`, one after the other: all keys and values of one are
        in memory at once.
        """
        self._graphdef = graphdef
        self._ids = Ids(tuple(stop_ids), tuple(banned_ids), pad_id)
        self._decode_text = decode_text
        self._mesh = mesh
        self._pieces = pieces

    def generate(
        self,
        params: Any,
        prompts: Sequence[Prompt],
        features: Float[Array, "groups units embed"] | None,
        sampling: Sampling,
        keys: Key[Array, " groups"],
        prompt_tokens: int,
    ) -> list[Group]:
        """Draw `sampling.n` completions of every prompt.

        Prompts are padded on the left to `prompt_tokens`; `features` are their encoded images, row
        by row (None: text only). Of several processes each gives its own prompts and keys and gets
        their completions; the features are of the prompts of all. Compiles once per (groups, units,
        prompt_tokens, sampling). A completion depends on its prompt's key, its number and the
        prompt, not on the others. Raises UserError when a prompt is longer than `prompt_tokens`.
        """
        rows = len(prompts) * (jax.process_count() if self._mesh else 1)
        pieces = sharding.even_pieces(rows, self._mesh, self._pieces)
        groups: list[Any] = [None] * len(prompts)
        for k in range(pieces):
            own = slice(k, None, pieces)
            padded, mine = pad_prompts(prompts[own], self._ids.pad, prompt_tokens), keys[own]
            if self._mesh:
                data = np.asarray(jax.random.key_data(mine))
                padded, data = sharding.shard_rows((padded, data), self._mesh)
                mine = jax.random.wrap_key_data(data)
            with self._on_mesh():
                images = None if features is None else every(features, pieces, k)
                drawn = sample(self._graphdef, self._ids, sampling, params, padded, images, mine)
            drawn = sharding.local_rows(drawn, self._mesh) if self._mesh else jax.device_get(drawn)
            groups[own] = [
                Group(prompt, tuple(self._completion(drawn, row, i) for i in range(sampling.n)))
                for row, prompt in enumerate(prompts[own])
            ]
        return groups

    def _on_mesh(self) -> AbstractContextManager[Any]:
        """What `models` asks for, so that each device works on its own rows."""
        mesh = self._mesh
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else nullcontext()

    def _completion(self, drawn: Drawn, group: int, i: int) -> Completion:
        length = int(drawn.lengths[group, i])
        ids = np.asarray(drawn.ids[group, i, :length])
        stopped = bool(drawn.stopped[group, i])
        return Completion(
            ids=ids,
            logps=np.asarray(drawn.logps[group, i, :length]),
            text=self._decode_text((ids[:-1] if stopped else ids).tolist()),
            finish="stop" if stopped else "length",
        )


class Ids(NamedTuple):
    """Token ids with a meaning for the sampler."""

    stop: tuple[int, ...]
    banned: tuple[int, ...]
    pad: int


class PaddedPrompts(NamedTuple):
    """Prompts of one length, padded on the left."""

    ids: Int[Array, "groups tokens"]
    positions: Int[Array, "groups 3 tokens"]
    segments: Int[Array, "groups tokens"]
    image_index: Int[Array, "groups tokens"]


class Drawn(NamedTuple):
    """Sampled completions, padded on the right."""

    ids: Int[Array, "groups n completion"]
    logps: Float[Array, "groups n completion"]
    lengths: Int[Array, "groups n"]
    stopped: Bool[Array, "groups n"]


SHORT = 128
"""Tokens of completions whose keys and values get their whole length at once."""

Carry = tuple[Array, tuple[KV, ...], Drawn]
"""The number of the next token, the completions' keys and values, what was drawn so far."""


def pad_prompts(prompts: Sequence[Prompt], pad_id: int, tokens: int) -> PaddedPrompts:
    """Left-pad prompts to `tokens`; raises UserError naming the sample that is longer."""
    shape = (len(prompts), tokens)
    ids = np.full(shape, pad_id, np.int32)
    positions = np.zeros((len(prompts), 3, tokens), np.int32)
    segments = np.zeros(shape, np.int32)
    image_index = np.full(shape, -1, np.int32)
    for row, prompt in enumerate(prompts):
        start = tokens - len(prompt.ids)
        if start < 0:
            raise UserError(
                f"{prompt.sample.place}: the prompt has {len(prompt.ids)} tokens, more "
                f"than the {tokens} allowed; raise batch.prompt_tokens or drop the row"
            )
        ids[row, start:] = prompt.ids
        positions[row, :, start:] = prompt.positions
        segments[row, start:] = 1
        image_index[row, start:] = prompt.image_index
    return PaddedPrompts(*map(jnp.asarray, (ids, positions, segments, image_index)))


@partial(jax.jit, static_argnums=(1, 2))
def every(
    features: Float[Array, "groups units embed"], pieces: int, k: int
) -> Float[Array, "piece units embed"]:
    """The features of every `pieces`-th group from the k-th on, of each device's own."""
    return features if pieces == 1 else on_rows(split_rows(features, pieces)[k])


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample(
    graphdef: nnx.GraphDef,
    special: Ids,
    sampling: Sampling,
    params: Any,
    prompts: PaddedPrompts,
    features: Float[Array, "groups units embed"] | None,
    keys: Key[Array, " groups"],
) -> Drawn:
    """Prefill every prompt once, then decode all completions until each has stopped.

    Token t of completion i is drawn with the key fold_in(fold_in(prompt's key, i), t). Every token
    reads all the room that there is for keys and values, so this doubles while completions grow.
    """
    model: Qwen2_5_VL = merge(graphdef, params)
    groups, n, most = prompts.ids.shape[0], sampling.n, sampling.max_tokens
    hidden, prompt_kv = model.prefill(
        prompts.ids, prompts.positions, prompts.segments, features, prompts.image_index
    )
    head = whole(model.head().astype(hidden.dtype))
    layers = model.language.apart()
    stop_ids = jnp.asarray(special.stop, jnp.int32)
    first = prompts.positions[:, 0, -1:] + 1  # prompts end in text: one position for all axes
    keys = jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(n)))(keys)

    def draw(t: Array, hidden: Array, drawn: Drawn) -> Drawn:
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
        ids, logps = next_token(logits, keys, t, special.banned, sampling)
        ids = jnp.where(drawn.stopped, special.pad, ids)
        logps = jnp.where(drawn.stopped, 0.0, logps)
        return Drawn(
            ids=jax.lax.dynamic_update_index_in_dim(drawn.ids, ids, t, axis=2),
            logps=jax.lax.dynamic_update_index_in_dim(drawn.logps, logps, t, axis=2),
            lengths=drawn.lengths + ~drawn.stopped,
            stopped=drawn.stopped | jnp.isin(ids, stop_ids),
        )

    def unfinished(room: int, carry: Carry) -> Array:
        t, _, drawn = carry
        return (t < min(most, room + 1)) & ~drawn.stopped.all()

    def step(carry: Carry) -> Carry:
        t, own, drawn = carry
        last = jax.lax.dynamic_index_in_dim(drawn.ids, t - 1, axis=2, keepdims=False)
        positions = jnp.broadcast_to(first + t - 1, last.shape)
        hidden, own = model.decode(layers, last, positions, prompt_kv, prompts.segments, own, t - 1)
        return t + 1, own, draw(t, hidden, drawn)

    shape = (groups, n, most)
    nothing = Drawn(
        ids=jnp.full(shape, special.pad, jnp.int32),
        logps=jnp.zeros(shape),
        lengths=jnp.zeros(shape[:2], jnp.int32),
        stopped=jnp.zeros(shape[:2], bool),
    )
    start = jnp.zeros((), jnp.int32)
    at_prompt_end = jnp.broadcast_to(hidden[:, -1:], (groups, n, hidden.shape[-1]))
    _, kv_heads, head_dim, _ = prompt_kv[0].keys.shape
    rows, dtype = (groups, kv_heads, n), prompt_kv[0].keys.dtype
    empty = KV(jnp.zeros((*rows, head_dim, 0), dtype), jnp.zeros((*rows, 0, head_dim), dtype))
    carry = (start + 1, (empty,) * len(layers), draw(start, at_prompt_end, nothing))
    for room in rooms(most):
        t, own, drawn = carry
        carry = (t, tuple(_widened(kv, room) for kv in own), drawn)
        carry = jax.lax.while_loop(partial(unfinished, room), step, carry)
    return carry[2]


def rooms(most: int) -> list[int]:
    """How many tokens of a completion there is room for at first, and later; at last `most`.

    Three at most, each of which is compiled: more would save little.
    """
    found = [most]
    while found[0] > SHORT and len(found) < 3:
        found.insert(0, -(-found[0] // 2))
    return found


def _widened(kv: KV, room: int) -> KV:
    rows, more = [(0, 0)] * 3, (0, room - kv.keys.shape[-1])
    return KV(
        keys=jnp.pad(kv.keys, [*rows, (0, 0), more]),
        values=jnp.pad(kv.values, [*rows, more, (0, 0)]),
    )
