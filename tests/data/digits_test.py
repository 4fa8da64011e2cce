import ast
import collections
import io
import re

import numpy as np
import pytest
from PIL import Image

from vtriune_jax.data import digits
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.router import Router


def picture(sample):
    return np.asarray(Image.open(io.BytesIO(sample.images[0])))


@pytest.fixture
def formal(monkeypatch):
    """Demonstrations in the form that verifiers read only."""
    monkeypatch.setattr(digits, "PLAIN", 0.0)


@pytest.mark.parametrize("task", digits.TASKS)
def test_a_quarter_of_the_demonstrations_is_in_plain_words(task):
    texts = [s.demonstration for s in digits.samples(task, "train", 400)]
    plain = [text for text in texts if "\\boxed" not in text and "<answer>" not in text]
    assert 0.2 < len(plain) / len(texts) < 0.3
    assert all(re.search(r"\d", text) for text in plain)


@pytest.mark.parametrize("task", digits.TASKS)
def test_rows_are_deterministic_and_do_not_depend_on_their_number(task):
    few, many = list(digits.samples(task, "train", 3)), list(digits.samples(task, "train", 5))
    assert few == many[:3]
    assert few != list(digits.samples(task, "train", 3, seed=1))
    assert few != list(digits.samples(task, "heldout", 3))
    assert len({s.id for s in many}) == 5
    assert all(s.data_source == f"digits_{task}" for s in many)
    assert all(s.messages[0].content.startswith("<image>") for s in many)


@pytest.mark.parametrize(
    ("task", "size"),
    [
        ("counting", (84, 84)),
        ("ocr", (28, 84)),
        ("math", (28, 56)),
        ("detection", (56, 112)),
        ("grounding", (84, 84)),
    ],
)
def test_canvases_are_whole_image_tokens(task, size):
    assert all(picture(s).shape == (*size, 3) for s in digits.samples(task, "train", 3))


def test_train_and_heldout_use_different_digit_images(monkeypatch):
    used = collections.defaultdict(set)
    glyphs, values = digits._glyphs()
    assert glyphs.shape == (1797, 24, 24)

    class Spy:
        def __getitem__(self, index):
            used[split].add(int(index))
            return glyphs[index]

    monkeypatch.setattr(digits, "_glyphs", lambda: (Spy(), values))
    for split in ("train", "heldout"):
        for task in digits.TASKS:
            list(digits.samples(task, split, 60))
    assert not used["train"] & used["heldout"]
    assert {digit % 5 for digit in used["heldout"]} == {4}
    assert len(used["train"]) > 300
    assert len(used["heldout"]) > 200


def test_counting_counts_what_its_demonstration_reads(formal):
    counts = collections.Counter()
    for sample in digits.samples("counting", "train", 200):
        asked = re.findall(r"\d", sample.messages[0].content)
        seen, answer = re.fullmatch(
            r"I see ((?:\d ?)+)\.\n\\boxed\{(\d)\}", sample.demonstration
        ).groups()
        assert 2 <= len(seen.split()) <= 6
        assert seen.split().count(asked[0]) == int(answer)
        assert sample.reward.ground_truth == f"\\boxed{{{answer}}}"
        counts[answer] += 1
    assert set(counts) == set("01234")


def test_ocr_numbers():
    numbers = [s.reward.answer for s in digits.samples("ocr", "train", 100)]
    assert {len(n) for n in numbers} == {1, 2, 3}
    assert all(n[0] != "0" for n in numbers)


def test_math_demonstrations_are_right_and_closed(formal):
    for sample in digits.samples("math", "train", 200):
        left, sign, right, result = re.fullmatch(
            r"<think>\n(\d) ([+*-]) (\d) = (\d+)\n</think>\n<answer>\n\\boxed\{\4\}\n</answer>",
            sample.demonstration,
        ).groups()
        a, b = int(left), int(right)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert sample.reward.format_ratio == 0.1


@pytest.mark.parametrize("task", ["detection", "grounding"])
def test_boxes_agree_in_pixels_and_on_the_grid(task, formal):
    numbers = collections.Counter()
    for sample in digits.samples(task, "train", 100):
        predicted = ast.literal_eval(sample.demonstration.split("\n")[2])
        truth = ast.literal_eval(sample.reward.ground_truth.split("\n")[1])
        height, width = picture(sample).shape[:2]
        scale = np.array([width, height, width, height]) / 1000 if task == "detection" else 1
        assert sample.reward.params["det_verifier_normalized"] == (task == "detection")
        asked = re.search(r"\d", sample.messages[0].content)[0]
        for box, real in zip(predicted, truth, strict=True):
            assert box["label"] == real["label"] == asked
            np.testing.assert_allclose(np.array(real["bbox_2d"]) * scale, box["bbox_2d"])
            x1, y1, x2, y2 = box["bbox_2d"]
            cell = picture(sample)[y1:y2, x1:x2].astype(float)
            assert cell.max() - cell.min() > 60, "nothing is drawn in the box"
        assert predicted == sorted(predicted, key=lambda b: (b["bbox_2d"][1], b["bbox_2d"][0]))
        numbers[len(predicted)] += 1
    assert set(numbers) == ({1, 2} if task == "detection" else {1})


def test_as_many_bright_cells_as_digits(formal):
    for sample in digits.samples("counting", "heldout", 20):
        image = picture(sample).astype(float).max(-1)
        cells = image.reshape(3, 28, 3, 28).max((1, 3))
        assert (cells > 200).sum() == len(re.findall(r"\d", sample.demonstration)) - 1


def test_formal_demonstrations_earn_the_whole_reward(formal):
    samples = [s for task in digits.TASKS for s in digits.samples(task, "heldout", 8)]
    items = [Item(s.demonstration, s.reward, 1.0, (picture(s).shape[:2],)) for s in samples]
    router = Router(workers=1)
    verdicts = router.score(items)
    router.close()
    assert [v.score for v in verdicts] == pytest.approx([1.0] * len(samples))
