import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtriune_jax.verifiers.detection import irregular
from vtriune_jax.verifiers.parsing import columns, last_answer, parse_boxes, parse_columns

DOG = ((1.0, 2.0, 3.0, 4.0), "dog")


def found(text):
    return [(box.coords, box.label) for box in parse_boxes(text)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>\n 4 \n</answer>", "4"),
        ("I will use <answer> tags. <answer>4</answer>", "4"),
        ("<answer>3</answer> no: <answer>4</answer>", "4"),
        ("<answer>4</answer>, as the <answer> says", "4"),
        ("<answer>4</answer>\n</answer>", "4"),
        ("<answer></answer>", ""),
        ("<answer>4", None),
        ("4</answer>", None),
        ("</answer><answer>", None),
        ("<ANSWER>4</ANSWER>", None),
        ("", None),
    ],
)
def test_the_last_complete_answer_counts(text, answer):
    assert last_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]",
        '[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]',
        "[{'BBOX_2D': [1.0, 2e0, 3, 4], 'Label': 'DOG', 'confidence': None, 'x': True}]",
        "[[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]]",
        "[{'bbox_2d': [[1, 2, 3, 4]], 'label': 'dog'}]",
        "```json\n[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]\n```",
        "```\n[{'bbox_2d': [1, 2, 3, 4], 'label': \"dog\"}]```",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}, {'bbox_2d': [1, 2",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}, {'bbox_2d': [1.0, 2, 3, 4], 'label': 'cat'}]",
        "[7, {'bbox_2d': [1, 2, 3], 'label': 'a'}, {'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]",
    ],
)
def test_notations_of_one_dog(text):
    assert found(text) == [DOG]


@pytest.mark.parametrize(
    "label",
    [
        "dog's bowl",
        "rock 'n' roll",
        'a "good" dog',
        "l'été, à midi",
        "back\\slash",
        "中",
        "[x]{y}",
        "",
    ],
)
def test_labels_with_quotes_survive_both_notations(label):
    row = {"bbox_2d": [1, 2, 3, 4], "label": label}
    assert found(repr([row])) == found(json.dumps([row])) == [(DOG[0], label)]


def test_an_unescaped_apostrophe_is_read_as_meant():
    assert found("[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog's bowl'}]") == [(DOG[0], "dog's bowl")]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "[]",
        "{}",
        "{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}",
        "[[[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]]]",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}] // done",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}],",
        "[{bbox_2d: [1, 2, 3, 4], label: 'dog'}]",
        "[{'bbox_2d': [01, 2, 3, 4], 'label': 'dog'}]",
        "[{'bbox_2d': (1, 2, 3, 4), 'label': 'dog'}]",
        "[{'bbox_2d': [3, 2, 1, 4], 'label': 'dog'}]",
        "[{'bbox_2d': ['1', 2, 3, 4], 'label': 'dog'}]",
        "[{'bbox_2d': [true, 2, 3, 4], 'label': 'dog'}]",
        "[{'bbox_2d': [1, 2, 3, 4], 'label': 7}]",
        '[{"bbox_2d": [NaN, 2, 3, 4], "label": "dog"}]',
        '[{"bbox_2d": [1, 2, Infinity, 4], "label": "dog"}]',
        "[{'bbox_2d': [1, 2, 1e999, 4], 'label': 'dog'}]",
        f"[{{'bbox_2d': [1, 2, 1{'0' * 400}, 4], 'label': 'dog'}}]",
        f"[{{'bbox_2d': [1, 2, 1{'0' * 5000}, 4], 'label': 'dog'}}]",
    ],
)
def test_what_is_no_list_of_boxes(text):
    assert found(text) == []


@pytest.mark.parametrize(
    "unit",
    ["{", "[", "'", '"', "\\", "' ", "<answer>", "</answer>", "```", " ", "\n", "'a'b", "9", "]["],
)
def test_a_megabyte_of_anything_is_answered_at_once(unit):
    start = time.process_time()
    text = f"<answer>{unit * (2**20 // len(unit))}</answer>"
    parse_boxes(last_answer(text) or text)
    short = unit * (2**18 // len(unit))
    for hostile in (short, f"[{short}", f"[{{'label': '{short}", f"```{short}```"):
        assert parse_boxes(hostile[: 2**18]) == []
    assert time.process_time() - start < 10


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="[]{}'\":,\\ \n`0aé-.<>", max_size=60) | st.text(max_size=60))
def test_any_text_is_answered(text):
    assert all(box.coords[0] <= box.coords[2] for box in parse_boxes(text))
    last_answer(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "bbox_2d": st.tuples(*[st.integers(0, 500)] * 2).map(
                    lambda corner: [*corner, corner[0] + 5, corner[1] + 7]
                ),
                "label": st.text(max_size=12),
            }
        ),
        max_size=4,
        unique_by=lambda row: tuple(row["bbox_2d"]),
    )
)
def test_what_python_and_json_print_is_read_back(rows):
    expected = [(tuple(map(float, row["bbox_2d"])), row["label"].lower()) for row in rows]
    assert found(json.dumps(rows)) == expected
    if all(row["label"].isprintable() for row in rows):
        assert found(repr(rows)) == expected


NUMBERS = st.one_of(
    st.integers(-5, 5), st.floats(allow_nan=False, width=32), st.booleans(), st.none(), st.just("1")
)
COORDS = st.one_of(
    st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, max_size=5), NUMBERS
)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"bbox_2d": st.lists(st.integers(0, 9), min_size=4, max_size=4)},
        optional={"label": st.sampled_from(["Dog", "ÄΣ", "true", 'a"b'])},
    ),
    st.fixed_dictionaries(
        {}, optional={"bbox_2d": COORDS, "LABEL": st.just("x"), "label": NUMBERS}
    ),
    NUMBERS,
)


@given(st.lists(ENTRIES, max_size=6), st.booleans())
def test_columns_are_the_boxes_wherever_these_are_regular(entries, python):
    text = repr(entries) if python else json.dumps(entries)
    found, boxes = parse_columns(text), parse_boxes(text)
    assert len(found.coords) == 32 * len(found.labels)
    if not irregular([found]):
        assert found == columns(boxes)
    else:
        assert len(found.labels) >= len(boxes)
