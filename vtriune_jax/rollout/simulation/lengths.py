"""How long completions are: of a real run, or a distribution by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from vtriune_jax.errors import UserError

Lengths = Callable[[np.random.Generator, int], np.ndarray]
"""(generator, n) → tokens of n completions of one prompt, at least 1 each."""

SPREAD = 0.8
"""Standard deviation of a log-length, where nothing tells it."""
NORMAL = NormalDist()


def read(text: str, most: int) -> Lengths:
    """Lengths by name, cut at `most` tokens.

    "constant:N", "lognormal:MEAN,SPREAD" (of the uncut length, and of its logarithm), a file with
    one length a line, or the metrics.jsonl of a run (see `of_run`). Raises UserError.
    """
    kind, _, rest = text.partition(":")
    if kind in ("constant", "lognormal"):
        try:
            numbers = [float(word) for word in rest.split(",")]
        except ValueError:
            numbers = []
        if kind == "constant" and len(numbers) == 1:
            return constant(int(numbers[0]))
        if kind == "lognormal" and len(numbers) == 2:
            mean, spread = numbers
            return log_normal(mean, spread, most)
        raise UserError(f"--lengths={text} is not in the form constant:N or lognormal:MEAN,SPREAD")
    path = Path(text)
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise UserError(
            f"--lengths={text} cannot be read ({error.strerror}); give constant:N, "
            "lognormal:MEAN,SPREAD, or a file: lengths, one a line, or a run's metrics.jsonl"
        ) from None
    try:
        found = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"--lengths={text}: a line is neither number nor JSON ({error})") from None
    if found and isinstance(found[0], dict):
        return of_run(found, path, most)
    if not found or not all(isinstance(n, int | float) and n >= 1 for n in found):
        raise UserError(f"--lengths={text} must hold lengths of at least 1, one a line")
    return empirical(np.minimum(np.array(found, float), most))


def constant(length: int) -> Lengths:
    """Always the same; UserError below 1."""
    if length < 1:
        raise UserError(f"a completion of {length} tokens cannot be: at least 1")
    return lambda _, n: np.full(n, length)


def empirical(lengths: np.ndarray) -> Lengths:
    """Each drawn from those given, with equal chances."""
    return lambda rng, n: rng.choice(lengths, n).astype(int)


def log_normal(mean: float, spread: float, most: int) -> Lengths:
    """exp(N(μ, spread²)) with the given mean before it is cut to 1 … most."""
    if mean <= 0 or spread < 0:
        raise UserError(f"lognormal:{mean:g},{spread:g}: the mean must be above 0, the spread 0 on")
    mu = math.log(mean) - spread**2 / 2
    return lambda rng, n: np.clip(np.ceil(rng.lognormal(mu, spread, n)), 1, most).astype(int)


def of_run(records: list[dict[str, Any]], path: Path, most: int) -> Lengths:
    """A log-normal per data source, from the means of a run's last 20 sampled steps.

    Those hold the mean length and the share that was cut at `most`, which tell both numbers of the
    distribution; where nothing was cut, the spread is `SPREAD`. All completions of a prompt are of
    one source, and each source is as frequent as another.
    """
    sampled = [record for record in records if any(n.startswith("length/") for n in record)][-20:]
    names = sorted({n.partition("/")[2] for r in sampled for n in r if n.startswith("length/")})
    if not names:
        raise UserError(f"--lengths={path} has no metric length/SOURCE: no run that has sampled")
    found = []
    for name in names:
        of = [record for record in sampled if f"length/{name}" in record]
        mean = sum(record[f"length/{name}"] for record in of) / len(of)
        cut = sum(record.get(f"truncated/{name}", 0.0) for record in of) / len(of)
        found.append(fit(mean, cut, most))

    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        mu, spread = found[rng.integers(len(found))]
        return np.clip(np.ceil(rng.lognormal(mu, spread, n)), 1, most).astype(int)

    return draw


def fit(mean: float, cut: float, most: int) -> tuple[float, float]:
    """(μ, spread) of the log-normal X with E min(X, most) = mean and P(X ≥ most) = cut.

        E min(X, m) = exp(μ + σ²/2) Φ((ln m - μ - σ²) / σ) + m · P(X ≥ m)

    For a spread σ the share that is cut gives μ = ln m - σ z, z = Φ⁻¹(1 - cut); the mean then falls
    as σ rises, and is found by halving.
    """
    if cut <= 0.0 or mean >= most:
        spread = SPREAD if mean < most else 0.0
        return math.log(max(min(mean, most), 1.0)) - spread**2 / 2, spread
    z = NORMAL.inv_cdf(1 - min(cut, 1 - 1e-9))

    def cut_mean(sigma: float) -> float:
        mu = math.log(most) - sigma * z
        return math.exp(mu + sigma**2 / 2) * NORMAL.cdf(z - sigma) + most * cut

    low, high = 1e-6, 20.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle) > mean else (low, middle)
    return math.log(most) - low * z, low
