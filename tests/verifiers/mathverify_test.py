import pytest

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
