"""Columns: missing ones, those of another type, and those that rows need not have."""

import json

import pytest

from tests.data.conftest import png
from tests.data.sources_test import error_of, row, write_plain
from vtriune_jax.data import sources


@pytest.mark.parametrize("as_text", [False, True])
def test_objects_may_be_json_in_a_text(tmp_path, as_text):
    params = {"det_verifier_normalized": True, "det_reward_ratio": {"map": 0.5}}
    extra = {"id": 3, "demonstration": "It is 4"}
    given = [json.dumps(each) if as_text else each for each in (params, extra)]
    cells = row(reward_model__verifier_parm=given[0], extra_info=given[1])
    path = write_plain(tmp_path / "a.parquet", cells)
    (read,) = sources.load(path, "train")
    assert read.reward.params == params
    assert (read.id, read.demonstration) == ("3", "It is 4")
    assert read.where == f"{path} row 0"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("reward_model__answer", 4, "column reward_model.answer is int64, expected string"),
        ("reward_model__verifier_parm", [1], "column reward_model.verifier_parm is list<"),
        ("ability", 4, "column ability is int64, expected string"),
        ("extra_info", 4, "column extra_info is int64, expected struct or JSON in a string"),
        ("extra_info", {"demonstration": 4}, "column extra_info.demonstration is int64"),
        ("images", [{"bytes": 4}], "column images is list<"),
        ("images", [{"path": 4}], "column images is list<"),
    ],
)
def test_columns_of_a_type_that_is_not_theirs(tmp_path, name, value, expected):
    assert expected in error_of(write_plain(tmp_path / "a.parquet", row(**{name: value})))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("extra_info", "{", "extra_info is '{', expected a JSON object"),
        ("extra_info", '{"demonstration": 4}', "extra_info.demonstration is 4, expected a text"),
        ("reward_model__verifier_parm", "[1]", "verifier_parm is '[1]', expected a JSON object"),
        ("reward_model__verifier_parm", '{"json": 5}', "verifier_parm.json is 5, expected"),
    ],
)
def test_texts_that_are_not_the_object_they_should_be(tmp_path, name, value, expected):
    path = write_plain(tmp_path / "bad.parquet", row(**{name: None}), row(**{name: value}))
    text = error_of(path)
    assert text.startswith(f"{path} row 1: ")
    assert expected in text
    source = sources.load(path, "train", on_bad_row="skip")
    assert (len(source), source.skipped, source.first_fault) == (1, 1, text)


@pytest.mark.parametrize("name", ["data_source", "images", "prompt", "reward_model"])
def test_missing_columns(tmp_path, name):
    cells = row()
    del cells[name]
    text = error_of(write_plain(tmp_path / "a.parquet", cells))
    assert f"column {name}" in text
    assert "is missing (found:" in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("data_source", 3, "column data_source is int64, expected string"),
        ("prompt", "How many?", "column prompt is string, expected list of"),
        ("prompt", [{"role": "user", "text": "x"}], "column prompt is list<"),
        ("images", png(), "column images is binary, expected list of"),
        ("images", ["a.png"], "column images is list<"),
        ("reward_model", "mathverify", "column reward_model.verifier is missing"),
        ("reward_model__ground_truth", 4, "column reward_model.ground_truth is int64"),
    ],
)
def test_wrong_types(tmp_path, name, value, expected):
    assert expected in error_of(write_plain(tmp_path / "a.parquet", row(**{name: value})))
