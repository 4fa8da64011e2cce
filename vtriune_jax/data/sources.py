"""Data sources: parquet files, folders, HF datasets or a built-in name → a `Source` of `Sample`s.

    load("rows.parquet", "train")          a file, or a glob of files: taken as they are
    load("orsta/", "heldout")              a folder: train/ and test/, or train_* and test_* files
    load("owner/name", "train")            a name on the hub, or a folder of `Dataset.save_to_disk`
    load("digits/counting", "train", …)    built in: written as parquet once, then read as above

Images stay encoded, in the Arrow table; a `Sample` is built when it is asked for.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.parquet as pq

from vtriune_jax.data import schema
from vtriune_jax.errors import UserError
from vtriune_jax.types import Sample

Split = Literal["train", "heldout"]
OnBadRow = Literal["error", "skip"]
Asked = tuple[str, str, Mapping[str, Any]]
"""What a row asks: verifier, ground truth and parameters."""
Check = Callable[[Sequence[Asked]], Sequence[str]]
"""What is wrong with each, "" where nothing is."""

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_FOLDER: dict[Split, str] = {"train": "train", "heldout": "test"}
_OTHERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
_PARQUET: dict[str, Any] = {"row_group_size": 1024, "write_page_checksum": True}


class Source(Sequence[Sample]):
    """The usable rows of some tables, as a sequence of `Sample`.

    Every row is checked at construction (of an image only the header is read), and then what it
    gives its verifier by `check`. With `on_bad_row` "skip" the faulty ones are left out; `skipped`
    counts them and `first_fault` tells of one. `data_sources` are the values of that column,
    sorted.
    """

    def __init__(
        self,
        name: str,
        tables: Iterable[tuple[str, pa.Table]],
        *,
        on_bad_row: OnBadRow = "error",
        known_verifiers: Collection[str] | None = None,
        check: Check | None = None,
    ):
        self.name = name
        self.skipped = 0
        self.first_fault = ""
        self._on_bad_row = on_bad_row
        self._tables = list(tables)
        self._rows: list[tuple[int, int]] = []
        found: set[str] = set()
        for part, (where, table) in enumerate(self._tables):
            schema.check_columns(table.schema, where)
            sources: dict[int, str] = {}
            asked: dict[int, Asked] = {}
            for row in range(table.num_rows):
                try:
                    sample = self._sample(part, row, known_verifiers)
                except UserError as fault:
                    self._pass_over(fault)
                    continue
                reward = sample.reward
                sources[row] = sample.data_source
                asked[row] = reward.verifier, reward.ground_truth, reward.params
            faults = check(list(asked.values())) if check else [""] * len(asked)
            for row, fault in zip(asked, faults, strict=True):
                if fault:
                    remedy = "correct reward_model or drop the row"
                    self._pass_over(UserError(f"{where} row {row}: {fault}; {remedy}"))
                else:
                    self._rows.append((part, row))
                    found.add(sources[row])
        self.data_sources = tuple(sorted(found))
        if not self._rows:
            fault = f": {self.first_fault}" if self.skipped else "; give a file that has rows"
            raise UserError(f"{name}: no usable rows ({self.skipped} skipped){fault}")

    def _pass_over(self, fault: UserError) -> None:
        if self._on_bad_row == "error":
            raise fault
        self.skipped += 1
        self.first_fault = self.first_fault or str(fault)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._sample(*place) for place in self._rows[index]]
        return self._sample(*self._rows[index])

    def _sample(self, part: int, row: int, known: Collection[str] | None = None) -> Sample:
        where, table = self._tables[part]
        try:
            cells = table.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise UserError(f"{where} row {row}: a text is not UTF-8; write it again") from error
        name = f"{Path(where).stem}:{row}"
        return schema.to_sample(cells, f"{where} row {row}", name, known)


def load(
    source: str,
    split: Split,
    *,
    cache: str | os.PathLike[str] | None = None,
    on_bad_row: OnBadRow = "error",
    known_verifiers: Collection[str] | None = None,
    check: Check | None = None,
    train_rows: int = 2000,
    heldout_rows: int = 200,
    seed: int = 0,
) -> Source:
    """Read `source`; a built-in one needs the folder `cache`, and is made of `*_rows` and `seed`.

    A file or a glob is taken as it is, whatever the split. Row numbers in errors count from 0 in
    their file; `check` is as for `Source`. Raises `UserError` when nothing, or something faulty, is
    found.
    """
    path = Path(source).expanduser()
    if source.startswith("digits/") and not path.exists():
        rows = train_rows if split == "train" else heldout_rows
        tables = _read_files([_builtin(source, split, rows, seed, cache)])
    elif path.is_file() or glob.has_magic(source):
        tables = _read_files(_files_of(source, path))
    elif path.is_dir() and _is_saved_dataset(path):
        tables = _read_saved(source, path, split)
    elif path.is_dir():
        tables = _read_files(_files_in(path, split))
    elif _may_be_on_hub(source, path):
        tables = _read_hub(source, split)
    else:
        raise UserError(
            f"data source {source!r} does not exist; give a parquet file, a folder, a glob, "
            "a name on the hub (owner/name) or digits/<task>"
        )
    return Source(
        source, tables, on_bad_row=on_bad_row, known_verifiers=known_verifiers, check=check
    )


def write_parquet(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write rows of the V-Triune schema, all or nothing: a draft beside it, then a rename."""
    target = Path(path)
    table = pa.Table.from_pylist(list(rows), schema=schema.arrow_schema())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as draft:
            pq.write_table(table, Path(draft) / target.name, **_PARQUET)
            os.replace(Path(draft) / target.name, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); "
            "free some space or choose another folder"
        ) from error


# ------------------------------------------------------------------------------------- parquet


def _read_files(paths: Sequence[Path]) -> Iterator[tuple[str, pa.Table]]:
    for path in paths:
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
            str(table.schema)  # damage in a column's name shows when it is decoded
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: not a readable parquet file ({schema.reason(error)}); {_remedy(path)}"
            ) from error
        if not table.num_rows:
            raise UserError(f"{path}: the file has no rows; remove it or fill it")
        yield str(path), table


def _remedy(path: Path) -> str:
    if (kind := _other_format(path)) is None:
        return "write or download it again"
    name = str(path).removesuffix("".join(path.suffixes)) + ".parquet"
    return (
        "parquet is read, and what Dataset.save_to_disk saves; convert it: datasets.load_dataset("
        f'"{kind}", data_files="{path}", split="train").to_parquet("{name}")'
    )


def _other_format(path: Path) -> str | None:
    """What `datasets` calls the format that a file is in by its name, if it is one of these."""
    return next((_OTHERS[suffix] for suffix in path.suffixes[-2:] if suffix in _OTHERS), None)


def _files_of(source: str, path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not files:
        raise UserError(f"data source {source!r} matches no file; check the pattern")
    return files


def _files_in(folder: Path, split: Split) -> list[Path]:
    """`train/*` or `train_*`; a folder without such names is training data as a whole."""
    name = _FOLDER[split]
    inner = folder / name
    files = sorted(inner.glob("*.parquet")) if inner.is_dir() else []
    files = files or sorted(folder.glob(f"{name}_*.parquet"))
    if not files and split == "train" and not any((folder / n).is_dir() for n in _FOLDER.values()):
        files = [f for f in sorted(folder.glob("*.parquet")) if not f.name.startswith("test_")]
    if not files:
        raise UserError(
            f"{folder}: no parquet file for the {split} split; "
            f"expected {name}/*.parquet or {name}_*.parquet"
        )
    return files


# ------------------------------------------------------------------------------- HF datasets


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("dataset_dict.json", "dataset_info.json"))


def _read_saved(source: str, path: Path, split: Split) -> list[tuple[str, pa.Table]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{source}: not a readable dataset folder ({schema.reason(error)}); save it again"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if _FOLDER[split] not in saved:
            raise UserError(
                f"{source}: no split {_FOLDER[split]!r}, only {', '.join(map(str, saved))}; "
                "save it with splits train and test"
            )
        saved = saved[_FOLDER[split]]
    return [(source, saved.with_format("arrow")[:])]


def _may_be_on_hub(source: str, path: Path) -> bool:
    a_file = path.suffix == ".parquet" or _other_format(path) is not None
    return bool(HUB_NAME.fullmatch(source)) and not a_file and not path.parent.is_dir()


def _read_hub(source: str, split: Split) -> list[tuple[str, pa.Table]]:
    import datasets

    try:
        found = datasets.load_dataset(source, split=_FOLDER[split])
    except (OSError, ValueError) as error:
        raise UserError(
            f"data source {source!r} is no local path and cannot be read from the hub "
            f"({schema.reason(error)}); download it or check the spelling "
            f"(built in are {', '.join(_builtin_names())})"
        ) from error
    return [(source, found.with_format("arrow")[:])]  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------ built in


def _builtin(
    source: str, split: Split, rows: int, seed: int, cache: str | os.PathLike[str] | None
) -> Path:
    """The parquet file of a built-in source, written first if `cache` does not hold it."""
    from vtriune_jax.data import digits

    task = source.removeprefix("digits/")
    if source not in _builtin_names():
        hint = schema.nearest(source, _builtin_names())
        raise UserError(f"unknown built-in source {source!r}; {hint}")
    if cache is None:
        raise UserError(f"{source}: a built-in source needs a cache folder to be written to")
    written_by = b"".join(Path(m.__file__ or "").read_bytes() for m in (digits, schema))
    code = hashlib.sha256(written_by).hexdigest()[:8]
    folder = Path(cache) / f"digits-{code}-seed{seed}" / _FOLDER[split]
    path = folder / f"{_FOLDER[split]}_{task}_digits_{rows}.parquet"
    if not path.exists():
        samples = digits.samples(task, split, rows, seed)
        write_parquet(
            (schema.to_row(s, f"images/{s.id}.png") for s in samples),
            path,
        )
    return path


def _builtin_names() -> list[str]:
    from vtriune_jax.data import digits

    return [f"digits/{task}" for task in digits.TASKS]
