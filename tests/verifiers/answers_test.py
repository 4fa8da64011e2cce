import time

import pytest

from vtriune_jax.verifiers.answers import (
    final_answer,
    normalized,
    number,
    numbers_in,
    true_answers,
)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>\n dog \n</answer>", "dog"),
        ("I use <answer> tags. <answer>cat</answer>", "cat"),
        (r"<think>\boxed{1}</think><answer>so \boxed{2}</answer>", "2"),
        (r"\boxed{1} no, \boxed{\text{a dog}}", "a dog"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{open", None),
        ("<answer>never closed", None),
        ("dog", None),
        ("<answer>" + "x" * 20_000 + "</answer>", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-1,234.5", -1234.5),
        ("−3", -3),
        ("$3.50.", 3.5),
        ("12 %", 0.12),
        (r"12\%", 0.12),
        ("1e3", 1000),
        (".5", 0.5),
        ("Seven", 7),
        ("1,23", None),
        ("1.2.3", None),
        ("42 dogs", None),
        ("", None),
        ("nan", None),
        ("1e999", None),
        ("inf", None),
    ],
)
def test_number(text, value):
    assert number(text) == value


def test_numbers_in_a_sentence():
    assert numbers_in("Of 1,000 dogs three are brown, not -2.5") == [1000, 3, -2.5]
    assert numbers_in("someone") == []


def test_normalized():
    assert normalized("  “The   DOG.” ") == normalized("the dog")
    assert normalized("ﬁne") == "fine"
    assert normalized("Straße") == "strasse"


def test_truths():
    assert true_answers(r"\boxed{a}", {"accepted": ["b"]}) == ["a", "b"]
    assert true_answers(" plain ", {}) == ["plain"]
    for truth, params in (("", {}), ("a", {"accepted": [7]})):
        with pytest.raises(ValueError, match="expected texts"):
            true_answers(truth, params)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 150_000,
        "<answer>" * 130_000 + "</answer>" * 130_000,
        "<answer>" + "1," * 8_000 + "</answer>",
        "{" * 2**20,
        "\\" * 2**20,
        "<answer>" + "9" * 16_000 + "</answer>",
    ],
)
def test_hostile_texts_are_answered_in_linear_time(text):
    start = time.process_time()
    numbers_in(final_answer(text) or text)
    normalized(text)
    assert time.process_time() - start < 20  # quadratic time would be minutes
