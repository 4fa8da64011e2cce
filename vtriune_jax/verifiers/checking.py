"""What is wrong with the rows of a run and with the verifiers they ask for, found at its start.

Each verifier is imported, and its `verify` must take its four arguments. Of each row are checked

    the names of its parameters   if the verifier declares those that it knows, as `PARAMETERS`;
                                  what V-Triune gives to rows of any verifier is known to all
    truth and parameters          if the verifier has a `check(ground_truth, params)`, which raises
                                  what `verify` would for every completion

Ours have both. A `check` must be cheap, since there are tens of thousands of rows: it reads the
truth and judges nothing that may be slow. That of `mathverify` finds only the truths without any
digit or LaTeX, which math-verify never reads.

All this happens in a worker process, since a verifier that is imported may do anything.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers import known_verifiers, load
from vtriune_jax.verifiers.pool import Answer, Pool
from vtriune_jax.verifiers.worker import describe, guarded

GIVEN = frozenset(
    (
        *("det_reward_ratio", "det_verifier_normalized", "iou_threshold"),
        *("grid", "image_grid_thw", "image_path", "verifier_style"),
        *("is_training", "step", "total_steps"),
    )
)
"""Parameters that V-Triune or the router gives to rows of any verifier."""

_GRID = ((1000, 1000),)
"""Of a picture, whose size is not known yet."""
_LIMIT = 120.0
"""Seconds to import a verifier, and to check a chunk of rows."""
_CHUNK = 512

Row = tuple[str, str, Mapping[str, Any]]
"""Verifier, ground truth and parameters."""
Check = Callable[[Sequence[Row]], list[str]]


@contextmanager
def checking() -> Iterator[Check]:
    """A function that says what is wrong with each row, "" where nothing is.

    It raises UserError when a verifier that a row asks for cannot be used at all.
    """
    pool = Pool(1, _LIMIT)
    try:
        yield partial(_faults, pool)
    finally:
        pool.close()


def _faults(pool: Pool, rows: Sequence[Row]) -> list[str]:
    for name in sorted({name for name, *_ in rows}):
        _result(pool.call(__name__, "usable", name), f"{name} ({known_verifiers()[name]})")
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    asked = [(pool.call(__name__, "faults", chunk), chunk) for chunk in chunks]
    found: list[str] = []
    for future, chunk in asked:
        found += _result(future, ", ".join(sorted({name for name, *_ in chunk})))
    return found


def _result(future: Future[list[Answer]], names: str) -> Any:
    (answer,) = future.result()
    if isinstance(answer, str):
        raise UserError(answer.removeprefix("UserError: "))
    if isinstance(answer, Exception):
        raise UserError(
            f"verifier {names} cannot be imported, or its check fails: {answer}; correct it"
        )
    return answer


def usable(verifier: str) -> bool:
    """True, or UserError with the file and the reason."""
    _loaded(verifier)
    return True


def faults(rows: Sequence[Row]) -> list[str]:
    """Why each row cannot be judged; UserError when a verifier is at fault."""
    found = []
    for row in rows:
        error = guarded(check, *row)
        if isinstance(error, UserError):
            raise error
        found.append(f"verifier {row[0]}: {_reason(error)}" if error else "")
    return found


def check(
    verifier: str, ground_truth: str, params: Mapping[str, Any], shared: Collection[str] = ()
) -> None:
    """Raises the reason why no completion can be judged; UserError when the verifier is at fault.

    Parameters that several verifiers have in common, `shared`, may be unknown to this one.
    """
    check_names([name for name in params if name not in shared], known(verifier))
    truth_check = getattr(_loaded(verifier), "check", None)
    if truth_check:
        truth_check(ground_truth, {**params, "grid": _GRID})


def known(verifier: str) -> frozenset[str] | None:
    """The names of parameters that a verifier knows; None if it does not say."""
    declared = getattr(_loaded(verifier), "PARAMETERS", None)
    return None if declared is None else frozenset(declared)


def check_names(names: Collection[str], known: Collection[str] | None) -> None:
    """ValueError for a parameter that nobody knows, with the nearest one."""
    if known is None:
        return
    for name in names:
        if name not in known and name not in GIVEN:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            listed = ", ".join(sorted(known)) or "none"
            hint = f"did you mean {close[0]!r}?" if close else f"known are {listed}"
            raise ValueError(f"unknown parameter {name!r}; {hint}")


@cache
def _loaded(verifier: str) -> Any:
    """The module; UserError when it cannot be imported or `verify` cannot be called."""
    file = known_verifiers()[verifier]
    spec = guarded(find_spec, file)
    file = getattr(spec, "origin", None) or file
    remedy = "correct it or reward_model.verifier"
    module = guarded(load, verifier)
    if isinstance(module, Exception):
        raise UserError(
            f"{file}: verifier {verifier!r} cannot be imported ({describe(module)}); {remedy}"
        )
    try:
        inspect.signature(module.verify).bind("", "", {}, 0.0)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"{file}: verify cannot be called with (completion, ground_truth, params, progress): "
            f"{error}; {remedy}"
        ) from error
    return module


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError and str(error) else describe(error)
