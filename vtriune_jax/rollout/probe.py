"""Whether a server has the trainer's model: log-probs of fixed tokens, by both.

    gap[t] = |log p_server(token t | prompt, tokens before) − log p_trainer(…)|

The tokens belong to a few fixed prompts, some with images, and are read by the server as a part of
the prompt, so that both sides judge the same ones, at temperature 1 (SGLang applies none there).
What training would otherwise hide, and importance sampling paint over: old weights, old image
features, another dtype, another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.servers import Server
from vtriune_jax.rollout.trouble import ServerError
from vtriune_jax.rollout.wire import WirePrompt, wire_prompt
from vtriune_jax.types import Group, Prompt

Logps = Callable[[Any], Sequence[np.ndarray]]
"""Parameters → log-probs of the tokens of every group's completion, at temperature 1."""
_SHOWN = 8
"""Tokens in a report, those of the widest gaps."""


@dataclass(frozen=True)
class Expected:
    """What the trainer says of the tokens, group by group."""

    version: str
    logps: tuple[np.ndarray, ...]
    before: Expected | None = None
    """The same of the version before, to recognise it."""


@dataclass(frozen=True)
class Finding:
    """What a server says of the tokens, beside what it should."""

    server: Server
    expected: Expected
    logps: tuple[np.ndarray, ...]

    @property
    def gaps(self) -> tuple[np.ndarray, ...]:
        """|server − trainer|, token by token, for every group."""
        return differences(self.logps, self.expected)


class Probe:
    """Fixed prompts with fixed completions, and how far off a server may be."""

    def __init__(
        self,
        groups: Sequence[Group],
        logps: Logps,
        *,
        image_id: int,
        pictures: Callable[[Prompt], Sequence[bytes]],
        limit: float,
        timeout: float = 60.0,
    ):
        """The tokens are those of each group's first completion.

        `image_id` and `pictures` are as in `SGLangEngine`. `limit` is the largest mean gap of a
        prompt's tokens: about 0.05 where the server computes in bfloat16, 0.001 in float32.
        `timeout` is in seconds, for each request. Raises UserError without tokens to look at.
        """
        if not groups or not all(len(group.completions[0].ids) for group in groups):
            raise UserError("the probe of the rollout servers has no tokens; give it completions")
        self._logps, self._limit, self._timeout = logps, limit, timeout
        self._groups = tuple(groups)
        self._prompts = [wire_prompt(group.prompt, image_id, pictures) for group in groups]
        self._tokens = [group.completions[0].ids for group in groups]

    def expect(self, params: Any, version: str, before: Expected | None) -> Expected:
        """What servers should say when they have these parameters; all processes call it."""
        found = tuple(np.asarray(each, np.float64) for each in self._logps(params))
        return Expected(version, found, before and Expected(before.version, before.logps))

    async def ask(self, fleet: Fleet, server: Server, expected: Expected) -> Finding:
        """A coroutine of the fleet's loop. Raises one of TROUBLE."""
        found = []
        for prompt, tokens in zip(self._prompts, self._tokens, strict=True):
            body = {
                "input_ids": [*prompt.ids, *tokens.tolist()],
                "image_data": prompt.images or None,
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": prompt.tokens - 1,
            }
            answer = await fleet.post(server, "/generate", body, admin=False, timeout=self._timeout)
            found.append(read_answer(answer, prompt, tokens, expected.version))
        return Finding(server, expected, tuple(found))

    def is_off(self, finding: Finding) -> bool:
        """Whether a prompt's gap is beyond the limit."""
        return any(not gap.mean() <= self._limit for gap in finding.gaps)

    def metrics(self, findings: Sequence[Finding]) -> dict[str, float]:
        """Mean and largest gap, of all servers and of each."""
        record: dict[str, float] = {}
        for finding in findings:
            gaps = np.concatenate(finding.gaps)
            name = finding.server.address.split("//")[-1]
            record[f"sync/logp_gap/{name}"] = float(gaps.mean())
            record[f"sync/logp_gap_max/{name}"] = float(gaps.max())
        if findings:
            gaps = np.concatenate([gap for finding in findings for gap in finding.gaps])
            record |= {"sync/logp_gap": float(gaps.mean()), "sync/logp_gap_max": float(gaps.max())}
        return record

    def report(self, finding: Finding) -> str:
        """What is wrong with a server: the worst prompt's tokens, and likely causes."""
        means = [float(gap.mean()) for gap in finding.gaps]
        worst = int(np.argmax(np.nan_to_num(means, nan=np.inf)))
        group, gaps = self._groups[worst], finding.gaps[worst]
        sample = group.prompt.sample
        rows = [
            f"token {at} (id {self._tokens[worst][at]}): "
            f"{finding.logps[worst][at]:.4f} − {finding.expected.logps[worst][at]:.4f}"
            f" → {gaps[at]:.4f}"
            for at in sorted(np.argsort(-gaps, kind="stable")[:_SHOWN])
        ]
        images = [len(each.prompt.grid_thw) > 0 for each in self._groups]
        listed = ", ".join(
            f"{each.prompt.sample.id}{' (image)' if image else ''} {mean:.4f}"
            for each, image, mean in zip(self._groups, images, means, strict=True)
        )
        return "\n".join(
            [
                f"{finding.server.address} does not have the trainer's model after the update to "
                f"version {finding.expected.version}: its log-probs are off by {means[worst]:.4f} "
                f"in the mean of prompt {sample.id!r} of {sample.data_source!r}, more than "
                f"{self._limit:g};",
                f"mean gap by prompt: {listed};",
                "server − trainer → gap, where it is widest:",
                *[f"  {row};" for row in rows],
                f"likely: {causes(finding, images, self._limit)}",
            ]
        )


def read_answer(
    answer: Mapping[str, Any], prompt: WirePrompt, tokens: np.ndarray, version: str
) -> np.ndarray:
    """The log-probs of the tokens. ServerError if the answer is of anything else.

    The first entry is of the token before them, and has no log-prob.
    """
    try:
        meta = answer["meta_info"]
        count, had = meta["prompt_tokens"], meta["weight_version"]
        _, *entries = meta["input_token_logprobs"]
        found = np.array([entry[0] for entry in entries], np.float64)
        ids = np.array([entry[1] for entry in entries], np.int64)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ServerError(f"the probe cannot read the answer ({error!r})") from None
    if had != version:
        raise ServerError(f"answered the probe with weights {had!r}, not {version!r}")
    if count != prompt.tokens + len(tokens):
        raise ServerError(
            f"counts {count} tokens in a probe of {prompt.tokens + len(tokens)}: it resizes images "
            "otherwise, or has another tokenizer"
        )
    # SGLang shows the last id of the vocabulary, like those of images, as 0.
    if len(ids) != len(tokens) or not ((ids == tokens) | (ids == 0)).all():
        raise ServerError(f"answered the probe with log-probs of {ids.tolist()}, not of its tokens")
    return found


def differences(logps: Sequence[np.ndarray], expected: Expected) -> tuple[np.ndarray, ...]:
    """|server − expected|, token by token, for every group."""
    return tuple(np.abs(own - want) for own, want in zip(logps, expected.logps, strict=True))


def causes(finding: Finding, images: Sequence[bool], limit: float) -> str:
    """What the pattern of the gaps speaks for."""
    off = [not gap.mean() <= limit for gap in finding.gaps]
    old, found = finding.expected.before, []
    if not any(wrong for wrong, image in zip(off, images, strict=True) if not image):
        found.append(
            "it keeps image features of older weights: start servers with SGLANG_VLM_CACHE_SIZE_MB"
            "=0 (launch/rollouts.sh does), or freeze the vision tower; or it resizes images "
            "otherwise than the trainer"
        )
    if old and all(gap.mean() <= limit for gap in differences(finding.logps, old)):
        found.append(
            f"it still has version {old.version}: does it see the folder that the trainer writes "
            "to (rollout.weights_folder_there)?"
        )
    return "; or ".join(found) or (
        "another dtype than the trainer's (server: --dtype, trainer: model.dtype), a checkpoint of "
        "another model, a quantized server, or, where the gap is small, a limit too low for this "
        "dtype (rollout.probe_gap)"
    )
