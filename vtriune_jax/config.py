"""Reading a config: the file, the command line's overrides, and all mistakes in one message.

A config is a Python file with `get_config()`; it is compared here with `configs/base.py`, which
holds every key, and with the tables of `config_tables`.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
import sys
import traceback
from ast import literal_eval
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from vtriune_jax.config_tables import DIVISIBLE, RELATIONS, RULES, Test
from vtriune_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = REPOSITORY / "configs" / "base.py"
STARTED_IN = "started_in"
"""A key of a run's `config.json` beside the config's: the folder of its relative paths."""
_FAULTS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a slip of the pen in a config file raises."""


def load(path: str, overrides: Sequence[tuple[str, str]] = ()) -> FrozenConfigDict:
    """The checked config of a file, with `(dotted key, text)` pairs from the command line put in.

    The text of an override is read as the type that base has for the key. Raises UserError for a
    file that is no config and, in one line, for every mistake in file and overrides together.
    """
    config, kinds = _execute(Path(path)), flatten(_execute(BASE))
    unknown = [key for key, text in overrides if not _put(config, key, _read(text, kinds.get(key)))]
    found = [_unknown(key, kinds) for key in unknown] + mistakes(config)
    if found:
        raise UserError(_report(found, path))
    for key, value in flatten(config).items():
        if isinstance(kinds[key], float):
            _put(config, key, float(value))
    return FrozenConfigDict(config)


def check(config: ConfigDict) -> None:
    """Raises UserError with every mistake of a config made in Python, in one line."""
    if found := mistakes(config):
        raise UserError(_report(found, "the config"))


def mistakes(config: ConfigDict) -> list[str]:
    """What is wrong with a config, a sentence each; relations are judged between sound keys."""
    kinds, values = flatten(_execute(BASE)), flatten(config)
    found = [_unknown(key, kinds) for key in values if key not in kinds]
    wrong = {key: f"{key} is missing; configs/base.py has it" for key in kinds if key not in values}
    for key, value in values.items():
        if key in kinds and (reason := _judge(key, value, kinds[key])):
            wrong[key] = reason
    sound = {key: value for key, value in values.items() if key in kinds and key not in wrong}
    return found + list(wrong.values()) + _relations(sound)


def rule(key: str) -> tuple[Test, str] | None:
    """The line of RULES for a key, and its words; KeyError if there are several."""
    lines = [(test, words) for pattern, test, words in RULES if re.fullmatch(pattern, key)]
    if len(lines) > 1:
        raise KeyError(f"{key} matches {len(lines)} lines of config.RULES")
    return lines[0] if lines else None


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"sft": {"lr": 1}} → {"sft.lr": 1}"""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _execute(path: Path) -> ConfigDict:
    """A fresh config from a file's get_config()."""
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in BASE.parent.glob("*.py")], n=1)
        hint = f"did you mean configs/{near[0]}.py?" if near else "try configs/quickstart.py"
        raise UserError(f"there is no config file {path}; {hint}")
    if str(REPOSITORY) not in sys.path:
        sys.path.append(str(REPOSITORY))  # so that `from configs import base` works from anywhere
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a config is one, with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"{path} has no get_config(); see configs/quickstart.py for the form")
        config = module.get_config()
    except UserError:
        raise
    except _FAULTS as error:
        raise UserError(
            f"{_line_of(error, path)}: {type(error).__name__}: {_words(error)}; mend the file"
        ) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path}: get_config() returns {config!r:.100}, expected the config: end it with "
            "`return config`"
        )
    return config


def _line_of(error: BaseException, path: Path) -> str:
    """The file, and its line that an error came from, if one can be told."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path
    ]
    if isinstance(error, SyntaxError):
        path, lines = Path(error.filename or path), [error.lineno]
    return f"{path} line {lines[-1]}" if lines else str(path)


def _words(error: Any) -> str:
    while error.args and isinstance(error.args[0], KeyError):  # as ConfigDict wraps them
        error = error.args[0]
    text = error.args[0] if isinstance(error, KeyError | SyntaxError) and error.args else error
    return " ".join(str(text).split())


def _put(config: ConfigDict, key: str, value: Any) -> bool:
    """Sets an existing leaf; False if there is none of that name."""
    *groups, name = key.split(".")
    holder: Any = config
    for group in groups:
        holder = holder.get(group) if isinstance(holder, ConfigDict) else None
    if not isinstance(holder, ConfigDict) or isinstance(holder.get(name), ConfigDict | None):
        return False
    holder[name] = value
    return True


def _read(text: str, kind: Any) -> Any:
    """Text as a value of `kind`'s type; as it is where that fails, for `_judge` to complain of."""
    if isinstance(kind, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(kind, tuple):
        try:
            value = literal_eval(text)
        except (SyntaxError, ValueError):
            value = text.split(",")  # names need no quotes: --config.stages=sft,grpo
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    if isinstance(kind, int | float):
        try:
            return type(kind)(text)
        except ValueError:
            return text
    return text


def _judge(key: str, value: Any, kind: Any) -> str | None:
    """What is wrong with one value, if anything."""
    if not _same_type(value, kind):
        return f"{key}={value!r} must be of type {type(kind).__name__}, not {type(value).__name__}"
    test, words = rule(key) or (lambda _: True, "")
    return None if test(value) else f"{key}={value!r} must be {words}"


def _same_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(kind)


def _relations(values: Mapping[str, Any]) -> list[str]:
    """The broken lines of DIVISIBLE and RELATIONS, as far as their keys are all there."""
    found = []
    for whole, part in DIVISIBLE:
        if values.keys() >= {*whole, *part} and _matters(whole[0], values):
            total, divisor = (math.prod(values[key] for key in keys) for keys in (whole, part))
            if total % divisor:
                step = divisor // math.gcd(divisor, total // values[whole[0]])
                low = values[whole[0]] // step * step
                near = " or ".join(str(size) for size in (low, low + step) if size)
                near = f"{whole[0]}={near}" if len(whole) > 1 else near
                name, by = "×".join(whole), "×".join(part)
                found.append(f"{name}={total} is not divisible by {by}={divisor}; choose {near}")
    for test, words, keys in RELATIONS:
        if values.keys() >= set(keys) and not test(*(values[key] for key in keys)):
            found.append(words.format(*(f"{key}={values[key]!r}" for key in keys)))
    return found


def _matters(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key is of no stage, or of one that the config has."""
    group = key.split(".")[0]
    return group not in ("sft", "grpo") or group in values.get("stages", (group,))


def _unknown(key: str, kinds: Mapping[str, Any]) -> str:
    """That a key does not exist, and which one was meant or could have been."""
    if members := _members(key, kinds):
        return f"{key} is a group of keys: set {members}"
    group, _, name = key.rpartition(".")
    near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.8)
    near = near or [known for known in kinds if known.split(".")[-1] == name]
    if not near and (members := _members(group, kinds)):
        return f"{key} is not a key: the group has {members}"
    near = near or difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)
    return f"{key} is not a key: did you mean {' or '.join(near)}?"


def _members(group: str, kinds: Mapping[str, Any]) -> str:
    return ", ".join(known for known in kinds if known.startswith(f"{group}."))


def _report(found: Sequence[str], name: str) -> str:
    if len(found) == 1:
        return f"{name}: {found[0]}"
    listed = "; ".join(f"({number}) {text}" for number, text in enumerate(found, 1))
    return f"{name} has {len(found)} mistakes: {listed}"
