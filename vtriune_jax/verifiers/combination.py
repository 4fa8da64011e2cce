"""Several verifiers for one completion.

    accuracy, format = Σ w·part / Σ w over the `verifiers` of the row

    "verifiers": [{"name": "exact", "weight": 2.0},
                  {"name": "json_format", "ground_truth": "", "params": {"schema": …}}]

`weight` is 1 unless given, `ground_truth` the row's; `params` are added to the row's. A JSON text
will do for the list. What each one reports is there as `<name>_<part>`; when one of them cannot
judge, neither can this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vtriune_jax.verifiers import checking, known_verifiers, load
from vtriune_jax.verifiers.checking import check_names, known
from vtriune_jax.verifiers.result import checked

_KEYS = {"name", "weight", "ground_truth", "params"}


def check(ground_truth: str, params: Mapping[str, Any]) -> None:
    """What is wrong with the list, or with one of its verifiers for every completion.

    The row's own parameters must be known to one of them.
    """
    listed, shared = _listed(params)
    understood = [known(one["name"]) for one in listed]
    if all(names is not None for names in understood):
        names = frozenset({"verifiers"}).union(*filter(None, understood))
        check_names(list(shared), names)
    for one in listed:
        own = {**shared, **one.get("params", {})}
        checking.check(one["name"], one.get("ground_truth", ground_truth), own, shared)


def verify(
    completion: str, ground_truth: str, params: Mapping[str, Any], progress: float
) -> dict[str, float]:
    """All parts of one completion; ValueError for a list of verifiers at fault."""
    listed, shared = _listed(params)
    sums, total = {"accuracy": 0.0, "format": 0.0}, 0.0
    reported: dict[str, float] = {}
    for one in listed:
        name, weight = one["name"], one.get("weight", 1.0)
        truth = one.get("ground_truth", ground_truth)
        own = {**shared, **one.get("params", {})}
        found = checked(load(name).verify(completion, truth, own, progress))
        reported |= {f"{name}_{part}": value for part, value in found.items()}
        sums = {part: value + weight * found[part] for part, value in sums.items()}
        total += weight
    return {part: value / total for part, value in sums.items()} | reported


def _listed(params: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    """The verifiers, and the parameters that the row has for all of them."""
    listed = params.get("verifiers")
    listed = json.loads(listed) if isinstance(listed, str) else listed
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise ValueError(f"verifiers={listed!r}; expected a list of objects")
    for one in listed:
        name, weight = one.get("name"), one.get("weight", 1.0)
        if name not in known_verifiers() or name == "combination" or set(one) - _KEYS:
            raise ValueError(
                f"verifiers holds {dict(one)!r}; expected {sorted(_KEYS)} with the name of another "
                f"verifier: {', '.join(known_verifiers())}"
            )
        if not (isinstance(weight, int | float) and weight >= 0):
            raise ValueError(f"verifiers: weight={weight!r} of {name}; expected a number ≥ 0")
    if not sum(one.get("weight", 1.0) for one in listed) > 0:
        raise ValueError("the weights of the verifiers sum to 0")
    return listed, {name: value for name, value in params.items() if name != "verifiers"}
