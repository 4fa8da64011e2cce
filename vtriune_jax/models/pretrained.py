"""Checkpoint folders in the Hugging Face layout: read a model, write a model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from vtriune_jax.errors import UserError
from vtriune_jax.models import weights, writing
from vtriune_jax.models.config import LoRAConfig, ModelConfig
from vtriune_jax.models.core import abstract, merge, split
from vtriune_jax.models.lora import fresh, is_adapter, merging
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL

MAX_SHARD_BYTES = 4 * 1024**3
PARAM_DTYPES = ("float32", "bfloat16")


def load_pretrained(
    path: str | Path,
    *,
    dtype: str = "float32",
    remat: str = "none",
    unroll: bool = False,
    attention: str = "auto",
    param_dtype: str = "float32",
    shardings: weights.Place | None = None,
    lora: LoRAConfig | None = None,
    seed: int = 0,
) -> Qwen2_5_VL:
    """Read a Hugging Face checkpoint folder (layouts: see `weights`).

    `remat`, `unroll` and `attention` are as in `ModelConfig`, `dtype` is of activations,
    `param_dtype` of the parameters, whatever the files have; training wants float32. `shardings`
    (path, shape) says where a parameter lies, by default on one device; the parameters go there
    tensor by tensor, and beside them the host never holds as much as twice the largest tensor of
    the files. The adapters that `lora` asks for are new, drawn with `seed`, and float32.

    Raises UserError naming the file and key that is missing, broken, left over or mis-shaped.
    """
    folder = Path(path)
    check_param_dtype(param_dtype)
    config = read_config(folder, dtype=dtype, remat=remat)
    config = replace(config, unroll=unroll, attention=attention, lora=lora)
    graphdef, tree = abstract(config)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(tree).items()}
    stored = {path: shape for path, shape in shapes.items() if not is_adapter(path)}
    adapters = {path: shape for path, shape in shapes.items() if is_adapter(path)}
    params = weights.read(folder, stored, jnp.dtype(param_dtype), shardings)
    return merge(graphdef, weights.unflatten(params | fresh(adapters, seed, shardings)))


def read_config(folder: Path, *, dtype: str = "float32", remat: str = "none") -> ModelConfig:
    """The `config.json` of a checkpoint folder. Raises UserError."""
    file = folder / "config.json"
    try:
        hf = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); expected a checkpoint") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again") from None
    try:
        return ModelConfig.from_hf(hf, dtype=dtype, remat=remat)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def save_pretrained(
    model: Qwen2_5_VL,
    path: str | Path,
    *,
    param_dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and safetensors in the hub's layout; see `save_params`."""
    flat = weights.flatten(split(model)[1])
    save_params(
        model.config,
        lambda name: jnp.asarray(flat[name]),
        path,
        param_dtype=param_dtype,
        max_shard_bytes=max_shard_bytes,
    )


def save_params(
    config: ModelConfig,
    fetch: Callable[[str], jax.Array],
    path: str | Path,
    *,
    param_dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and safetensors in the hub's layout, of parameters that `fetch` gives.

    `fetch` is called with every path of the model once, so that the parameters need not all be in
    memory; two tensors of a file are on the host at a time. Adapters go into the matrices that they
    adapt. Each file is replaced atomically, config.json last, when files of an earlier save in
    other shards are gone; other files of the folder (tokenizer, processor) stay. Raises UserError
    when the folder cannot be written.
    """
    check_param_dtype(param_dtype)
    folder = Path(path)
    shapes, fetch = _merged(config, fetch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            new = Path(temporary)
            names = writing.write(
                new,
                shapes,
                fetch,
                config.vision.patch_shape,
                jnp.dtype(param_dtype),
                max_shard_bytes,
            )
            (new / "config.json").write_text(config_text(config, param_dtype))
            for name in names:
                os.replace(new / name, folder / name)
            ours = [*folder.glob(weights.SHARDS), folder / weights.SINGLE, folder / weights.INDEX]
            for file in ours:
                if file.name not in names:
                    file.unlink(missing_ok=True)
            os.replace(new / "config.json", folder / "config.json")
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint {folder} ({error.strerror}); free space or choose "
            "another folder"
        ) from None


def give_params(
    config: ModelConfig, fetch: Callable[[str], jax.Array], *, param_dtype: str = "float32"
) -> None:
    """Takes part in another process's `save_params`, of parameters that lie on both."""
    shapes, fetch = _merged(config, fetch)
    wanted = writing.parts(shapes, config.vision.patch_shape)
    nowhere = {part.entry.key: "" for part in wanted}
    writing.write_files(Path(), wanted, nowhere, (), fetch, jnp.dtype(param_dtype))


def config_text(config: ModelConfig, param_dtype: str) -> str:
    """The `config.json` of a folder whose files have parameters of this dtype."""
    hf = config.to_hf_dict()
    hf["dtype"] = hf["text_config"]["dtype"] = param_dtype
    return json.dumps(hf, indent=2) + "\n"


def check_param_dtype(name: str) -> None:
    """UserError unless parameters can have this dtype."""
    if name not in PARAM_DTYPES:
        raise UserError(f"dtype={name!r} is unknown; choose {' or '.join(map(repr, PARAM_DTYPES))}")


def _merged(
    config: ModelConfig, fetch: Callable[[str], jax.Array]
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], jax.Array]]:
    """The shapes of a model's parameters without adapters, and what gives each with its adapter."""
    shapes = {name: leaf.shape for name, leaf in weights.flatten(abstract(config)[1]).items()}
    fetch = merging(fetch, shapes, config)
    return {name: shape for name, shape in shapes.items() if not is_adapter(name)}, fetch
