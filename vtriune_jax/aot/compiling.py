"""A program compiled for devices that may be too small for it."""

from __future__ import annotations

import re
from typing import Any

import jax


def attempt(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, str]:
    """The program, or None and the compiler's complaint where it does not fit."""
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error)


def memory_of(compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Bytes on a device: of the arguments, of temporaries, and of all together."""
    analysis: Any = compiled.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    code = analysis.generated_code_size_in_bytes
    return {
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "bytes_per_device": arguments + temporary + results + code,
    }


def needed_bytes(trouble: str, arguments: int) -> int:
    """The bytes per device that the compiler's complaint tells of; 0 if it tells none.

    It knows two forms: of temporaries alone, and of the whole program.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern, more in (
        (r"HLO temporaries \(([\d.]+)([KMGT])\)", arguments),
        (r"Used ([\d.]+)([KMGT]) of", 0),
    ):
        if found := re.search(pattern, trouble):
            return int(float(found[1]) * units[found[2]]) + more
    return 0
