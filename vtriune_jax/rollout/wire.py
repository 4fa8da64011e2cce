"""SGLang's /generate: the body of a request, and what its answers mean. No I/O.

One request holds the open completions of one prompt. The answer is streamed, one chunk with the
first token of each completion, which tells the id to abort it by, and one at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import orjson
import pybase64

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.types import Completion, Prompt

BAN = -1e9
"""Added to the logits of banned ids: their probability is 0 in float32, as it is in training."""
_NEVER = 2**30
"""Tokens between two chunks of a stream, when only the first and the last are wanted."""


class WrongAnswer(Exception):
    """A server answered something that cannot be right."""


class WrongPrompt(WrongAnswer):
    """A server read the prompt otherwise than the trainer."""


@dataclass(frozen=True)
class WirePrompt:
    """A prompt as the server takes it."""

    ids: list[int]
    """With one placeholder per image: the server expands them."""
    images: list[orjson.Fragment]
    """Base64, as JSON: a picture is a long text, not to be copied and searched for what JSON
    escapes."""
    tokens: int
    """As the trainer counts them, with all placeholders."""


def wire_prompt(
    prompt: Prompt, image_id: int, pictures: Callable[[Prompt], Sequence[bytes]]
) -> WirePrompt:
    """Leave one placeholder of each image's run; `pictures` gives the encoded images."""
    pads = np.flatnonzero(prompt.ids == image_id)
    kept = np.ones(len(prompt.ids), bool)
    kept[pads] = False
    images = len(prompt.grid_thw)
    if images:
        areas = prompt.grid_thw.prod(axis=1)
        units = areas * len(pads) // areas.sum()
        kept[pads[np.cumsum([0, *units[:-1]])]] = True
    encoded = [pybase64.b64encode(data) for data in pictures(prompt)] if images else []
    texts = [orjson.Fragment(b'"%b"' % text) for text in encoded]
    return WirePrompt(prompt.ids[kept].tolist(), texts, len(prompt.ids))


def check_sampling(sampling: Sampling) -> None:
    """UserError unless log-probs will be those of the distribution that was sampled from."""
    if sampling.top_p != 1 or sampling.top_k != 0:
        raise UserError(
            f"sampling with top_p={sampling.top_p:g}, top_k={sampling.top_k}: a server's log-probs "
            "are those before such a choice; leave top_p at 1 and top_k at 0"
        )
    if sampling.temperature < 0 or (sampling.temperature == 0 and sampling.n > 1):
        raise UserError(
            f"sampling with temperature={sampling.temperature:g}, n={sampling.n}: completions "
            "would be all the same; choose a temperature above 0 (0 is for evaluations, with n=1)"
        )


def request_body(
    rid: str,
    prompt: WirePrompt,
    begun: Sequence[np.ndarray],
    sampling: Sampling,
    stop_ids: Sequence[int],
    banned_ids: Sequence[int],
) -> bytes:
    """One completion more for each of `begun`, which holds the ids that they have already.

    Images go once, unless several of a prompt are to be continued: then the server wants them
    with each.
    """
    params = {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "stop_token_ids": list(stop_ids),
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "stream_interval": _NEVER,
        "logit_bias": {str(i): BAN for i in banned_ids},
    }
    if not any(len(ids) for ids in begun):
        n, prompts, limits = len(begun), [prompt.ids], [sampling.max_tokens]
    else:
        n, prompts = 1, [prompt.ids + ids.tolist() for ids in begun]
        limits = [sampling.max_tokens - len(ids) for ids in begun]
    images: Any = [prompt.images] * len(prompts)
    if len(prompt.images) == 1:
        images = prompt.images[0]  # for all of them
    return orjson.dumps(
        {
            "rid": [f"{rid}-{k}" for k in range(len(prompts))],
            "input_ids": prompts,
            "image_data": images if prompt.images else None,
            "sampling_params": [{**params, "n": n, "max_new_tokens": most} for most in limits],
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": True,
        }
    )


def split_events(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Server-sent events → (the JSON of those that are whole, the rest)."""
    *events, rest = buffer.split(b"\n\n")
    return [event.removeprefix(b"data: ") for event in events if event != b"data: [DONE]"], rest


def completion(output: Mapping[str, Any], prompt_tokens: int, max_tokens: int) -> Completion:
    """The last chunk of a completion, without its text.

    Raises WrongAnswer if ids and log-probs do not belong together, if a stop token is missing or
    if there are too many tokens; WrongPrompt if the prompt had another length than `prompt_tokens`.
    """
    try:
        meta, ids = output["meta_info"], np.array(output["output_ids"], np.int32)
        said = meta.get("output_token_logprobs") or []
        logps = np.array([entry[0] for entry in said], np.float32)
        same = np.array([entry[1] for entry in said], np.int32)
        finish, found = meta["finish_reason"], meta.get("prompt_tokens", prompt_tokens)
        versions = tuple(
            (span["version"], span["start"], span["end"])
            for span in meta.get("weight_versions", ())
            if span["end"] > span["start"]
        )
        kind, matched = finish["type"], finish.get("matched")
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise WrongAnswer(f"cannot be read ({type(error).__name__}: {error})") from error
    if found != prompt_tokens:
        raise WrongPrompt(f"counted {found} tokens in a prompt of {prompt_tokens}")
    if not np.array_equal(ids, same):
        raise WrongAnswer(f"log-probs of {len(same)} tokens, which are not the {len(ids)} drawn")
    if not (np.isfinite(logps) & (logps < 1e-3)).all():
        raise WrongAnswer(f"log-probs from {logps.min()} to {logps.max()}")
    if len(ids) > max_tokens:
        raise WrongAnswer(f"{len(ids)} tokens where {max_tokens} were the most")
    if kind not in ("stop", "length", "abort"):
        raise WrongAnswer(f"a finish reason {kind!r}")
    if kind == "stop" and (not len(ids) or matched != ids[-1]):
        raise WrongAnswer(f"stopped by {matched!r}, which is not the last token")
    if kind != "abort" and not len(ids):
        raise WrongAnswer("no token")
    if not versions and len(ids) and "weight_version" in meta:
        versions = ((meta["weight_version"], 0, len(ids)),)
    ends = [0, *(end for _, _, end in versions)]
    if versions and (ends[-1] != len(ids) or ends[:-1] != [start for _, start, _ in versions]):
        raise WrongAnswer(f"weight versions of {versions} for {len(ids)} tokens")
    return Completion(ids, logps, "", kind, versions)


def joined(first: Completion, more: Completion) -> Completion:
    """A completion and its continuation."""
    start = len(first.ids)
    spans = [*first.versions, *((v, start + a, start + b) for v, a, b in more.versions)]
    merged: list[tuple[str | int, int, int]] = []
    for version, begin, end in spans:
        if merged and merged[-1][0] == version:
            begin = merged.pop()[1]
        merged.append((version, begin, end))
    return replace(
        more,
        ids=np.concatenate([first.ids, more.ids]),
        logps=np.concatenate([first.logps, more.logps]),
        versions=tuple(merged),
    )


def without_banned(drawn: Completion, banned_ids: Sequence[int]) -> tuple[Completion, bool]:
    """Cut off from the first banned id on, as if the length had been reached; whether it was so."""
    hits = np.flatnonzero((drawn.ids[:, None] == np.array(banned_ids, np.int32)).any(axis=1))
    if not len(hits):
        return drawn, False
    end = int(hits[0])
    versions = tuple((v, a, min(b, end)) for v, a, b in drawn.versions if a < end)
    finish: Literal["length"] = "length"
    cut = replace(
        drawn, ids=drawn.ids[:end], logps=drawn.logps[:end], finish=finish, versions=versions
    )
    return cut, True
