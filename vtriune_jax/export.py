"""Export: python -m vtriune_jax.export --checkpoint=runs/quickstart --out=exported

--checkpoint=FOLDER   the --workdir of a run, finished or not
--out=FOLDER          where the model goes in the Hugging Face layout; must not exist, or be empty
--stage=NAME          of which stage (default: the last one that has a checkpoint)
--step=N              of which of its steps (default: the newest)
--dtype=NAME          float32 (default), which is exact, or bfloat16
--help                show this text

The folder has weights, config, tokenizer, image processor and generation config, the processor with
the run's limits of pixels (data.min_pixels and max_pixels). It appears when it is complete; one
that a kill left half done is hidden beside it and replaced by the next export. Parameters are read
one at a time, each spread over this machine's devices.

Exit status: 0 done, 2 a mistake in the input (one line says which).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import NamedSharding

from vtriune_jax import sharding
from vtriune_jax.checkpoint import read_params
from vtriune_jax.commands import fill
from vtriune_jax.config import STARTED_IN
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, abstract, lora, pretrained, weights
from vtriune_jax.workdir import is_of_a_run, saved_steps

PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""What an image processor's limits of pixels are called, and what they are called in its `size`."""


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    try:
        options = parse(argv)
        if options.help:
            print(__doc__)
            return 0
        where = export(
            Path(options.checkpoint).expanduser(),
            Path(options.out).expanduser(),
            stage=options.stage,
            step=options.step,
            dtype=options.dtype,
        )
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.out} has the model of {where}")
    return 0


def parse(argv: Sequence[str]) -> flags.FlagValues:
    """The flags. Raises UserError."""
    options = flags.FlagValues()
    for name in ("checkpoint", "out", "stage"):
        flags.DEFINE_string(name, None, "", flag_values=options)
    flags.DEFINE_integer("step", None, "", flag_values=options)
    flags.DEFINE_string("dtype", "float32", "", flag_values=options)
    flags.DEFINE_bool("help", False, "", flag_values=options, short_name="h")
    fill(options, argv, ("--checkpoint=runs/NAME", "--out=FOLDER"))
    return options


def export(
    workdir: Path,
    out: Path,
    *,
    stage: str | None = None,
    step: int | None = None,
    dtype: str = "float32",
) -> str:
    """Writes the model of a run's checkpoint to `out` and returns which one it was, in words.

    Raises:
      UserError: no such run or checkpoint, one of another model, or a folder that has files.
    """
    pretrained.check_param_dtype(dtype)
    check_free(out)
    run = _run_config(workdir)
    source = _source(workdir, run)
    keys = run["model"].get("lora", {"rank": 0})
    config = replace(pretrained.read_config(source), lora=lora.from_keys(keys))
    folder, step = _find(workdir, run["stages"], stage, step)
    shapes = {p: leaf.shape for p, leaf in weights.flatten(abstract(config)[1]).items()}
    mesh = sharding.make_mesh()

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, sharding.spec(path, shape, mesh))

    saved = {p: shape for p, shape in shapes.items() if lora.is_adapter(p)} or shapes
    fetch = read_params(folder, step, saved, place)
    if config.lora:
        base = {p: shape for p, shape in shapes.items() if p not in saved}
        unchanged = weights.reader(source, base, jnp.dtype(keys["base_dtype"]), place)
        fetch = _either(fetch, saved, unchanged)
    write_folder(out, source, config, fetch, run.get("data", {}), param_dtype=dtype)
    return f"{folder.name} step {step}, as {dtype}"


def write_folder(
    out: Path,
    source: Path,
    config: ModelConfig,
    fetch: Callable[[str], jax.Array],
    limits: Mapping[str, Any],
    *,
    param_dtype: str = "float32",
    replace: bool = False,
) -> None:
    """Writes a model with the processor of the checkpoint folder `source`, whole or not at all.

    `fetch` gives the parameter of a path (see `models.pretrained.save_params`). The processor gets
    the `min_pixels` and `max_pixels` of `limits`, but for those that are None. An earlier folder
    gives way only if `replace` says so, or if it is empty, and comes back if that fails; after a
    kill the next call brings it back.

    Raises:
      UserError: the folder is there already or cannot be written.
    """
    out = Path(os.path.realpath(out))  # a link, say to a larger disk, stays one
    scratch, old = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "old"))
    try:
        _bring_back(old, out)
        if not replace:
            check_free(out)
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)
        pretrained.save_params(config, fetch, scratch, param_dtype=param_dtype)
        copy_processor(source, scratch, limits)
        if not (scratch / "generation_config.json").exists():
            text = json.dumps(generation_config(config), indent=2)
            (scratch / "generation_config.json").write_text(text + "\n")
        if out.exists():
            out.rename(old)
        try:
            scratch.rename(out)
        finally:
            _bring_back(old, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _bring_back(old: Path, out: Path) -> None:
    """Gives the earlier folder its name again where nothing has taken that."""
    if old.exists() and not out.exists():
        old.rename(out)


def check_free(out: Path) -> None:
    """UserError unless a folder can appear at `out`."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another, or remove it")


def copy_processor(source: Path, target: Path, limits: Mapping[str, Any]) -> None:
    """Copies the files of tokenizer, image processor and generation; `limits`: `write_folder`."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    given = {name: limits[name] for name in EDGES if limits.get(name) is not None}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if given and (target / name).is_file():
            _limit(target / name, given)


def _limit(file: Path, given: Mapping[str, int]) -> None:
    """Puts limits of pixels into an image processor's settings, in both ways to say them."""
    settings = json.loads(file.read_text())
    images = settings.get("image_processor")  # of a whole processor's
    if file.name == "preprocessor_config.json":
        images = settings
    if images is None:
        return
    images.update(given)
    if isinstance(images.get("size"), dict):
        images["size"].update({EDGES[name]: value for name, value in given.items()})
    file.write_text(json.dumps(settings, indent=2) + "\n")


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """What `generate` must know of a model: the tokens that begin, end and pad a text."""
    text = config.text
    ids = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _run_config(workdir: Path) -> dict[str, Any]:
    """The settings of a run as `workdir.record` wrote them."""
    file = workdir / "config.json"
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {file} ({error.strerror}); --checkpoint takes the --workdir of a run"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again") from None
    if not is_of_a_run(found):
        raise UserError(f"{file} is not of a run; --checkpoint takes the --workdir of a run")
    return found


def _source(workdir: Path, run: dict[str, Any]) -> Path:
    """The checkpoint folder that a run started from; a relative one is of where it was started."""
    if not run["model"]["path"]:
        return workdir / "model"
    path = Path(run["model"]["path"]).expanduser()
    first = Path(run.get(STARTED_IN, "")) / path
    for folder in (first, path):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{first} is no folder, and {workdir / 'config.json'} has model.path={str(path)!r}; "
        "export from the folder in which the run was started, or put the right path in that file"
    )


def _either(
    saved: Callable[[str], jax.Array], paths: Container[str], other: Callable[[str], jax.Array]
) -> Callable[[str], jax.Array]:
    """What reads the given paths by one function and all else by the other."""
    return lambda path: (saved if path in paths else other)(path)


def _find(
    workdir: Path, stages: Sequence[str], stage: str | None, step: int | None
) -> tuple[Path, int]:
    """The folder of a stage's checkpoints, and which step of it."""
    found = {name: saved_steps(workdir / "checkpoints" / name) for name in stages}
    held = [name for name in stages if found[name]]
    if not held:
        raise UserError(f"{workdir}/checkpoints has no checkpoint of {' or '.join(stages)} yet")
    stage = stage or held[-1]
    if stage not in held:
        raise UserError(f"{workdir} has no checkpoint of --stage={stage}, only of {held}")
    if step is None:
        step = found[stage][-1]
    if step not in found[stage]:
        raise UserError(f"{workdir} has no checkpoint --step={step} of {stage}: {found[stage]}")
    return workdir / "checkpoints" / stage, step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
