import itertools

import pytest

from vtriune_jax.verifiers import mathverify
from vtriune_jax.verifiers.mathverify import format_score, verify


def accuracy(completion, truth):
    return verify(completion, truth, {}, 0.0)["accuracy"]


@pytest.mark.parametrize(
    ("completion", "truth", "expected"),
    [
        (r"so \boxed{42}", r"\boxed{42}", 1),
        (r"\boxed{\frac{2}{4}}", r"\boxed{0.5}", 1),
        (r"\boxed{1,234}", r"\boxed{1234}", 1),
        (r"\boxed{1}. " + "Let me think again. " * 5 + r"\boxed{2}", r"\boxed{2}", 1),
        (r"\boxed{B}", r"\boxed{B}", 1),
        (r"\boxed{B}", r"\boxed{C}", 0),
        (r"\boxed{\text{yes}}", r"\boxed{\text{yes}}", 1),
        (r"the answer is $42$", "42", 1),
        ("42", r"\boxed{42}", 0),
        ("", r"\boxed{42}", 0),
        (r"\boxed{", r"\boxed{42}", 0),
    ],
)  # fmt: skip
def test_accuracy(completion, truth, expected):
    assert accuracy(completion, truth) == expected


@pytest.mark.parametrize("truth", ["", "yes", "   "])
def test_a_truth_that_cannot_be_read_is_an_error(truth):
    with pytest.raises(ValueError, match="cannot read the ground truth"):
        verify(r"\boxed{1}", truth, {}, 0.0)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0),
        ("<think>\na\n</think><answer>\nb\n</answer>", 0.5),
        ("<think>a</think><answer>b</answer>", 0.0),
        ("\n<answer>\nb\n</answer>", 0.5),
        ("<think>\n<think>\n", 0.0),
        ("<think>\r\n", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_a_quarter_per_tag(completion, expected):
    assert format_score(completion) == expected


def test_what_is_remembered_is_the_answer_to_this_truth():
    """The completions of a prompt share the truth and often the answer, which is compared once."""

    def judged(answer, truth):
        return accuracy(rf"attempt {next(number)}: \boxed{{{answer}}}", rf"\boxed{{{truth}}}")

    number = itertools.count()
    column = r"\begin{pmatrix} 1 \\ %d \end{pmatrix}"
    for _ in range(2):
        assert judged("1/2", "0.5") == judged("0.5", "1/2") == 1
        assert judged("1/2", "2") == judged("2", "0.5") == 0
        assert judged("www.example.com", "www.example.com") == 1
        assert judged("www.example.com", "www.example.org") == 0
        assert judged(column % 2, column % 2) == 1  # a SymPy matrix has no hash
        assert judged(column % 3, column % 2) == 0
    before = mathverify._right.cache_info()
    assert judged("1/2", "0.5") == 1
    after = mathverify._right.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_what_is_remembered_of_a_number_is_not_taken_for_a_percentage():
    """math-verify reads both as the text 50."""
    number, percentage = "answer: $50$", r"answer: $50$ \%"
    for truth in (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}"):
        for _ in range(2):
            assert accuracy(number, truth) == 0
            assert accuracy(percentage, truth) == 1
