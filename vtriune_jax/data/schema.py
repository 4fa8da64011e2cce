"""The V-Triune row as an Arrow schema, and the step from one row to one `Sample`.

A row: `data_source`, `images` (encoded bytes), `prompt` (chat turns with `<image>` once per image),
`ability`, `reward_model` (how to judge it) and `extra_info`. Columns we do not know are ignored,
but for `videos`, which rows cannot have yet. Our optional additions are
`extra_info.demonstration`, the text that supervised fine-tuning imitates, and
`reward_model.verifier_parm.json`, a JSON object of parameters beside those of detection.
"""

from __future__ import annotations

import difflib
import io
import json
import re
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from vtriune_jax.errors import UserError
from vtriune_jax.types import Message, RewardConfig, Sample

IMAGE = "<image>"
_FOREIGN = re.compile(r"<video>|<\|(?:image_pad|video_pad|vision_(?:pad|start|end))\|>")
"""Marks that would be read as text, or as pictures that the row does not have."""

BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on a damaged file. So many, as its plugins trust what they parse: it may be a
RuntimeError (AVIF), a TypeError (TIFF), an AssertionError (ICNS) …"""

DETECTION_RATIOS = {
    "iou_max_label_first": 1.0,
    "iou_max_iou_first": 0.0,
    "iou_completeness": 0.3,
    "map": 0.0,
    "map50": 0.0,
    "map75": 0.0,
}
"""Every weight of the box reward, with V-Triune's values."""
_COLUMNS = ("det_verifier_normalized", "det_reward_ratio")
"""Parameters of verifiers that have columns of their own; the others are in one, as JSON."""
_FEATURES: dict[str, Any] = {
    "data_source": "string",
    "images": [Image],
    "prompt": [{"content": "string", "role": "string"}],
    "ability": "string",
    "reward_model": {
        "answer": "string",
        "ground_truth": "string",
        "accuracy_ratio": "float32",
        "format_ratio": "float32",
        "verifier": "string",
        "verifier_parm": {
            "det_verifier_normalized": "bool",
            "det_reward_ratio": dict.fromkeys(DETECTION_RATIOS, "float32"),
            "json": "string",
        },
    },
    "extra_info": {"id": "string", "image_path": "string", "demonstration": "string"},
}
_REMEDY = "see the data format in README.md"


def arrow_schema() -> pa.Schema:
    """The schema of the files we write, with the metadata that lets HF `datasets` decode images."""
    features = {name: _hf_feature(kind) for name, kind in _FEATURES.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    fields = [pa.field(name, _arrow_type(kind)) for name, kind in _FEATURES.items()]
    return pa.schema(fields, metadata=metadata)


def check_columns(schema: pa.Schema, where: str) -> None:
    """Raise `UserError` when a column is missing or has a type that no row could satisfy."""
    for path, needed, expected, fits in (
        ("data_source", True, "string", _is_string),
        ("images", True, "list of {bytes, path} or of binary", _is_images),
        ("prompt", True, "list of {role: string, content: string}", _is_prompt),
        ("reward_model.verifier", True, "string", _is_string),
        ("reward_model.ground_truth", True, "string", _is_string),
        ("ability", False, "string", _is_string),
        ("reward_model.answer", False, "string", _is_string),
        ("reward_model.verifier_parm", False, "struct or JSON in a string", _is_object),
        ("extra_info", False, "struct or JSON in a string", _is_object),
        ("extra_info.demonstration", False, "string", _is_string),
    ):
        found = _find(schema, path)
        if found is None and needed:
            names = ", ".join(schema.names)
            raise UserError(f"{where}: column {path} is missing (found: {names}); {_REMEDY}")
        absent = not needed and (found is None or pa.types.is_null(found))
        if not absent and not fits(found):
            raise UserError(f"{where}: column {path} is {found}, expected {expected}; {_REMEDY}")


def to_sample(
    row: Mapping[str, Any], where: str, default_id: str, known_verifiers: Collection[str] | None
) -> Sample:
    """One row as Python objects → `Sample`; any fault is a `UserError` that begins with `where`."""
    if row.get("videos"):
        raise UserError(
            f"{where}: the column videos is not empty, but rows cannot have videos yet; "
            "give frames as images or drop the row"
        )
    messages = _messages(row["prompt"], where)
    images = _images(row["images"], where)
    marks = sum(message.content.count(IMAGE) for message in messages)
    if marks != len(images):
        raise UserError(
            f"{where}: the prompt has {marks} {IMAGE} but the row has {len(images)} images; "
            f"write {IMAGE} once per image"
        )
    reward = _reward(row["reward_model"] or {}, where, known_verifiers)
    extra = _object(row.get("extra_info"), "extra_info", where)
    demonstration = _optional_text(extra.get("demonstration"), "extra_info.demonstration", where)
    return Sample(
        data_source=_text(row["data_source"], "data_source", where),
        id=str(extra["id"]) if extra.get("id") is not None else default_id,
        images=images,
        messages=messages,
        reward=reward,
        ability=_optional_text(row.get("ability"), "ability", where),
        demonstration=demonstration or reward.ground_truth,
        where=where,
    )


def to_row(sample: Sample, image_path: str | None = None) -> dict[str, Any]:
    """The inverse of `to_sample`: a row that `arrow_schema` accepts."""
    reward = sample.reward
    others = dict(reward.params)
    params = {name: others.pop(name, None) for name in _COLUMNS}
    if (ratios := params["det_reward_ratio"]) is not None:
        params["det_reward_ratio"] = {name: ratios.get(name) for name in DETECTION_RATIOS}
    params["json"] = json.dumps(others) if others else None
    return {
        "data_source": sample.data_source,
        "images": [{"bytes": data, "path": None} for data in sample.images],
        "prompt": [{"content": m.content, "role": m.role} for m in sample.messages],
        "ability": sample.ability,
        "reward_model": {
            "answer": reward.answer,
            "ground_truth": reward.ground_truth,
            "accuracy_ratio": reward.accuracy_ratio,
            "format_ratio": reward.format_ratio,
            "verifier": reward.verifier,
            "verifier_parm": params,
        },
        "extra_info": {
            "id": sample.id,
            "image_path": image_path,
            "demonstration": sample.demonstration,
        },
    }


# ------------------------------------------------------------------------------------- one row


def _messages(turns: Sequence[Mapping[str, Any]] | None, where: str) -> tuple[Message, ...]:
    if not turns or None in turns:
        raise UserError(f"{where}: prompt is {turns!r}, expected one or more chat turns; {_REMEDY}")
    messages = tuple(
        Message(
            role=_text(turn["role"], "prompt.role", where),
            content=_text(turn["content"], "prompt.content", where),
        )
        for turn in turns
    )
    for message in messages:
        if mark := _FOREIGN.search(f"{message.role} {message.content}"):
            raise UserError(
                f"{where}: the prompt has {mark[0]}, but rows have no videos yet and mark a "
                f"picture by {IMAGE} alone; write it otherwise or drop the row"
            )
    return messages


def _images(cells: Sequence[Any] | None, where: str) -> tuple[bytes, ...]:
    images = tuple(_image_bytes(cell, where) for cell in cells or ())
    for number, data in enumerate(images):
        try:
            Image.open(io.BytesIO(data)).close()  # reads the header only
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise UserError(
                f"{where}: image {number} ({len(data)} bytes) cannot be read as a picture "
                f"({type(error).__name__}); store PNG or JPEG bytes or drop the row"
            ) from error
    return images


def _image_bytes(cell: Any, where: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if data is not None:
        return data
    path = cell.get("path") if isinstance(cell, Mapping) else None
    if path is None:
        raise UserError(f"{where}: an image is null; store its encoded bytes or drop the row")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter for what is no path at all
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{where}: image file {path!r} cannot be read ({why}); "
            "store the encoded bytes in the row"
        ) from error


def _reward(
    config: Mapping[str, Any], where: str, known_verifiers: Collection[str] | None
) -> RewardConfig:
    verifier = _text(config.get("verifier"), "reward_model.verifier", where)
    if known_verifiers is not None and verifier not in known_verifiers:
        raise UserError(
            f"{where}: unknown verifier {verifier!r}; {nearest(verifier, known_verifiers)}"
        )
    ratios = {name: config.get(name) for name in ("accuracy_ratio", "format_ratio")}
    for name, value in ratios.items():
        if value is not None and not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise UserError(f"{where}: reward_model.{name} is {value!r}, expected a number ≥ 0")
    accuracy = 1.0 if ratios["accuracy_ratio"] is None else float(ratios["accuracy_ratio"])
    format_ratio = 0.0 if ratios["format_ratio"] is None else float(ratios["format_ratio"])
    if accuracy + format_ratio == 0:
        raise UserError(
            f"{where}: accuracy_ratio and format_ratio are both 0, so the row has no reward; "
            "set one of them above 0"
        )
    return RewardConfig(
        verifier=verifier,
        ground_truth=_text(config.get("ground_truth"), "reward_model.ground_truth", where),
        answer=_optional_text(config.get("answer"), "reward_model.answer", where),
        accuracy_ratio=accuracy,
        format_ratio=format_ratio,
        params=_parameters(config.get("verifier_parm"), where),
    )


def _parameters(given: Any, where: str) -> dict[str, Any]:
    name = "reward_model.verifier_parm"
    params = without_nulls(_object(given, name, where))
    return params | _object(params.pop("json", None), f"{name}.json", where)


def _object(value: Any, name: str, where: str) -> dict[str, Any]:
    """A struct, or JSON in a text; {} for what is not there."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value or "{}")
        except (ValueError, RecursionError):
            found = value
    if not isinstance(found, Mapping | None):
        raise UserError(f"{where}: {name} is {value!r:.200}, expected a JSON object; {_REMEDY}")
    return dict(found or {})


def without_nulls(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Drop nulls, and what becomes empty: a file carries every field of every verifier."""
    pruned = {k: without_nulls(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    return {k: v for k, v in pruned.items() if v is not None and v != {}}


def nearest(word: str, choices: Collection[str]) -> str:
    """`"did you mean 'x'? Known: …"`, for error texts."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.0)
    known = ", ".join(sorted(choices))
    return f"did you mean {close[0]!r}? Known: {known}" if close else f"known: {known}"


def reason(error: Exception) -> str:
    """What a library's exception says, in one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{where}: {name} is {value!r}, expected a text that is not empty; {_REMEDY}"
        )
    return value


def _optional_text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"{where}: {name} is {value!r}, expected a text or nothing; {_REMEDY}")
    return value or ""


# -------------------------------------------------------------------------------------- types


def _hf_feature(kind: Any) -> Any:
    if kind is Image:
        return {"_type": "Image"}
    if isinstance(kind, list):
        return [_hf_feature(kind[0])]
    if isinstance(kind, dict):
        return {name: _hf_feature(inner) for name, inner in kind.items()}
    return {"dtype": kind, "_type": "Value"}


def _arrow_type(kind: Any) -> pa.DataType:
    if kind is Image:
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0]))
    if isinstance(kind, dict):
        return pa.struct([(name, _arrow_type(inner)) for name, inner in kind.items()])
    return {"string": pa.string(), "float32": pa.float32(), "bool": pa.bool_()}[kind]


def _find(schema: pa.Schema, path: str) -> pa.DataType | None:
    kind: Any = pa.struct(list(schema))
    for name in path.split("."):
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_object(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or _is_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_images(kind: Any) -> bool:
    if pa.types.is_null(kind):
        return True
    if not _is_list(kind):
        return False
    cell = kind.value_type
    if not pa.types.is_struct(cell):
        return _is_binary(cell)
    fits = {"bytes": _is_binary, "path": lambda kind: _is_string(kind) or pa.types.is_null(kind)}
    held = [field for field in cell if field.name in fits]
    return bool(held) and all(fits[field.name](field.type) for field in held)


def _is_prompt(kind: Any) -> bool:
    if not _is_list(kind) or not pa.types.is_struct(kind.value_type):
        return False
    turn = kind.value_type
    return all(
        turn.get_field_index(name) >= 0 and _is_string(turn.field(name).type)
        for name in ("role", "content")
    )
