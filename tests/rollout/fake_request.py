"""What the fake server reads from a request, and how it refuses: SGLang 0.5.21's rules."""

from __future__ import annotations

import json
from typing import Any

import orjson
from aiohttp import web

from tests.rollout.fake_models import Draw, Settings

SAMPLING = (
    "max_new_tokens stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty "
    "presence_penalty repetition_penalty min_new_tokens n json_schema regex ebnf structural_tag "
    "ignore_eos skip_special_tokens spaces_between_special_tokens no_stop_trim stream_interval "
    "logit_bias sampling_seed custom_params"
)


class Crash(Exception):
    """A bug of the real server, which it answers with 500."""


class Malformed(Exception):
    """A body that is not what the endpoint takes."""


def answer(content: Any, status: int = 200) -> web.Response:
    """JSON."""
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


async def json_of(request: web.Request) -> dict[str, Any]:
    """The body as a dict; Malformed without one."""
    raw = await request.read()
    try:
        body = json.loads(raw) if raw else None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        kind = "dataclass_type" if raw else "missing"
        raise Malformed(f"1 validation error:\n  {{'type': '{kind}', 'loc': ('body',)}}")
    return body


def malformed(error: Malformed) -> web.Response:
    """As FastAPI's validation errors look there."""
    content = {"object": "error", "message": str(error), "type": "Bad Request", "param": None}
    return answer(content | {"code": 400}, 400)


def draws_of(body: dict[str, Any], count: int, settings: Settings) -> tuple[list[Draw], int, int]:
    """(how each of `count` prompts is drawn, n, tokens between streamed chunks)."""
    given = body.get("sampling_params") or {}
    each = given if isinstance(given, list) else [given] * count
    draws = []
    for params in each:
        if set(params) - set(SAMPLING.split()):
            raise Crash
        temperature = params.get("temperature", 1.0)
        if temperature < 0:
            raise ValueError(
                f"temperature must be a non-negative finite number, got {temperature}."
            )
        if not 0 < params.get("top_p", 1.0) <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {params['top_p']}.")
        bias = {int(i): float(value) for i, value in (params.get("logit_bias") or {}).items()}
        for i in bias:
            if not 0 <= i < settings.vocab:
                raise ValueError(f"logit_bias must has keys in [0, {settings.vocab - 1}], got {i}.")
        stop = frozenset(params.get("stop_token_ids") or ())
        if not params.get("ignore_eos"):
            stop |= settings.eos
        draws.append(
            Draw(
                max_new_tokens=params.get("max_new_tokens", 128),
                temperature=0.0 if params.get("top_k") == 1 else temperature,
                stop=stop,
                bias=tuple(sorted(bias.items())),
            )
        )
    numbers = {params.get("n", 1) for params in each}
    if len(numbers) > 1:
        raise ValueError(
            "The parallel_sample_num should be the same for all samples in sample params."
        )
    return draws, numbers.pop(), each[0].get("stream_interval") or 1


def images_of(data: Any, prompts: int, single: bool) -> list[list[str]]:
    """The images of each prompt: a single one's are a list; those of n > 1 count as a batch."""
    if not data:
        return [[]] * prompts
    if not isinstance(data, list):
        return [[data]] * prompts
    if single:
        return [data]
    if len(data) != prompts:
        raise ValueError("The length of image_data should be equal to the batch size.")
    return [each if isinstance(each, list) else [each] for each in data]
