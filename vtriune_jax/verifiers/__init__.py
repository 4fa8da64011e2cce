"""Verifiers: one file each in this folder, found by its name; the router calls them, the server
serves them.

A verifier judges a completion by a function `verify`:

    # vtriune_jax/verifiers/same.py — a row asks for it with reward_model.verifier = "same"
    def verify(completion, ground_truth, params, progress):
        answer = last_answer(completion)
        return {"accuracy": float(answer == ground_truth), "format": float(answer is not None)}

`params` are the row's `verifier_parm`, to which the router adds `grid`, the (height, width) of each
processed image. `verify` returns the parts of the reward as finite numbers, `accuracy` and `format`
of 0…1 among them, and raises when it cannot judge. The completion is then masked, not scored 0, and
so it is when it returns anything else. It runs under a time limit in a worker process without JAX,
so it may be slow, leak or hang.

A verifier that is fast on many completions defines `verify_batch(tasks)` as well, a task being the
four arguments of `verify` as a tuple: it returns the parts or an exception for each, and a worker
calls it for a whole chunk at once.

Two more are optional, and used at the start of a run (`checking`): `PARAMETERS`, the names of the
parameters that it knows, and `check(ground_truth, params)`, which raises when no completion could
be judged.

Another package adds its own by an entry point of the group `vtriune_jax.verifiers`, whose value is
the module: `same = "their_package.same"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

_DEFINES = re.compile(r"^def verify\(", re.MULTILINE)


@cache
def known_verifiers() -> Mapping[str, str]:
    """Name → module of every verifier of this package and of those that extend it.

    Files are searched, not imported: who only needs the names need not load SymPy. A name of ours
    cannot be taken by another package.
    """
    found = {entry.name: entry.value for entry in entry_points(group="vtriune_jax.verifiers")}
    for path in sorted(path for folder in __path__ for path in Path(folder).glob("[!_]*.py")):
        if _DEFINES.search(path.read_text("utf-8")):
            found[path.stem] = f"{__name__}.{path.stem}"
    return found


def load(name: str) -> ModuleType:
    """The module of a known verifier, imported; KeyError for an unknown name."""
    return import_module(known_verifiers()[name])
