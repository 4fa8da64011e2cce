"""The built-in data: scikit-learn's handwritten digits composed into small visual tasks.

1,797 real 8×8 pictures of digits, enlarged and pasted on canvases made of cells of 28×28 pixels;
28 pixels are one image token of Qwen2.5-VL (patches of 14, merged 2×2). Every fifth digit is held
out: training rows use the other 1,438 only, held-out rows these 359. A box is *the cell* of its
digit, in pixels [x1, y1, x2, y2]: the digit itself (24×24, moved by up to 2 pixels) fills nearly
all of it.

As in instruction data collected from people, one demonstration in four has the right answer in
plain words, without the box or tags that the prompt or the verifier asks for. So after the
supervised stage some completions go unrewarded for their form, some for their content; GRPO works
on both.

| task      | canvas  | question                              | judged by                       |
|-----------|---------|---------------------------------------|---------------------------------|
| counting  | 84×84   | how many of a digit                   | mathverify, free form           |
| ocr       | 84×28   | read the number                       | mathverify, free form           |
| math      | 56×28   | sum, difference, product of two       | mathverify, think/answer tags   |
| detection | 112×56  | boxes of every instance of a digit    | detection, 0..1000 ground truth |
| grounding | 84×84   | box of one digit                      | detection, pixel ground truth   |
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from vtriune_jax.data.schema import DETECTION_RATIOS, IMAGE
from vtriune_jax.types import Message, RewardConfig, Sample

CELL = 28
PLAIN = 0.25
"""Share of demonstrations that answer in plain words."""

Cells = dict[tuple[int, int], int]
"""(row, column) of a cell → the digit in it; in reading order."""
Answer = tuple[str, str, RewardConfig]
"""Question, demonstration, reward."""

_COUNT = (
    "How many times does the digit {d} appear?",
    "Count the digit {d} in the picture.",
    "How often do you see a {d}?",
    "How many of the digits are a {d}?",
    "Tell me how many {d}s there are.",
)
_READ = (
    "Which number is written here?",
    "Read the number in the picture.",
    "What number do you see?",
    "Write down the number that is shown.",
    "What does the picture say?",
)
_SUM = (
    "What is the sum of the two digits?",
    "Add the two digits.",
    "What is the left digit plus the right digit?",
)
_DIFFERENCE = (
    "What is the difference of the two digits?",
    "Subtract the smaller digit from the larger one.",
    "By how much do the two digits differ?",
)
_PRODUCT = (
    "What is the product of the two digits?",
    "Multiply the two digits.",
    "What is the left digit times the right digit?",
)
_DETECT = (
    "Find all {d}s.",
    "Locate every digit {d}.",
    "Where are the {d}s?",
    "Detect each {d} in the picture.",
    "Mark all digits that are a {d}.",
)
_GROUND = (
    "Where is the digit {d}?",
    "Locate the {d}.",
    "Find the digit {d}.",
    "Point out the {d}.",
    "Give the place of the digit {d}.",
)
_BOX_FORMAT = '\n<answer>\n[{{"bbox_2d":[x1,y1,x2,y2],"label":"{d}"}}]\n</answer>'
_BOXES = " Say how many, then give boxes in pixels:" + _BOX_FORMAT
_BOX = " Comment first, then give its box in pixels:" + _BOX_FORMAT


def samples(
    task: str, split: Literal["train", "heldout"], count: int, seed: int = 0
) -> Iterator[Sample]:
    """The first `count` rows of a task; row k depends on (seed, task, split, k) alone."""
    make = TASKS[task]
    for index in range(count):
        key = [seed, list(TASKS).index(task), ("train", "heldout").index(split), index]
        rng = np.random.default_rng(key)
        shape, cells, (question, demonstration, reward) = make(rng)
        yield Sample(
            data_source=f"digits_{task}",
            id=f"{task}-{split}-{seed}-{index}",
            images=(_png(_draw(shape, cells, split, rng)),),
            messages=(Message("user", f"{IMAGE}{question}"),),
            reward=reward,
            ability={"detection": "cv_detection", "grounding": "cv_grounding"}.get(task, task),
            demonstration=demonstration,
        )


def texts() -> Iterator[str]:
    """Questions and demonstrations of all tasks, for a tokenizer to learn from."""
    for task in TASKS:
        for sample in samples(task, "train", 200):
            yield sample.messages[-1].content.replace(IMAGE, "")
            yield sample.demonstration


# --------------------------------------------------------------------------------------- tasks


def _counting(rng: np.random.Generator) -> tuple[tuple[int, int], Cells, Answer]:
    alphabet = rng.choice(10, size=3, replace=False)
    count = int(rng.integers(0, 5))
    others = int(rng.integers(max(0, 2 - count), 7 - count))
    values = [alphabet[0]] * count + list(rng.choice(alphabet[1:], size=others))
    values = rng.permutation(values).tolist()
    cells = {divmod(k, 3): value for k, value in enumerate(values)}
    seen = " ".join(map(str, values))
    question = _pick(rng, _COUNT).format(d=alphabet[0])
    demonstration = _or_plainly(rng, f"I see {seen}.\n\\boxed{{{count}}}", f"There are {count}.")
    return (3, 3), cells, (question, demonstration, _math(count))


def _ocr(rng: np.random.Generator) -> tuple[tuple[int, int], Cells, Answer]:
    length = int(rng.integers(1, 4))
    values = [int(rng.integers(1, 10)), *rng.integers(0, 10, size=length - 1).tolist()]
    cells = {(0, k): value for k, value in enumerate(values)}
    number = "".join(map(str, values))
    demonstration = _or_plainly(rng, f"\\boxed{{{number}}}", f"It says {number}.")
    return (1, 3), cells, (_pick(rng, _READ), demonstration, _math(number))


def _arithmetic(rng: np.random.Generator) -> tuple[tuple[int, int], Cells, Answer]:
    left, right = (int(v) for v in rng.integers(0, 10, size=2))
    cells = {(0, 0): left, (0, 1): right}
    high, low = max(left, right), min(left, right)
    texts, work, result = (
        (_SUM, f"{left} + {right}", left + right),
        (_DIFFERENCE, f"{high} - {low}", high - low),
        (_PRODUCT, f"{left} * {right}", left * right),
    )[int(rng.integers(3))]
    demonstration = _or_plainly(
        rng,
        f"<think>\n{work} = {result}\n</think>\n<answer>\n\\boxed{{{result}}}\n</answer>",
        f"It is {result}.",
    )
    return (1, 2), cells, (_pick(rng, texts), demonstration, _math(result, format_ratio=0.1))


def _detection(rng: np.random.Generator) -> tuple[tuple[int, int], Cells, Answer]:
    target = int(rng.integers(10))
    count = int(rng.choice([1, 2], p=[0.6, 0.4]))
    others = int(rng.integers(1, 5 - count))
    different = [digit for digit in range(10) if digit != target]
    shape = (2, 4)
    cells = _scatter(rng, shape, [target] * count + list(rng.choice(different, size=others)))
    places = [place for place, digit in cells.items() if digit == target]
    question = (_pick(rng, _DETECT) + _BOXES).format(d=target)
    demonstration, reward = _boxes(rng, f"I see {count}.", target, places, normalize=shape)
    return shape, cells, (question, demonstration, reward)


def _grounding(rng: np.random.Generator) -> tuple[tuple[int, int], Cells, Answer]:
    values = rng.choice(10, size=int(rng.integers(2, 5)), replace=False).tolist()
    cells = _scatter(rng, (3, 3), values)
    places = [place for place, digit in cells.items() if digit == values[0]]
    question = (_pick(rng, _GROUND) + _BOX).format(d=values[0])
    demonstration, reward = _boxes(rng, "I see it.", values[0], places)
    return (3, 3), cells, (question, demonstration, reward)


TASKS: dict[str, Callable[[np.random.Generator], tuple[tuple[int, int], Cells, Answer]]] = {
    "counting": _counting,
    "ocr": _ocr,
    "math": _arithmetic,
    "detection": _detection,
    "grounding": _grounding,
}


def _math(value: int | str, format_ratio: float = 0.0) -> RewardConfig:
    return RewardConfig(
        verifier="mathverify",
        ground_truth=f"\\boxed{{{value}}}",
        answer=str(value),
        format_ratio=format_ratio,
    )


def _boxes(
    rng: np.random.Generator,
    thought: str,
    digit: int,
    places: Sequence[tuple[int, int]],
    *,
    normalize: tuple[int, int] | None = None,
) -> tuple[str, RewardConfig]:
    """Demonstration and reward; the format asks for a line break before `<answer>`.

    The demonstration is in pixels, the truth too, unless `normalize` says of how many rows and
    columns the canvas is: then it is on V-Triune's grid of 0…1000 in both directions.
    """

    def corners(height: int, width: int) -> list[list[int]]:
        return [[c * width, r * height, (c + 1) * width, (r + 1) * height] for r, c in places]

    pixels = corners(CELL, CELL)
    truth = corners(1000 // normalize[0], 1000 // normalize[1]) if normalize else pixels
    answer = str([{"bbox_2d": box, "label": str(digit)} for box in truth])
    compact = json.dumps(
        [{"bbox_2d": box, "label": str(digit)} for box in pixels], separators=(",", ":")
    )
    reward = RewardConfig(
        verifier="detection",
        ground_truth=f"<answer>\n{answer}\n</answer>",
        answer=answer,
        format_ratio=0.1,
        params={"det_verifier_normalized": bool(normalize), "det_reward_ratio": DETECTION_RATIOS},
    )
    plain = f"{thought} " + "; ".join(str(box) for box in pixels)
    return _or_plainly(rng, f"{thought}\n<answer>\n{compact}\n</answer>", plain), reward


def _or_plainly(rng: np.random.Generator, formal: str, plain: str) -> str:
    """The form that verifiers read or, in one demonstration of four, the answer in plain words."""
    return plain if rng.random() < PLAIN else formal


def _pick(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]


def _scatter(rng: np.random.Generator, shape: tuple[int, int], values: Sequence[int]) -> Cells:
    """Put the values into different cells, at random; the result is in reading order."""
    rows, columns = shape
    places = rng.choice(rows * columns, size=len(values), replace=False)
    return {divmod(int(p), columns): int(v) for p, v in sorted(zip(places, values, strict=True))}


# ------------------------------------------------------------------------------------ pictures


def is_heldout(digit: np.ndarray) -> np.ndarray:
    """Whether digits (by their number in scikit-learn's data) appear in held-out rows only."""
    return digit % 5 == 4


@functools.cache
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """All digits as [1797, 24, 24] in 0..1, and their values [1797]."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = np.asarray(digits.images / 16 * 255, np.uint8)
    large = [
        np.asarray(Image.fromarray(g).resize((24, 24), Image.Resampling.BICUBIC)) for g in grey
    ]
    return np.stack(large).astype(np.float32) / 255, digits.target


def _draw(
    shape: tuple[int, int],
    cells: Cells,
    split: Literal["train", "heldout"],
    rng: np.random.Generator,
) -> Image.Image:
    """Bright digits on a ground that gets redder to the right and bluer to the bottom.

    So a model without pre-training can tell places apart: Qwen2.5-VL knows positions only relative
    to each other, and needs long training to count from the border.
    """
    glyphs, values = _glyphs()
    allowed = is_heldout(np.arange(len(values))) == (split == "heldout")
    height, width = shape[0] * CELL, shape[1] * CELL
    canvas = np.full((height, width, 3), rng.uniform(90, 110), np.float32)
    canvas[..., 0] += np.linspace(-60, 60, 4 * CELL)[None, :width]
    canvas[..., 2] += np.linspace(-60, 60, 4 * CELL)[:height, None]
    for (row, column), value in cells.items():
        glyph = glyphs[rng.choice(np.flatnonzero(allowed & (values == value)))][..., None]
        y, x = np.array([row, column]) * CELL + 2 + rng.integers(-2, 3, size=2)
        ink = rng.uniform(215, 255)
        part = canvas[y : y + 24, x : x + 24]
        part += glyph * (ink - part)
    return Image.fromarray(canvas.round().astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
