"""How fast the parts of a training run are: what the simulation takes from measurements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtriune_jax.errors import UserError


@dataclass(frozen=True)
class Speeds:
    """Of one server of the fleet, of the verifiers and of the trainer."""

    decode: tuple[tuple[int, float], ...]
    """(completions in flight, tokens per second of all together), measured, in rising order."""
    prefill: float = float("inf")
    """Prompt tokens per second; decoding waits meanwhile."""
    capacity: int = 128
    """Completions that a server works on at a time."""
    verify: float = 0.0
    """Seconds of a verifier worker per completion."""
    verify_workers: int = 1
    update: float = 0.0
    """Seconds of the trainer per step."""
    publish: float = 0.0
    """Seconds of the trainer to write the weights, while the fleet goes on."""
    load: float = 0.0
    """Seconds in which the fleet stands still to read them, and the trainer waits."""

    def token_seconds(self) -> list[float]:
        """Seconds between two tokens of a completion, by the number in flight, 0 … capacity.

        Between two measurements they change linearly in that number, as where each completion adds
        its share to a step; beyond the last ones the line goes on, never falling.
        """
        wrong = not self.decode or any(b < 1 or rate <= 0 for b, rate in self.decode)
        sizes = [size for size, _ in self.decode]
        if wrong or sizes != sorted(set(sizes)):
            raise UserError(
                f"decode speeds {self.decode} are not of rising numbers in flight with tokens "
                "per second above 0; write them as in 1:90,64:4200"
            )
        seconds = [size / rate for size, rate in self.decode]
        found = np.interp(range(self.capacity + 1), sizes, seconds)
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            beyond = np.arange(self.capacity + 1) - sizes[-1]
            found += np.maximum(beyond, 0) * max(slope, 0.0)
        return found.tolist()


def read_decode(text: str) -> tuple[tuple[int, float], ...]:
    """Reads "1:90,64:4200": tokens per second at each number in flight. Raises UserError."""
    try:
        pairs = [word.split(":") for word in text.split(",")]
        return tuple((int(size), float(rate)) for size, rate in pairs)
    except ValueError:
        raise UserError(
            f"--decode={text!r} is not in the form IN_FLIGHT:TOKENS_PER_SECOND,…, as 1:90,64:4200"
        ) from None
