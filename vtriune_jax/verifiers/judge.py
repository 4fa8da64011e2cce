"""The wire of V-Triune's reward server: `POST /judge`, one completion per request.

    request    response, prompt, answer, solution, data_source, reward_verifier,
               reward_verifier_parm (strings; the last is itself a JSON document),
               format_ratio, accuracy_ratio (optional numbers)
    response   {"rewards": {"format_reward", "accuracy_reward", "reflection_reward",
               "final_reward", and for boxes 29 sub-scores}}, all floats

The same keys in both modes. With `compat` the numbers are the original's, whatever it does; else
they are our verifiers', any of which a request may name, and what cannot be judged has a fifth key
beside "rewards": "error", the reason. docs/vtriune_compat.md shows where the numbers differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from vtriune_jax.errors import UserError
from vtriune_jax.rewards.shaping import combine
from vtriune_jax.verifiers import compat as original
from vtriune_jax.verifiers import known_verifiers, load
from vtriune_jax.verifiers.item import with_defaults
from vtriune_jax.verifiers.result import checked
from vtriune_jax.verifiers.wire import named, nothing
from vtriune_jax.verifiers.worker import describe, guarded

_TEXTS = (
    "response",
    "prompt",
    "answer",
    "solution",
    "data_source",
    "reward_verifier",
    "reward_verifier_parm",
)
_RATIOS = {"accuracy_ratio": 1.0, "format_ratio": 0.1}


def judge(
    request: Mapping[str, Any], *, compat: bool, iou_threshold: str | float
) -> dict[str, Any]:
    """Request → response. Imports no JAX; SymPy may hang, so call it in a worker under a limit.

    Raises only for missing or ill-typed fields (`UserError`: HTTP 422). `iou_threshold` ("dynamic",
    "average", a number or such a number as text) is the server's default, which `iou_threshold` in
    the request's reward_verifier_parm overrides. For a request that ran into the time limit see
    `unjudged`.
    """
    request = _checked(request)
    if compat:
        return {"rewards": original.judge(request, iou_threshold)}
    rewards = guarded(_judge, request, iou_threshold)
    if isinstance(rewards, Exception):
        return unjudged(request, describe(rewards), compat=False)
    return {"rewards": rewards}


def unjudged(request: Mapping[str, Any], reason: str, *, compat: bool) -> dict[str, Any]:
    """The response when `judge` was killed. The original takes an overrun for a wrong answer."""
    if compat:
        return {"rewards": original.overrun(_checked(request))}
    return {"rewards": nothing(), "error": reason}


def _checked(request: Mapping[str, Any]) -> dict[str, Any]:
    if wrong := [name for name in _TEXTS if not isinstance(request.get(name), str)]:
        raise UserError(f"/judge: {', '.join(wrong)} must be given as strings")
    ratios = {}
    for name, default in _RATIOS.items():
        value = request.get(name)
        value = guarded(float, default if value is None else value)
        if isinstance(value, Exception) or not math.isfinite(value):
            raise UserError(f"/judge: {name}={request[name]!r} is no finite number")
        ratios[name] = value
    return {**request, **ratios}


def _judge(request: Mapping[str, Any], iou_threshold: str | float) -> dict[str, float]:
    """Our verifiers' parts under the original's names; raises when they cannot judge."""
    name = request["reward_verifier"]
    if name not in known_verifiers():
        raise ValueError(f"unknown verifier {name!r}; known are {', '.join(known_verifiers())}")
    params = json.loads(request["reward_verifier_parm"])
    if not isinstance(params, dict):
        raise ValueError(f"reward_verifier_parm is a {type(params).__name__}, expected an object")
    grid = [(height, width) for _, height, width in params.get("image_grid_thw") or ()]
    progress = (params.get("step") or 0) / (params.get("total_steps") or 1)
    params = with_defaults(params, {"iou_threshold": iou_threshold}) | {"grid": grid}
    asked = request["response"], request["solution"], params, progress
    parts = checked(load(name).verify(*asked))
    ratios = request["accuracy_ratio"], request["format_ratio"]
    if not (sum(ratios) > 0 and min(ratios) >= 0 and math.isfinite(sum(ratios))):
        raise ValueError(f"accuracy_ratio, format_ratio = {ratios}; expected ≥ 0 and not both 0")
    return named(parts, final=combine(parts["accuracy"], parts["format"], *ratios))
