"""Compile the training step for devices that are not here; does it fit, and what does it cost?

    python -m vtriune_jax.compile --config=configs/orsta_7b.py --topology=v5p:2x2x4 --json=7b.json

--config=FILE, --config.KEY=VALUE   as for vtriune_jax.main
--topology=NAME      TPUs by type and shape (v5e:4x4, v5p:2x2x4, v6e:8x8, tpu7x:2x2x1); GPUs by
                     type and number (h100:8, h200:2x8, two machines of eight, a100:8); cpu:8, eight
                     pretended devices; or local, the devices of this machine
--num_slices=N       so many of that TPU topology, joined by the data-centre network; mesh.data must
                     be a multiple
--sampling           compile the vision tower and the in-process sampler, too: do they fit?
--json=FILE          write the numbers there (the keys are those of aot.estimate.Estimate)
--help               show this text

TPUs need the TPU compiler, not a TPU: pip install 'jax[tpu]', and GPUs that of CUDA, not a GPU: pip
install 'jax[cuda13]'. They get the flags that training gives them (commands.py, or the variables
LIBTPU_INIT_ARGS and XLA_FLAGS); a GPU is taken to give JAX 0.92 of its memory (the variable
XLA_PYTHON_CLIENT_MEM_FRACTION). What is compiled is the very `update` of the last stage of the
config (another may need more: --config.stages=sft is compiled by itself), with the batch that the
config describes; checkpoint and data need not be there. A step here is one call of it;
grpo.minibatches of them make a step of training.

What training holds beside the arguments of the update counts as memory, at most: the reference
model and image features.

The time is a lower bound: the slowest of matrix products, memory, links and links between slices,
each at its data-sheet peak, as if the others hid behind it. Every result counts as written once and
read once.

Exit status: 0 it fits, 1 it does not, 2 a mistake in the input (one line says which).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from vtriune_jax import config as configs
from vtriune_jax.commands import fill, tell_compilers
from vtriune_jax.errors import UserError
from vtriune_jax.main import split_overrides


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit status."""
    try:
        options, overrides = parse(argv)
        if options.help:
            print(__doc__)
            return 0
        config = configs.load(options.config, overrides)
        if options.json:
            _check_writable(Path(options.json))  # before the minutes of compiling
        found = run(
            options.config,
            config,
            options.topology,
            options.num_slices,
            sampling=options.sampling,
        )
        print(text(found))
        if options.json:
            _write(Path(options.json), asdict(found))
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if found.fits else 1


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, list[tuple[str, str]]]:
    """The flags, and the `--config.key=value` overrides in order. Raises UserError."""
    options = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=options)
    flags.DEFINE_string("topology", None, "", flag_values=options)
    flags.DEFINE_integer("num_slices", 1, "", lower_bound=1, flag_values=options)
    flags.DEFINE_bool("sampling", False, "", flag_values=options)
    flags.DEFINE_string("json", None, "", flag_values=options)
    flags.DEFINE_bool("help", False, "", flag_values=options, short_name="h")
    overrides, others = split_overrides(argv)
    fill(options, others, ("--config=configs/orsta_7b.py", "--topology=v5p:2x2x4"))
    return options, overrides


def run(
    name: str, config: Any, topology: str, num_slices: int = 1, *, sampling: bool = False
) -> Any:
    """The `aot.estimate.Estimate` of a checked config; before JAX has looked for devices."""
    from vtriune_jax.aot import topology as topologies

    tell_compilers()
    topologies.prepare(topology)
    from vtriune_jax import sharding
    from vtriune_jax.aot.estimate import estimate
    from vtriune_jax.aot.program import build

    found = topologies.get(topology, num_slices)
    mesh = sharding.make_mesh(**config.mesh, devices=found.devices)
    return estimate(name, config, build(config, mesh), found, mesh, sampling=sampling)


def text(found: Any) -> str:
    """The numbers as lines for people."""
    total, limit = found.bytes_per_device / 2**30, found.bytes_limit / 2**30
    verdict = f"fits, {1 - total / limit:.0%} free" if found.fits else "does NOT fit"
    slices = f" × {found.num_slices} slices" if found.num_slices > 1 else ""
    mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    *others, last = found.stages
    other = f"; {others[0]} by itself: --config.stages={others[0]}" if others else ""
    lines = [
        f"{found.config} on {found.topology}{slices}: {found.devices} devices, {mesh}",
        f"stage        {last}{other}",
        f"memory       {verdict}: {total:.2f} of {limit:.2f} GiB per device (arguments "
        f"{found.argument_bytes / 2**30:.2f}, temporaries {found.temp_bytes / 2**30:.2f}, held "
        f"beside them {found.held_bytes / 2**30:.2f})",
        f"work         {found.tokens_per_step:,} tokens, {found.model_flops_per_step:.3g} model "
        f"FLOPs, {found.executed_flops_per_step:.3g} executed, in one update",
    ]
    lines += [
        f"{name:12} {size / 2**30:.2f} GiB per device, with what lies beside it"
        for name, size in found.sampling_bytes_per_device.items()
    ]
    if found.seconds:
        kinds = ", ".join(f"{kind} {size / 1e9:.4g}" for kind, size in found.collectives.items())
        times = ", ".join(f"{name} {each:.4g} s" for name, each in found.seconds.items())
        lines += [
            f"traffic      GB per device: memory {found.memory_bytes_per_step / 1e9:.4g}, sent "
            f"{found.collective_bytes_per_step / 1e9:.4g}" + (f" ({kinds})" if kinds else ""),
            f"intensity    {found.arithmetic_intensity:.4g} FLOPs per byte of memory",
            f"bound        {found.estimated_step_seconds:.4g} s, MFU {found.estimated_mfu:.1%} at "
            f"most, if everything hides behind the slowest of {times}",
        ]
    elif found.fits:
        lines.append(
            "traffic      not known: jaxlib cannot read the program of this version of libtpu, "
            "pip install 'jax[tpu]'"
        )
    if not found.fits:
        lines.append("largest      " + "\n             ".join(map(_buffer, found.largest_buffers)))
        lines += [f"change       {hint}" for hint in found.advice]
    return "\n".join([*lines, f"compiled in  {found.compile_seconds:.0f} s"])


def _buffer(buffer: dict[str, Any]) -> str:
    return f"{buffer['bytes'] / 2**30:7.3f} GiB {buffer['shape']} {buffer['origin']}"


def _check_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"--json={path} cannot be written; give the name of a file in a folder that is there"
        )


def _write(path: Path, numbers: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
