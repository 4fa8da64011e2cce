import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vtriune_jax.charts import dumbbell, legend, line_chart, ticks

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.13, 0.48, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (1, 360, [0, 100, 200, 300, 400]),
        (0.0, 0.0, [0.0, 0.5, 1.0]),
        (-3.0, -3.0, [-6.0, -4.0, -2.0, 0.0]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@given(FINITE, FINITE)
@example(5e-324, 5e-324)
@example(-5e-324, 5e-324)
@example(5e-324, 1e-246)
def test_ticks_enclose_any_range(a, b):
    found = ticks(min(a, b), max(a, b))
    slack = 1e-6 * (abs(a) + abs(b) + 1)
    assert 2 <= len(found) <= 8
    assert found[0] <= min(a, b) + slack
    assert found[-1] >= max(a, b) - slack


def strokes(figure: str) -> list[str]:
    tree = ElementTree.fromstring(figure)
    return [e.attrib["d"] for e in tree.iter("path") if e.attrib["class"].endswith(" line")]


def test_a_line_goes_from_the_left_bottom_to_the_right_top():
    [stroke] = strokes(line_chart("x", {"all": [(0, 0.0), (10, 1.0)]}))
    assert stroke == "M44.0 178.0L352.0 14.0"


def test_stages_are_marked_and_their_lines_apart():
    figure = line_chart("x", {"all": [(s, 1.0 + s) for s in range(10)]}, [(0, "sft"), (4, "grpo")])
    assert figure.count('class="mark"') == 2
    assert strokes(figure)[0].count("M") == 2
    late = line_chart("x", {"all": [(s, 1.0) for s in range(6, 9)]}, [(0, "sft"), (4, "grpo")])
    assert late.count('class="mark"') == 1
    assert ">sft<" not in late


def test_long_series_are_thinned_and_keep_their_mean():
    points = [(step, float(step % 2)) for step in range(10_000)]
    [stroke] = strokes(line_chart("x", {"all": points}))
    heights = [
        float(pair.split()[1]) for pair in stroke[1:].replace("L", ",").split(",") if " " in pair
    ]
    assert len(stroke) < 4000
    assert all(math.isfinite(height) for height in heights)


def test_a_single_point_and_a_constant_are_drawn():
    assert strokes(line_chart("x", {"a": [(7, 2.0)]})) == ["M44.0 96.0L44.0 96.0"]
    ElementTree.fromstring(line_chart("x", {"a": [(1, 0.0), (2, 0.0)]}))


def test_names_are_escaped_and_unknown_ones_get_a_legend():
    figure = line_chart("a < b", {"<b>": [(0, 1.0)]}, [(0, "<i>")])
    ElementTree.fromstring(figure)
    assert "<b>" not in figure
    assert "<i>" not in figure
    assert 'class="legend"' in figure
    assert 'class="legend"' not in line_chart("x", {"a": [(0, 1.0)]}, (), {"a": 3})
    assert legend({"x": 9}) == '<ul class="legend"><li class="c1">x</li></ul>'


def test_dumbbells_say_which_way():
    assert 'class="dumbbell up"' in dumbbell(0.1, 0.4)
    assert 'class="dumbbell down"' in dumbbell(0.4, 0.1)
