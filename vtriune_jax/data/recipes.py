"""Convert public data sets on disk to parquet files of the V-Triune schema.

    python -m vtriune_jax.data.recipes bccd      --input ../shared/data/bccd      --out DIR
    python -m vtriune_jax.data.recipes puzzlevqa --input ../shared/data/puzzlevqa --out DIR

bccd: blood cells, VOC boxes (`annotations/*.xml`, `images/*.jpg`) → detection rows with boxes on
the 0..1000 grid, and counting rows. puzzlevqa: visual puzzles (`*.jsonl`, `images/`) → rows whose
answer, a number or a word, goes into `\\boxed{}`. Every tenth picture is held out. DIR gets train/
and test/ and is a data source as it is: --config.data.train="((DIR, 1.0),)" and
--config.data.heldout="(DIR,)". The same again replaces its files; other parquet files there are
refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from vtriune_jax.data import schema, sources
from vtriune_jax.errors import UserError
from vtriune_jax.types import Message, RewardConfig, Sample

Row = tuple[Literal["train", "test"], Sample]

HELDOUT_EVERY = 10
MAX_BOXES = 10
"""Kinds with more boxes in a picture are asked for in its counting rows only."""
MAX_AREA = 0.5
"""A picture with a box larger than this share of it gives no detection row."""

_CELLS = {"RBC": "red blood cell", "WBC": "white blood cell", "Platelets": "platelet"}
_FIND = (
    "Find every object of these kinds in the picture:",
    "Detect all instances of the following kinds:",
    "Locate each object that belongs to one of these kinds:",
)
_FORMAT = (
    "\nThink about it first, inside <think> and </think>. Then give the list of boxes, in pixels, "
    "between answer tags that stand on lines of their own:\n"
    '<answer>\n[{"bbox_2d": [x1, y1, x2, y2], "label": "kind"}]\n</answer>'
)
_HOW_MANY = (
    "How many {kind}s are in the picture?",
    "Count the {kind}s.",
    "What is the number of {kind}s that you can see?",
)


@dataclass(frozen=True)
class Box:
    """What it is, and (x1, y1, x2, y2) as shares of the picture's width and height, in 0..1."""

    kind: str
    corners: tuple[float, float, float, float]

    def scaled(self, width: int, height: int) -> dict[str, Any]:
        """The object of the answer list, on a grid or in pixels."""
        scale = (width, height) * 2
        corners = [round(c * s) for c, s in zip(self.corners, scale, strict=True)]
        return {"bbox_2d": corners, "label": self.kind}


def bccd(folder: Path) -> Iterator[Row]:
    """The rows of the blood cells, pictures in the order of their names."""
    for number, path in enumerate(_files(folder / "annotations", "*.xml")):
        image = _read(folder / "images" / f"{path.stem}.jpg")
        width, height, boxes = read_voc(path)
        counts = Counter(box.kind for box in boxes)
        for kind, count in sorted(counts.items()):
            question = _HOW_MANY[number % len(_HOW_MANY)].format(kind=kind)
            yield (
                _split(number),
                Sample(
                    data_source="bccd_counting",
                    id=f"{path.stem}-{kind}",
                    images=(image,),
                    messages=_ask(question),
                    reward=_boxed(str(count)),
                    ability="counting",
                ),
            )
        few = [box for box in boxes if counts[box.kind] <= MAX_BOXES]
        if few and max(_area(box) for box in few) <= MAX_AREA:
            kinds = sorted({box.kind for box in few})
            listed = "".join(f"\n- {kind}" for kind in kinds)
            thought = ", ".join(f"{kind}: {counts[kind]}" for kind in kinds)
            answer = json.dumps([box.scaled(_whole(width), _whole(height)) for box in few])
            yield (
                _split(number),
                Sample(
                    data_source="bccd_detection",
                    id=path.stem,
                    images=(image,),
                    messages=_ask(_FIND[number % len(_FIND)] + listed + _FORMAT),
                    reward=_detection(few),
                    ability="cv_detection",
                    demonstration=f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>",
                ),
            )


def puzzlevqa(folder: Path) -> Iterator[Row]:
    """The rows of the puzzles, file by file."""
    for path in _files(folder, "*.jsonl"):
        for number, line in enumerate(path.read_text().splitlines()):
            try:
                puzzle = json.loads(line)
                image, answer = folder / puzzle["image"], str(puzzle["answer"])
                options = ", ".join(map(str, puzzle["options"]))
                question = f"{puzzle['question']} The answer is one of: {options}."
                reasoning = f"{puzzle['explanation']} {puzzle['deduction']}"
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path} line {number + 1}: not a puzzle ({type(error).__name__}: {error}); "
                    "expected JSON with image, question, options, answer, explanation, deduction"
                ) from error
            yield (
                _split(number),
                Sample(
                    data_source="puzzlevqa",
                    id=f"{path.stem}-{number}",
                    images=(_read(image),),
                    messages=_ask(question),
                    reward=_boxed(answer),
                    ability="puzzle",
                    demonstration=f"{reasoning}\n\\boxed{{{answer}}}",
                ),
            )


RECIPES = {"bccd": bccd, "puzzlevqa": puzzlevqa}


def convert(recipe: str, folder: Path, out: Path) -> list[Path]:
    """Run a recipe; writes and returns `{split}/{split}_{task}_{recipe}_{rows}.parquet`."""
    rows: dict[Path, list[dict[str, Any]]] = defaultdict(list)
    for split, sample in RECIPES[recipe](folder):
        task = sample.ability.removeprefix("cv_")
        rows[out / split / f"{split}_{task}_{recipe}"].append(schema.to_row(sample))
    files = {Path(f"{stem}_{len(part)}.parquet"): part for stem, part in sorted(rows.items())}
    for other in sorted(set(out.glob("*/*.parquet")) - set(files)):
        raise UserError(f"{other} is there already; give an empty folder with --out")
    for path, part in files.items():
        sources.write_parquet(part, path)
    return list(files)


def read_voc(path: Path) -> tuple[int, int, list[Box]]:
    """Width, height and boxes of a Pascal VOC file.

    Corners are distances from the picture's upper left corner and are cut at its border; a box
    without area is left out.
    """
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        boxes = []
        for item in root.iter("object"):
            x1, x2 = (_share(item, f"bndbox/{name}", width) for name in ("xmin", "xmax"))
            y1, y2 = (_share(item, f"bndbox/{name}", height) for name in ("ymin", "ymax"))
            kind = _text(item, "name")
            if x1 < x2 and y1 < y2:
                boxes.append(Box(_CELLS.get(kind, kind), (x1, y1, x2, y2)))
    except (ElementTree.ParseError, ValueError, ZeroDivisionError, OSError) as error:
        raise UserError(
            f"{path}: not a VOC annotation ({error}); expected size and object/bndbox elements"
        ) from error
    return width, height, boxes


def _ask(question: str) -> tuple[Message, ...]:
    return (Message("user", f"{schema.IMAGE}{question}"),)


def _boxed(answer: str) -> RewardConfig:
    return RewardConfig("mathverify", ground_truth=f"\\boxed{{{answer}}}", answer=answer)


def _detection(boxes: list[Box]) -> RewardConfig:
    answer = str([box.scaled(1000, 1000) for box in boxes])
    return RewardConfig(
        verifier="detection",
        ground_truth=f"<answer>\n{answer}\n</answer>",
        answer=answer,
        format_ratio=0.1,
        params={"det_verifier_normalized": True, "det_reward_ratio": schema.DETECTION_RATIOS},
    )


def _area(box: Box) -> float:
    x1, y1, x2, y2 = box.corners
    return (x2 - x1) * (y2 - y1)


def _whole(side: int) -> int:
    """The side in pixels as the model sees it: a whole number of image tokens."""
    return max(1, round(side / 28)) * 28


def _split(number: int) -> Literal["train", "test"]:
    return "test" if number % HELDOUT_EVERY == 0 else "train"


def _share(item: ElementTree.Element, path: str, whole: int) -> float:
    return min(max(float(_text(item, path)) / whole, 0.0), 1.0)


def _text(element: ElementTree.Element, path: str) -> str:
    found = element.findtext(path)
    if not found:
        raise ValueError(f"{path} is missing")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the recipe needs every picture") from error


def _files(folder: Path, pattern: str) -> list[Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: no {pattern} here; check --input")
    return files


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "recipe",
        choices=sorted(RECIPES),
        help="bccd: BCCD, blood cells with VOC boxes; puzzlevqa: PuzzleVQA, visual puzzles",
    )
    parser.add_argument("--input", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for its files alone; gets train/ and test/"
    )
    options = parser.parse_args(arguments)
    try:
        for path in convert(options.recipe, options.input, options.out):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
