"""Verifiers: one file each in this folder, found by its name; the router calls them, the server
serves them.

A verifier judges a completion by a function `verify`:

    # vtriune_jax/verifiers/exact.py — a row asks for it with reward_model.verifier = "exact"
    def verify(completion, ground_truth, params, progress):
        answer = last_answer(completion)
        return {"accuracy": float(answer == ground_truth), "format": float(answer is not None)}

It returns the parts of the reward, `accuracy` and `format` among them, and raises when it cannot
judge (the completion is then masked, not scored 0). It runs under a time limit in a worker process
without JAX, so it may be slow, leak or hang. A verifier that is fast only on whole batches defines
`verify_batch(items) -> list of parts or exceptions` instead, and runs in the router's own process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

_DEFINES = re.compile(r"^def (verify|verify_batch)\(", re.MULTILINE)


@cache
def known_verifiers() -> Mapping[str, Literal["verify", "verify_batch"]]:
    """Name → the function that it defines, for every verifier of this package.

    The files are searched, not imported: who only needs the names need not load SymPy or JAX.
    """
    found = {}
    for path in sorted(path for folder in __path__ for path in Path(folder).glob("[!_]*.py")):
        if match := _DEFINES.search(path.read_text("utf-8")):
            found[path.stem] = match[1]
    return found
