"""The verifiers of short answers, each by its published formula, and all under hostile texts."""

import json
import math

import pytest

from vtriune_jax.verifiers import (
    counting,
    edit_distance,
    exact,
    grounding,
    json_format,
    known_verifiers,
    load,
    multiple_choice,
    numeric,
    vqa,
)
from vtriune_jax.verifiers.edit_distance import levenshtein


def parts(verifier, answer, truth, **params):
    return verifier.verify(f"<answer>{answer}</answer>", truth, params, 0.5)


def accuracy(*args, **params):
    return parts(*args, **params)["accuracy"]


@pytest.mark.parametrize(
    "verifier", [exact, edit_distance, counting, numeric, multiple_choice, vqa]
)
def test_format_is_an_answer_that_is_marked(verifier):
    truth = "3" if verifier in (counting, numeric) else "A"
    assert verifier.verify(rf"so \boxed{{{truth}}}", truth, {}, 0.0) | {"error": 0} == {
        "accuracy": 1.0, "format": 1.0, "error": 0,
    }  # fmt: skip
    assert verifier.verify(truth, truth, {}, 0.0) == {"accuracy": 0.0, "format": 0.0}
    assert parts(verifier, "nothing like it", truth) == {"accuracy": 0.0, "format": 1.0}
    with pytest.raises(ValueError, match="ground truth"):
        parts(verifier, truth, "")


def test_exact():
    assert accuracy(exact, " The  Dog. ", "the dog") == 1
    assert accuracy(exact, "the dog", "a dog") == 0
    assert accuracy(exact, "The dog", "the dog", case_sensitive=True) == 0
    assert accuracy(exact, "hound", "dog", accepted=["hound"]) == 1


@pytest.mark.parametrize(
    ("left", "right", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2),
     ("intention", "execution", 5)],
)  # fmt: skip
def test_levenshtein(left, right, distance):
    assert levenshtein(left, right) == levenshtein(right, left) == distance


def test_edit_distance_is_anls():
    assert accuracy(edit_distance, "Hello Wor1d", "hello  world") == pytest.approx(10 / 11)
    assert accuracy(edit_distance, "abcx", "abyz") == pytest.approx(0.5)
    assert accuracy(edit_distance, "abxx", "abyz", threshold=0.6) == 0
    assert accuracy(edit_distance, "axxx", "abyz") == 0
    assert accuracy(edit_distance, "axxx", "abyz", threshold=0.0) == pytest.approx(0.25)
    assert accuracy(edit_distance, "cat", "dog", accepted=["cats"]) == pytest.approx(0.75)
    assert accuracy(edit_distance, "x" * 16_000, "short") == 0
    with pytest.raises(ValueError, match="threshold=2"):
        accuracy(edit_distance, "a", "a", threshold=2)


@pytest.mark.parametrize(
    ("answer", "expected"), [("3", 1), ("three", 1), ("There are 3 dogs.", 1), ("of 5, 3", 1),
                             ("3.0", 1), ("3, not 4", 0), ("many", 0)],
)  # fmt: skip
def test_counting(answer, expected):
    assert accuracy(counting, answer, r"\boxed{3}") == expected


def test_counting_with_tolerance():
    assert parts(counting, "12", "10", tolerance=2) == {"accuracy": 1, "format": 1, "error": 2}
    assert parts(counting, "13", "10", tolerance=2) == {"accuracy": 0, "format": 1, "error": 3}
    with pytest.raises(ValueError, match="'many' is not a number"):
        accuracy(counting, "3", "many")


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [("105", "100", 1), ("95", "100", 1), ("105.1", "100", 0), ("-100", "100", 0), ("0", "0", 1),
     ("0.001", "0", 0), ("12%", "0.12", 1), ("12", "12%", 0), ("1,050", "1000", 1),
     ("North America", "north america", 1), ("Europe", "north america", 0), ("1999", "y1999", 0)],
)  # fmt: skip
def test_numeric_is_relaxed_accuracy(answer, truth, expected):
    assert accuracy(numeric, answer, truth) == expected


def test_numeric_tolerance_is_a_parameter():
    assert accuracy(numeric, "104", "100", tolerance=0.03) == 0
    assert accuracy(numeric, "102", "100", tolerance=0.03) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("B", 1), ("(b)", 1), ("**B**", 1), ("B. a dog", 1), ("(B) a dog", 1), ("B: dog", 1),
     ("The answer is B", 1), ("Option (B)", 1), ("the answer is A or maybe. No: answer: B", 1),
     ("A", 0), ("A, B", 0), ("A dog", 0), ("Because", 0), ("", 0)],
)  # fmt: skip
def test_multiple_choice(answer, expected):
    assert accuracy(multiple_choice, answer, "B") == expected


def test_multiple_choice_with_several_letters_and_with_texts():
    for answer in ("A, C", "c and a", "A/C", "(A) (C)", "A; C"):
        assert accuracy(multiple_choice, answer, "A, C") == 1
    assert accuracy(multiple_choice, "A", "A, C") == 0
    choices = ["a cat", "a dog"]
    assert accuracy(multiple_choice, "A dog.", "B", choices=choices) == 1
    assert accuracy(multiple_choice, "A dog.", "a dog", choices=choices) == 1
    with pytest.raises(ValueError, match="names no option"):
        accuracy(multiple_choice, "A", "the cat")


def test_vqa_soft_accuracy():
    said = ["two"] * 2 + ["2"] + ["three"] * 2 + ["a couple"]
    assert accuracy(vqa, "2", "2", answers=said) == 1
    assert accuracy(vqa, "Three!", "2", answers=said) == pytest.approx(2 / 3)
    assert accuracy(vqa, "couple", "2", answers=said) == pytest.approx(1 / 3)
    assert accuracy(vqa, "four", "2", answers=said) == 0
    assert accuracy(vqa, "the dog's", "dogs") == 1
    assert accuracy(vqa, "3.5, 7:30", "3.5 7:30") == 1


BOX = "[{'bbox_2d': [100, 100, 300, 300], 'label': 'dog'}]"


@pytest.mark.parametrize(
    ("answer", "iou"),
    [(BOX, 1), ("[100, 100, 300, 300]", 1), ("(100,100),(300,300)", 1),
     ("[{'bbox_2d': [115, 100, 315, 300]}]", 185 / 215), ("[0, 0, 50, 50]", 0),
     ('{"bbox_2d": [100, 100, 300, 300], "label": "dog"}', 1),
     ('```json\n{"bbox_2d": [100, 100, 300, 300]}\n```', 1)],
)  # fmt: skip
def test_grounding_of_a_box(answer, iou):
    found = parts(grounding, answer, BOX, iou_threshold=0.5)
    assert found == pytest.approx({"accuracy": iou, "format": 1, "iou": iou, "iou_50": iou})


def test_groundings_threshold_is_detections():
    shifted = "[115, 100, 315, 300]"
    assert accuracy(grounding, shifted, BOX, iou_threshold=0.9) == 0
    assert accuracy(grounding, shifted, BOX) == 0  # dynamic, at half of the training: 0.99
    average = accuracy(grounding, shifted, BOX, iou_threshold="average")
    assert average == pytest.approx(8 / 11 * 185 / 215)
    pixels = {"det_verifier_normalized": True, "grid": [(500, 2000)], "iou_threshold": 0.9}
    assert accuracy(grounding, "[200, 50, 600, 150]", BOX, **pixels) == pytest.approx(1)
    with pytest.raises(ValueError, match="size of the processed image"):
        accuracy(grounding, BOX, BOX, det_verifier_normalized=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("[200, 200]", (1, 1)), ("(300, 100)", (1, 1)), ("[{'point_2d': [301, 200]}]", (0, 1)),
     ("[[200, 200]]", (1, 1)), ("[1, 2, 3]", (0, 0)), ("here", (0, 0)), ("[NaN, 1]", (0, 0))],
)  # fmt: skip
def test_grounding_of_a_point(answer, expected):
    found = parts(grounding, answer, BOX, point=True)
    assert (found["accuracy"], found["format"]) == expected


def test_grounding_wants_one_box():
    two = BOX[1:-1] + ", " + BOX[1:-1].replace("300]", "301]")
    for answer in (f"[{two}]", two, "{}", "[]", "[300, 300, 100, 100]", "[1, 2, 3]", ""):
        assert parts(grounding, answer, BOX)["format"] == 0
        assert accuracy(grounding, answer, BOX, iou_threshold=0.0) == 0
    with pytest.raises(ValueError, match="not one box"):
        parts(grounding, BOX, "[]")


SCHEMA = {
    "type": "object",
    "required": ["name", "count"],
    "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [('{"name": "Dog", "count": 3}', (1, 1)),
     ('```json\n{"name": "dog", "count": 3.0}\n```', (1, 1)),
     ('{"name": "cat", "count": 3}', (0.5, 1)),
     ('{"name": "dog", "count": 3, "x": [1, 2]}', (2 / 3, 1)),
     ('{"name": "dog"}', (0, 0)), ('{"name": "dog", "count": "3"}', (0, 0)), ("dog", (0, 0))],
)  # fmt: skip
@pytest.mark.parametrize("as_text", [True, False])
def test_json_of_a_schema(answer, expected, as_text):
    schema = json.dumps(SCHEMA) if as_text else SCHEMA
    found = parts(json_format, answer, '{"name": "dog", "count": 3}', schema=schema)
    assert (found["accuracy"], found["format"]) == pytest.approx(expected)


def test_json_without_truth_or_tags():
    assert json_format.verify("[1, 2]", "", {}, 0.0) == {"accuracy": 1, "format": 1}
    assert json_format.verify("[1, 2", "", {}, 0.0) == {"accuracy": 0, "format": 0}
    assert accuracy(json_format, "{}", "{}") == 1
    assert accuracy(json_format, "[true]", "[1]") == 0
    for truth, schema in (("{", {}), ("{}", {"type": "nonsense"}), ("{}", "{")):
        with pytest.raises(ValueError, match="at fault"):
            parts(json_format, "{}", truth, schema=schema)


HOSTILE = [
    "", "\0", "\ud800", "[" * 50_000, '{"a":' * 50_000, "{" * 2**20, r"\boxed{" * 10_000,
    "[NaN, 1e999, -1e999, 0]", "9" * 10_000, "1" + "0" * 5_000, "a" * 2**20, "A, " * 5_000,
    " " * 16_000 + "!", "answer is " * 1_600, "-" * 16_000, ",".join("1" * 8_000),
    str([{"bbox_2d": [k, 0, k + 9, 9], "label": "dog"} for k in range(10_000)]),
    '{"name": ' + "9" * 400 + ', "count": 1}', "[[[[]]]]" * 2_000,
]  # fmt: skip
TRUTHS = {"counting": "3", "detection": BOX, "grounding": BOX, "json_format": "{}", "numeric": "3"}


@pytest.mark.parametrize("name", sorted(set(known_verifiers()) - {"mathverify"}))
def test_hostile_answers_earn_no_accuracy_and_cause_no_exception(name):
    params = {"verifiers": [{"name": "exact"}]} if name == "combination" else {}
    if name == "json_format":
        params = {"schema": {"type": "object", "required": ["none of these"]}}
    verify = load(name).verify
    for text in HOSTILE:
        for completion in (text, f"<answer>{text}</answer>", rf"\boxed{{{text}}}"):
            found = verify(completion, TRUTHS.get(name, "B"), params, 0.5)
            assert found["accuracy"] == 0, text[:80]
            assert all(math.isfinite(value) for value in found.values())
