import json

import pytest

from vtriune_jax.verifiers.combination import verify

COMPLETION = "<answer>dog</answer>"


def test_parts_are_weighted_and_reported():
    listed = [
        {"name": "exact", "weight": 3.0},
        {"name": "edit_distance", "ground_truth": "dogs", "params": {"threshold": 0.0}},
        {"name": "mathverify", "weight": 0, "ground_truth": r"\boxed{1}"},
    ]
    for given in (listed, json.dumps(listed)):
        found = verify(COMPLETION, "dog", {"verifiers": given}, 0.0)
        assert found["accuracy"] == pytest.approx((3 * 1 + 0.75) / 4)
        assert found["format"] == 1
        assert found["edit_distance_accuracy"] == pytest.approx(0.75)
        assert found["mathverify_format"] == 0


def test_parameters_of_the_row_are_shared_and_overridden():
    listed = [{"name": "exact"}, {"name": "exact", "params": {"accepted": []}, "weight": 3}]
    found = verify(COMPLETION, "cat", {"verifiers": listed, "accepted": ["dog"]}, 0.0)
    assert found["accuracy"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (None, "expected a list"),
        ("[", "Expecting"),
        ([7], "expected a list of objects"),
        ([], "sum to 0"),
        ([{"name": "exact", "weight": 0}], "sum to 0"),
        ([{"name": "exact", "weight": -1}], "weight=-1"),
        ([{"name": "nonsense"}], "name of another verifier"),
        ([{"name": "combination"}], "name of another verifier"),
        ([{"name": "exact", "wieght": 1}], "wieght"),
        ([{"name": "counting"}], "'dog' is not a number"),
    ],
)
def test_a_list_at_fault_is_an_error(listed, reason):
    with pytest.raises(ValueError, match=reason):
        verify(COMPLETION, "dog", {"verifiers": listed}, 0.0)
