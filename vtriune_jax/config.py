"""Reading a config: the file, the command line's overrides, and all mistakes in one message.

A config is a Python file with `get_config()`; it is compared here with `configs/base.py`, which
holds every key. The tables below say what values may be: a new key needs a line in base and, unless
it is a free string or a boolean, one in RULES.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
import sys
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from vtriune_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = REPOSITORY / "configs" / "base.py"

Test = Callable[..., bool]


def positive(value: float) -> bool:
    """More than 0, and finite."""
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    """At least 0, and finite."""
    return 0 <= value < math.inf


def one_of(*choices: str) -> tuple[Test, str]:
    """One of some words."""
    return choices.__contains__, "one of " + ", ".join(f'"{choice}"' for choice in choices)


def strings(values: tuple[Any, ...]) -> bool:
    """Non-empty strings only."""
    return all(isinstance(value, str) and value for value in values)


def counts(values: tuple[Any, ...]) -> bool:
    """Integers from 0 on."""
    return all(type(value) is int and value >= 0 for value in values)


def weighted(values: tuple[Any, ...]) -> bool:
    """Some (source, weight) pairs."""
    pairs = [value for value in values if isinstance(value, tuple | list) and len(value) == 2]
    return 0 < len(pairs) == len(values) and all(
        isinstance(source, str) and source and type(weight) in (int, float) and positive(weight)
        for source, weight in pairs
    )


def stages(values: tuple[Any, ...]) -> bool:
    """ "sft" and "grpo", each at most once."""
    return sorted(map(str, values)) in (["sft"], ["grpo"], ["grpo", "sft"])


def betas(values: tuple[Any, ...]) -> bool:
    """Two numbers in [0, 1)."""
    return len(values) == 2 and all(type(beta) in (int, float) and 0 <= beta < 1 for beta in values)


def regexes(values: tuple[Any, ...]) -> bool:
    """Regular expressions that compile."""
    try:
        return strings(values) and all(re.compile(value) for value in values)
    except re.error:
        return False


RULES: tuple[tuple[str, Test, str], ...] = (
    (r"stages", stages, '"sft", "grpo" or both, each once'),
    (r"model\.dtype", *one_of("float32", "bfloat16")),
    (r"model\.remat", *one_of("none", "dots", "full")),
    (r"model\.lora\.rank", not_negative, "0 (off) or more"),
    (r"model\.lora\.alpha", positive, "above 0"),
    (
        r"model\.lora\.target",
        lambda regex: regexes((regex,)),
        'a regular expression, as in "attn/"',
    ),
    (r"model\.lora\.base_dtype", *one_of("float32", "bfloat16")),
    (r"model\.tiny\.(mrope_section|full_attention_layers)", counts, "integers from 0 on"),
    (r"model\.tiny\.(vocab_size|hidden|intermediate|layers|heads|kv_heads)", positive, "above 0"),
    (r"model\.tiny\.(vision_\w+|window_size)", positive, "above 0"),
    (r"data\.train", weighted, '(source, weight above 0) pairs, as in (("digits/counting", 1.0),)'),
    (r"data\.heldout|verifiers\.addresses", strings, 'strings, as in ("digits/counting",)'),
    (r"data\.(min|max)_pixels", lambda area: area >= 28 * 28, "at least 784, one 28×28 token"),
    (r"data\.on_bad_row", *one_of("error", "skip")),
    (r"data\.threads", positive, "above 0"),
    (r"batch\.\w+", positive, "above 0"),
    (r"(sft|grpo)\.(steps|warmup_steps|weight_decay)", not_negative, "0 or more"),
    (r"(sft|grpo)\.(prompts|lr|grad_clip)", positive, "above 0"),
    (r"(sft|grpo)\.betas", betas, "two numbers in [0, 1)"),
    (r"(sft|grpo)\.freeze", regexes, 'regular expressions, as in ("^visual/",)'),
    (r"grpo\.samples", lambda n: n >= 2, "at least 2: advantages compare completions"),
    (r"grpo\.(epochs|minibatches|clip_high|temperature)", positive, "above 0"),
    (r"grpo\.clip_low", lambda low: 0 < low <= 1, "above 0 and at most 1"),
    (r"grpo\.dual_clip", lambda c: c == 0 or 1 < c < math.inf, "0 (off) or above 1, as in 3.0"),
    (r"grpo\.(tis_cap|refill|overlong_cushion)", not_negative, "0 (off) or more"),
    (r"grpo\.(kl_weight|entropy_weight)", not_negative, "0 (off) or more"),
    (r"grpo\.loss", *one_of("grpo", "gspo", "cispo")),
    (r"grpo\.normalise", *one_of("token", "sequence", "dr")),
    (r"grpo\.old", *one_of("recomputed", "rollout")),
    (r"grpo\.kl", *one_of("k1", "k2", "k3", "mse")),
    (
        r"grpo\.advantage",
        *one_of("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline"),
    ),
    (r"grpo\.top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
    (r"grpo\.top_k", not_negative, "0 (off) or more"),
    (r"mesh\.\w+", lambda size: size == -1 or size > 0, "above 0, or -1 for the rest"),
    (r"verifiers\.mode", *one_of("server", "in_process")),
    (r"verifiers\.(workers|timeout_seconds|deadline_seconds)", positive, "above 0"),
    (r"eval\.batch", positive, "above 0"),
    (r"eval\.(rows_per_source|temperature)", not_negative, "0 or more"),
    (r"eval\.iou_threshold", lambda iou: 0 < iou <= 1, "above 0 and at most 1"),
    (r"checkpoint\.(every|keep)", positive, "above 0"),
    (r"log\.seconds", not_negative, "0 or more"),
    (r"seed|log\.samples", not_negative, "0 or more"),
)
"""key → what its value must be like, besides having the type of base's; one line a key at most."""

DIVISIBLE: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("model.tiny.hidden",), ("model.tiny.heads",)),
    (("model.tiny.heads",), ("model.tiny.kv_heads",)),
    (("model.tiny.vision_hidden",), ("model.tiny.vision_heads",)),
    (("sft.prompts",), ("batch.micro_batches",)),
    (("grpo.prompts", "grpo.samples"), ("grpo.minibatches", "batch.micro_batches")),
)
"""The product of the first keys is a multiple of the product of the second ones."""

RELATIONS: tuple[tuple[Test, str, tuple[str, ...]], ...] = (
    (
        lambda low, high: low <= high,
        "{0} must not exceed {1}",
        ("data.min_pixels", "data.max_pixels"),
    ),
    (
        lambda prompts, minibatches: prompts % minibatches == 0,
        "{0} must be a multiple of {1}: a group stays in one minibatch",
        ("grpo.prompts", "grpo.minibatches"),
    ),
    (
        lambda minibatches, epochs, top_p, top_k: (
            minibatches * epochs == 1 or (top_p == 1 and top_k == 0)
        ),
        "{0} × {1} above 1 needs {2} = 1 and {3} = 0: the ratio is to the whole sampling "
        "distribution",
        ("grpo.minibatches", "grpo.epochs", "grpo.top_p", "grpo.top_k"),
    ),
    (
        lambda cap, old, minibatches, epochs: (
            not cap or old == "recomputed" or minibatches * epochs == 1
        ),
        '{0} needs grpo.old="recomputed", not {1}, whose ratio is to the sampler already',
        ("grpo.tis_cap", "grpo.old", "grpo.minibatches", "grpo.epochs"),
    ),
    (
        lambda dual_clip, loss: not dual_clip or loss != "cispo",
        "{0} does nothing with {1}, whose weight is clipped for every advantage; set it to 0",
        ("grpo.dual_clip", "grpo.loss"),
    ),
    (
        lambda cushion, slot: cushion <= slot,
        "{0} must not exceed {1}",
        ("grpo.overlong_cushion", "batch.completion_tokens"),
    ),
    (
        lambda section, hidden, heads: 2 * sum(section) * heads == hidden,
        "{0} must sum to half a head: {1} / {2} / 2",
        ("model.tiny.mrope_section", "model.tiny.hidden", "model.tiny.heads"),
    ),
    (
        lambda size: size % 28 == 0,
        "{0} must be a multiple of 28, the side of an image token",
        ("model.tiny.window_size",),
    ),
    (
        lambda layers, depth: all(layer < depth for layer in layers),
        "{0} must be below {1}: layers count from 0",
        ("model.tiny.full_attention_layers", "model.tiny.vision_depth"),
    ),
    (
        lambda addresses, mode: not addresses or mode == "server",
        '{0} needs verifiers.mode="server", not {1}',
        ("verifiers.addresses", "verifiers.mode"),
    ),
    (
        lambda *mesh: mesh.count(-1) <= 1,
        "{0}, {1}, {2}: at most one can be -1, the rest",
        ("mesh.data", "mesh.fsdp", "mesh.tensor"),
    ),
)
"""What several keys must satisfy together; {0} is the first one with its value."""

FREE = r"data\.(cache|threads)|(verifiers|mesh|checkpoint|log)\..*"
"""Keys that a resumed run may change, beside the steps of its last stage: how long, on what and how
loudly, not what is learnt."""


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


def record(config: Any, workdir: Path) -> None:
    """Writes `config.json` into the workdir, or checks that the run there had the same settings.

    Raises UserError, with the old and the new values, if a key outside of FREE changed: a resumed
    run would then not be the run that it continues.
    """
    path = workdir / "config.json"
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    if path.exists():
        old, new = flatten(json.loads(path.read_text())), flatten(json.loads(text))
        free = rf"{FREE}|{config.stages[-1]}\.steps"
        changed = [
            f"{key} {json.dumps(old.get(key))} → {json.dumps(new.get(key))}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not re.fullmatch(free, key)
        ]
        if changed:
            raise UserError(
                f"{workdir} holds a run with other settings ({'; '.join(changed)}): "
                "choose a new --workdir, or the old settings to resume it"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    scratch = workdir / "config.json.part"
    scratch.write_text(text)
    scratch.replace(path)


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
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(); see configs/quickstart.py for the form")
    return module.get_config()


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
        if values.keys() >= {*whole, *part}:
            total, divisor = (math.prod(values[key] for key in keys) for keys in (whole, part))
            if total % divisor:
                low = total - total % divisor
                near = " or ".join(str(size) for size in (low, low + divisor) if size)
                name, by = "×".join(whole), "×".join(part)
                found.append(f"{name}={total} is not divisible by {by}={divisor}; choose {near}")
    for test, words, keys in RELATIONS:
        if values.keys() >= set(keys) and not test(*(values[key] for key in keys)):
            found.append(words.format(*(f"{key}={values[key]!r}" for key in keys)))
    return found


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
