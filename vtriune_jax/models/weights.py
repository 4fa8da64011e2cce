"""Hugging Face safetensors ↔ our parameters: one table, read in both directions.

Files keep one tensor per layer, we keep all layers stacked. Files come in two layouts: the hub's
(`visual.*`, `model.*`, `lm_head.weight`), which is also what we write, and transformers 5's own
names (`model.visual.*`, `model.language_model.*`), which are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vtriune_jax.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-?????-of-?????.safetensors"

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


def read(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read float32 parameters of the given shapes from a folder, one tensor at a time.

    Raises UserError naming file and key when one is missing, left over or of another shape.
    """
    params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    with ExitStack() as stack:
        places = _open_all(folder, stack)
        if "language/head/kernel" not in shapes:
            places.pop("lm_head.weight", None)  # some tied checkpoints store the head all the same
        wanted = entries(shapes)
        if missing := [entry.key for entry in wanted if entry.key not in places]:
            raise UserError(
                f"{folder} has no tensor {missing[0]!r} ({len(missing)} missing in all); "
                "config.json and the safetensors files must belong together"
            )
        if extra := sorted(places.keys() - {entry.key for entry in wanted}):
            file, key = places[extra[0]][:2]
            raise UserError(
                f"{folder / file} has a tensor {key!r} that the model of config.json does not have "
                f"({len(extra)} such in all); config.json and weights must belong together"
            )
        for entry in wanted:
            file, key, handle = places[entry.key]
            target = params[entry.path]
            target = target if entry.layer is None else target[entry.layer]
            tensor = _to_ours(handle.get_tensor(key), entry.transform)
            if tensor.shape != target.shape:
                raise UserError(
                    f"{folder / file}: {key!r} becomes {tensor.shape} but config.json asks for "
                    f"{target.shape}; config.json and weights must belong together"
                )
            target[...] = tensor
    return params


def write(
    folder: Path,
    params: Mapping[str, Any],
    patch_shape: tuple[int, int, int, int],
    max_shard_bytes: int,
) -> list[str]:
    """Write the parameters in the hub's layout and return the names of the files.

    `patch_shape` is (channels, frames, rows, columns) of a patch, the kernel shape of the file's
    patch convolution. At most one shard is held in host memory.
    """
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries({path: value.shape for path, value in params.items()}):
        shape = params[entry.path].shape
        nbytes = 4 * int(np.prod(shape if entry.layer is None else shape[1:]))
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        tensors = {
            entry.key: _to_file(_slice(params[entry.path], entry.layer), entry, patch_shape)
            for entry in shard
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(4 * int(np.prod(value.shape)) for value in params.values())
        placed = {e.key: name for name, shard in zip(names, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
        names.append(INDEX)
    return names


def _slice(value: Any, layer: int | None) -> np.ndarray:
    return np.asarray(value if layer is None else value[layer], dtype=np.float32)


def _to_ours(tensor: np.ndarray, transform: str) -> np.ndarray:
    if transform == "flatten":  # [embed, channels, frames, rows, columns] → [patch, embed]
        tensor = tensor.reshape(len(tensor), -1)
    return tensor if transform == "same" else tensor.T


def _to_file(tensor: np.ndarray, entry: Entry, patch_shape: tuple[int, ...]) -> np.ndarray:
    tensor = tensor if entry.transform == "same" else tensor.T
    if entry.transform == "flatten":
        tensor = tensor.reshape(-1, *patch_shape)
    return np.ascontiguousarray(tensor)


def _open_all(folder: Path, stack: ExitStack) -> dict[str, tuple[str, str, Any]]:
    """Open the folder's safetensors files: hub key → (file, its own key, open file)."""
    places = {}
    for file in _files(folder):
        try:
            handle = stack.enter_context(safe_open(folder / file, framework="np"))
        except FileNotFoundError:
            raise UserError(f"{folder / file} is missing; copy the whole checkpoint") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / file} cannot be read ({error}); copy it again") from None
        places |= {_hub_key(key): (file, key, handle) for key in handle.keys()}  # noqa: SIM118
    return places


def _hub_key(key: str) -> str:
    for theirs, hubs in TRANSFORMERS_5:
        if key.startswith(theirs):
            return hubs + key.removeprefix(theirs)
    return key


def _files(folder: Path) -> Iterator[str]:
    if (folder / SINGLE).exists():
        return iter([SINGLE])
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}; expected a checkpoint folder")
    try:
        return iter(sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())))
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{folder / INDEX} is broken ({error!r}); copy it again") from None
