"""The in-process sampler as a run makes it."""

from typing import Any

from vtriune_jax.data.prompts import Prompter
from vtriune_jax.rollout.local import LocalEngine


def engine_of(graphdef: Any, prompter: Prompter) -> LocalEngine:
    return LocalEngine(
        graphdef,
        stop_ids=prompter.stop_ids,
        banned_ids=prompter.banned_ids,
        pad_id=prompter.pad_id,
        decode_text=prompter.decode,
    )
