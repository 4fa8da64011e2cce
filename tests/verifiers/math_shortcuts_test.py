r"""What is answered without math-verify is what it answers: random numbers, near ones, and texts
around them of the kind that change what it reads."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from math_verify import parse
from math_verify import verify as equal

from tests.verifiers.cases import load_cases
from vtriune_jax.verifiers import mathverify
from vtriune_jax.verifiers.math_shortcuts import only_box, verdict

NATURAL = st.one_of(
    st.sampled_from([0, 1, 2, 4, 8, 9, 50, 100]), st.integers(0, 99), st.integers(0, 10**8 - 1)
).map(str)
SIGN = st.sampled_from(["", "", "-"])
DIGITS = st.text("0123456789", min_size=1, max_size=8)
NUMBER = st.one_of(
    st.builds("{}{}".format, SIGN, NATURAL),
    st.builds("{}{}.{}".format, SIGN, NATURAL, DIGITS),
    st.builds(r"{}\{}frac{{{}{}}}{{{}}}".format, SIGN, st.sampled_from(["", "d", "t"]), SIGN,
              NATURAL, NATURAL),
    st.builds(r"{}{}\sqrt{{{}}}".format, SIGN, st.one_of(st.just(""), NATURAL), NATURAL),
)  # fmt: skip
EXPRESSIONS = r"""
x^2+1 1+x^2 \frac{x}{2} 2\pi 50\% 50 1/2 \frac12 \frac{1}{2} 0.5 .5 A \text{(B)} \text{yes} yes
listen silent (1,2) [1,2] \{1,2\} 1,2 2,1 x=5 5 3:4 1,000 1000 12\text{cm} 12 x<3 3>x 90^\circ 90
0.333333 \frac{1}{3} 1.000001 1.0000014 1 \$5 5\,percent 2\text{and}3 {2} 007 -0
5. 1e5 10^5 −5 - 5\% 0.05 \frac84{2} -(-5) 5=5 5; \left(1,2\right) 1\,000 5! 5\! \infty ٥
"""
EXPRESSION = st.sampled_from([*EXPRESSIONS.split(), "", "12 cm", "2 and 3", "50 percent"])
AROUND = st.sampled_from(
    [
        *("{}", "x\n{}\n", "$ {} $", "so $x = {}$.", "$$y={}$$ done", r"\[ {} \]", r"\( {} \)"),
        *("a [ {} ] b", "we get {} percent", r"${}$ \%", "$ {} $ percent", "costs $5, {} or $7"),
        *("The final answer is ${}$. I hope it is right", "final answer is {} $4$, and $5$"),
        *("<think>\n{{ $q$\n</think>\n<answer>\n{}\n</answer>", "answer: $3$ {}", "[1, {} ] z"),
        *(r"{} and \fbox{{3}}", r"{} or \boxed{{2}}", r"\boxed {{3}} {}", r"\boxed{} {}", "{}}}"),
        *(r"{} }} \frac{{1}}{{2}} }}", r"\text{{a}} {} \text{{b}}", "$1$ and ${}$ and $2$"),
    ]
)


ANCHORED = st.sampled_from(
    [
        *("answer: ${}$", r"the answer is ${}$\%", "answer: $ {} $ percent", r"answer: \({}\)"),
        *("answer: $1$ and ${}$", "Final answer is $${}$$", r"answer: \[{}\] pct", "${}$"),
    ]
)


def by_math_verify(completion, truth):
    """Without any memory of ours; None for a truth that it cannot read."""

    def read(text, extraction):
        return parse(text, extraction, extraction_mode="first_match", parsing_timeout=0)

    gold, answer = read(truth, mathverify._GOLD), read(completion, mathverify._PREDICTION)
    return (bool(answer) and equal(gold, answer, timeout_seconds=None)) if gold else None


def both_agree(answer, truth, around, space=""):
    box = rf"\boxed{{{space}{answer}{space}}}"
    completion = around.replace("{{", "{").replace("}}", "}").replace("{}", box)
    agree(completion, rf"\boxed{{{truth}}}")


def agree(completion, truth):
    expected = by_math_verify(completion, truth)
    if expected is not None:
        assert mathverify.verify(completion, truth, {}, 0.0)["accuracy"] == expected, completion


quietly = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@settings(quietly, max_examples=150)
@given(NUMBER, NUMBER, AROUND, st.sampled_from(["", " "]))
@example("3", "3", "${}$ percent", "")
@example("9", r"\frac{9}{100}", "{}", "")
@example("0.5", "0.5", "{}", "")
@example(r"\frac{6}{4}", r"\frac{3}{2}", "{}", "")
@example(r"\frac{1}{0}", r"\frac{1}{0}", "{}", "")
@example(r"\sqrt{4}", "2", "{}", "")
@example("1.000001", "1.0000014", "{}", "")
@example("1.000001", "1.000005", "{}", "")
@example("-0", "0", "{}", "")
def test_numbers(answer, truth, around, space):
    both_agree(answer, truth, around, space)


@settings(quietly, max_examples=60)
@given(st.one_of(EXPRESSION, NUMBER), EXPRESSION, AROUND)
def test_expressions(answer, truth, around):
    both_agree(answer, truth, around)
    both_agree(truth, truth, around)


@settings(quietly, max_examples=60)
@given(st.one_of(EXPRESSION, NUMBER), EXPRESSION, ANCHORED)
@example("50", "0.5", "answer: ${}$")
@example("50", "0.5", r"the answer is ${}$\%")
def test_answers_without_a_box(answer, truth, around):
    agree(around.replace("{}", answer), rf"\boxed{{{truth}}}")


@pytest.mark.slow
@settings(quietly, max_examples=20_000)
@given(st.one_of(EXPRESSION, NUMBER), st.one_of(EXPRESSION, NUMBER), AROUND, ANCHORED)
def test_many_more(answer, truth, around, anchored):
    both_agree(answer, truth, around)
    agree(anchored.replace("{}", answer), rf"\boxed{{{truth}}}")


@pytest.mark.parametrize("digits", [1, 4, 6, 7, 8])
def test_the_same_number_written_differently(digits):
    """Decimals of fractions and surds, cut off at the place where the rounding decides."""
    for truth, value in ((r"\frac{1}{3}", 1 / 3), (r"\frac{22}{7}", 22 / 7), (r"\sqrt{2}", 2**0.5)):
        for shift in (0, 1e-6, 4e-6):
            both_agree(f"{value + shift:.{digits}f}", truth, "{}")
            both_agree(truth, f"{value + shift:.{digits}f}", "{}")


def test_the_recorded_cases():
    math = [case for case in load_cases().values() if case["verifier"] == "mathverify"]
    boxed = 0
    for case in math:
        completion, truth = case["response"], case["ground_truth"]
        agree(completion, truth)
        boxed += only_box(completion) is not None
    assert boxed > len(math) / 4


def test_usual_answers_need_no_math_verify():
    for answer, truth, right in (
        ("42", "42", True),
        ("42", "43", False),
        ("0.25", "0.26", False),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        (r"3\sqrt{2}", r"2\sqrt{3}", False),
        (r"-\dfrac{1}{2}", "-1", False),
    ):
        completion = rf"<think>\n{{…}}\n</think>\nIt is $\boxed{{{answer}}}$."
        box = only_box(completion)
        assert box
        assert verdict(box, rf"\boxed{{{truth}}}") is right
    for answer, truth in (("0.5", "0.5"), (r"\frac{1}{2}", "0.5"), ("50\\%", "0.5"), ("B", "B")):
        assert verdict(rf"\boxed{{{answer}}}", rf"\boxed{{{truth}}}") is None
    for text in (r"\boxed{1} \boxed{2}", r"$\boxed{1}$ percent", r"\boxed{}", r"\boxed{1"):
        assert only_box(text) is None
