"""Hugging Face safetensors ↔ our parameters: one table, read in both directions.

Files keep one tensor per layer, we keep all layers stacked. Files come in two layouts: the hub's
(`visual.*`, `model.*`, `lm_head.weight`), which is also what we write, and transformers 5's own
names (`model.visual.*`, `model.language_model.*`), which are read as well.

Both directions go tensor by tensor: what a file holds is turned, cast and stacked on the devices,
so the host holds one tensor of a file at a time, or the part of it that its devices get.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from vtriune_jax.errors import UserError
from vtriune_jax.models import files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-?????-of-?????.safetensors"

OTHERS = ("*.bin", "*.safetensors", "*.pt", "*.pth", "*.gguf")
"""What a folder may have in place of the above."""

Place = Callable[[str, tuple[int, ...]], Sharding]
"""Path and shape of a parameter → where it lies on the devices."""

TABLE = (
    # our path, the hub's key (# is the layer), how a file's tensor becomes ours
    (r"visual/patch_embed/kernel", "visual.patch_embed.proj.weight", "flatten"),
    (r"visual/blocks/(norm[12])/scale", r"visual.blocks.#.\1.weight", "same"),
    (r"visual/blocks/attn/(qkv|proj)/kernel", r"visual.blocks.#.attn.\1.weight", "transpose"),
    (r"visual/blocks/attn/(qkv|proj)/bias", r"visual.blocks.#.attn.\1.bias", "same"),
    (r"visual/blocks/mlp/(\w+)/kernel", r"visual.blocks.#.mlp.\1_proj.weight", "transpose"),
    (r"visual/blocks/mlp/(\w+)/bias", r"visual.blocks.#.mlp.\1_proj.bias", "same"),
    (r"visual/merger/norm/scale", "visual.merger.ln_q.weight", "same"),
    (r"visual/merger/hidden/kernel", "visual.merger.mlp.0.weight", "transpose"),
    (r"visual/merger/hidden/bias", "visual.merger.mlp.0.bias", "same"),
    (r"visual/merger/out/kernel", "visual.merger.mlp.2.weight", "transpose"),
    (r"visual/merger/out/bias", "visual.merger.mlp.2.bias", "same"),
    (r"language/embed/embedding", "model.embed_tokens.weight", "same"),
    (r"language/layers/attn/(\w)/kernel", r"model.layers.#.self_attn.\1_proj.weight", "transpose"),
    (r"language/layers/attn/(\w)/bias", r"model.layers.#.self_attn.\1_proj.bias", "same"),
    (r"language/layers/mlp/(\w+)/kernel", r"model.layers.#.mlp.\1_proj.weight", "transpose"),
    (r"language/layers/attn_norm/scale", "model.layers.#.input_layernorm.weight", "same"),
    (r"language/layers/mlp_norm/scale", "model.layers.#.post_attention_layernorm.weight", "same"),
    (r"language/norm/scale", "model.norm.weight", "same"),
    (r"language/head/kernel", "lm_head.weight", "transpose"),
)

TRANSFORMERS_5 = (("model.visual.", "visual."), ("model.language_model.", "model."))


class Entry(NamedTuple):
    """One tensor of a file: its hub key, our parameter, the layer of it (None: not stacked)."""

    key: str
    path: str
    layer: int | None
    transform: str


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict of parameters as {joined path: leaf}."""
    flat = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def entries(shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
    """The tensors a checkpoint of these parameters consists of."""
    found = []
    for path, shape in shapes.items():
        template, transform = next(
            (match.expand(key), transform)
            for pattern, key, transform in TABLE
            if (match := re.fullmatch(pattern, path))
        )
        if "#" not in template:
            found.append(Entry(template, path, None, transform))
        else:
            found += [
                Entry(template.replace("#", str(layer)), path, layer, transform)
                for layer in range(shape[0])
            ]
    return found


def read(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
) -> dict[str, jax.Array]:
    """Read the parameters of the given shapes from a folder, tensor by tensor, onto the devices.

    `place` says where a parameter (path, shape) lies, None: on the default device. Of each tensor
    only the parts of this process's devices are read. All files and keys are checked before.

    Raises UserError naming file and key when one is missing, left over, of another shape or of a
    dtype that is no float of 16 or 32 bits.
    """
    fetch = reader(folder, shapes, dtype, place)
    return {path: fetch(path) for path in shapes}


def reader(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike = jnp.float32,
    place: Place | None = None,
) -> Callable[[str], jax.Array]:
    """The same for one parameter at a time: checks all, returns what reads the one of a path."""
    places = stored(folder)
    if "language/head/kernel" not in shapes:
        _drop_head(places)
    wanted = entries(shapes)
    _check(folder, places, wanted, shapes)
    writers = functools.cache(_writers)  # of this reader: compiled, they take memory

    def fetch(path: str) -> jax.Array:
        first, *others = entries({path: shapes[path]})
        where = place(path, shapes[path]) if place else _default_place()
        make, write_layer = writers(first.transform, where, np.dtype(dtype))
        layers = None if first.layer is None else shapes[path][0]
        # Tensors get no name here, by which they would live on beside the next one.
        param = _done(make(_place(places[first.key], first, where), layers))
        for entry in others:
            param = _done(write_layer(param, _place(places[entry.key], entry, where), entry.layer))
        return param

    return fetch


def _drop_head(places: dict[str, files.Tensor]) -> None:
    """Some tied checkpoints store the head all the same; UserError if it is another matrix."""
    head, embedding = places.pop("lm_head.weight", None), places.get("model.embed_tokens.weight")
    if head is None or embedding is None or files.equal(head, embedding):
        return
    raise UserError(
        f"{head.file}: {head.key!r} differs from {embedding.key!r}, which config.json makes the "
        "head too; set tie_word_embeddings to false there, or remove the tensor"
    )


def own_shape(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that one tensor of a file has as (a layer of) a parameter."""
    shape = shapes[entry.path]
    return shape if entry.layer is None else shape[1:]


def _check(
    folder: Path,
    places: Mapping[str, files.Tensor],
    wanted: list[Entry],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """UserError unless the folder has exactly the tensors that are wanted."""
    remedy = "config.json and weights must belong together"
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        remedy += f"; {INDEX} is not read beside {SINGLE}: remove the one that is out of date"
    if missing := [entry.key for entry in wanted if entry.key not in places]:
        raise UserError(
            f"{single if single.exists() else index} has no tensor {missing[0]!r} "
            f"({len(missing)} missing in all); {remedy}"
        )
    if extra := sorted(places.keys() - {entry.key for entry in wanted}):
        tensor = places[extra[0]]
        raise UserError(
            f"{tensor.file} has a tensor {tensor.key!r} that the model of config.json does not "
            f"have ({len(extra)} such in all); {remedy}"
        )
    for entry in wanted:
        tensor, own = places[entry.key], own_shape(entry, shapes)
        shape, asked = tensor.shape, own if entry.transform == "same" else own[::-1]
        if entry.transform == "flatten":  # [embed, channels, frames, rows, columns]
            shape = (*shape[:1], math.prod(shape[1:]))
        if shape != asked:
            raise UserError(
                f"{tensor.file}: {tensor.key!r} is of shape {tensor.shape} but config.json asks "
                f"for {asked}; {remedy}"
            )
        if tensor.dtype not in files.DTYPES:
            raise UserError(
                f"{tensor.file}: {tensor.key!r} is of dtype {tensor.dtype}; expected one of "
                f"{', '.join(files.DTYPES)}: quantized or wider weights must be turned into these"
            )


def stored(folder: Path) -> dict[str, files.Tensor]:
    """Hub key → tensor, of all files of a folder that agree with its index, if it has one."""
    listed = _listed(folder)
    places: dict[str, files.Tensor] = {}
    for name in sorted(set(listed.values())) or [SINGLE]:
        for tensor in files.contents(folder / name):
            key = _hub_key(tensor.key)
            if key in places:
                raise UserError(
                    f"{tensor.file} has the tensor {tensor.key!r}, and so has "
                    f"{places[key].file.name}; remove files of another checkpoint"
                )
            if listed and listed.pop(tensor.key, None) != name:
                raise UserError(
                    f"{folder / INDEX} does not say that {name} has the tensor {tensor.key!r}; "
                    "copy index and weights from one checkpoint"
                )
            places[key] = tensor
    if listed:
        key, name = next(iter(listed.items()))
        raise UserError(
            f"{folder / name} has no tensor {key!r}, where {INDEX} says it is ({len(listed)} such "
            "in all); copy index and weights from one checkpoint"
        )
    return places


def _listed(folder: Path) -> dict[str, str]:
    """Key → file as the index says; nothing if all is in one file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).exists():
        others = sorted(file.name for kind in OTHERS for file in folder.glob(kind))
        raise UserError(
            f"{folder} has neither {SINGLE} nor {INDEX}"
            + (f", only {others[0]}" if others else "")
            + "; expected a checkpoint folder with safetensors files"
        )
    try:
        listed = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        if not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("its weight_map must name a file for every tensor")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is broken ({error!r}); copy it again") from None
    return listed


def _hub_key(key: str) -> str:
    for theirs, hubs in TRANSFORMERS_5:
        if key.startswith(theirs):
            return hubs + key.removeprefix(theirs)
    return key


def _default_place() -> Sharding:
    return jnp.zeros(()).sharding


def _place(tensor: files.Tensor, entry: Entry, where: Sharding) -> jax.Array:
    """A tensor as the file has it, each device with the part that it needs."""
    if isinstance(where, NamedSharding):
        rank = len(tensor.shape)
        axes = where.spec if entry.layer is None else where.spec[1:]
        if entry.transform == "flatten":
            axes = (axes[1],)  # the other side is in the file as four: every device gets it all
        elif entry.transform == "transpose":
            axes = (*axes, *[None] * (rank - len(axes)))[::-1]
        where = NamedSharding(where.mesh, PartitionSpec(*axes))
    parts: dict[str, np.ndarray] = {}

    def read_once(index: Any) -> np.ndarray:  # several devices may have the same part
        name = str(index)
        if name not in parts:
            parts[name] = files.read(tensor, index)
        return parts[name]

    return jax.make_array_from_callback(tensor.shape, where, read_once)


def _writers(transform: str, where: Sharding, dtype: np.dtype) -> tuple[Callable, Callable]:
    """What makes a parameter of its first tensor, and what writes the layers after that one."""

    @functools.partial(jax.jit, static_argnums=1, out_shardings=where)
    def make(tensor: jax.Array, layers: int | None) -> jax.Array:
        own = _to_ours(tensor, transform).astype(dtype)
        return own if layers is None else jnp.zeros((layers, *own.shape), dtype).at[0].set(own)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=where)
    def write_layer(stack: jax.Array, tensor: jax.Array, layer: int) -> jax.Array:
        own = _to_ours(tensor, transform).astype(dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, own, layer, 0)

    return make, write_layer


def _done(param: jax.Array) -> jax.Array:
    """The same, when it is there: else the next tensor would be read beside this one."""
    param.block_until_ready()
    gc.collect(0)  # only then JAX lets go of the host arrays that it is done with
    return param


def _to_ours(tensor: jax.Array, transform: str) -> jax.Array:
    if transform == "flatten":  # [embed, channels, frames, rows, columns] → [patch, embed]
        tensor = tensor.reshape(len(tensor), -1)
    return tensor if transform == "same" else tensor.T
