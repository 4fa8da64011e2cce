"""The wire of /judge beside the recorded cases: ill requests, overruns, hostile answers."""

import json
import math

import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers.judge import judge, unjudged

BOX = "[{'bbox_2d': [100, 100, 300, 300], 'label': 'dog'}]"
PARM = {
    "is_training": True,
    "step": 50,
    "total_steps": 100,
    "det_reward_ratio": {"iou_max_label_first": 1.0, "iou_completeness": 0.3},
}
HOSTILE = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "a megabyte of tags": "<answer>" * 130_000,
    "a megabyte of braces": "{" * 2**20,
    "infinite": "[{'bbox_2d': [-1e999, 0, 1e999, 5], 'label': 'dog'}]",
    "not a number": "[{'bbox_2d': [NaN, 0, 1, 5], 'label': 'dog'}]",
    "huge integers": f"[{{'bbox_2d': [0, 0, 1{'0' * 400}, 5], 'label': 'dog'}}]",
    "endless integers": f"[{{'bbox_2d': [0, 0, 1{'0' * 5000}, 5], 'label': 'dog'}}]",
    "negative sizes": "[{'bbox_2d': [300, 300, 100, 100], 'label': 'dog'}]",
    "no area": "[{'bbox_2d': [100, 100, 100, 100], 'label': 'dog'}]",
    "10,000 boxes": str([{"bbox_2d": [k, 0, k + 9, 9], "label": "dog"} for k in range(10_000)]),
    "surrogates": "[{'bbox_2d': [1, 2, 3, 4], 'label': '\ud800'}]",
    "NUL": "\0" * 1000,
}


def request(answer=BOX, **fields):
    return {
        "response": f"<think>\nlook\n</think>\n<answer>\n{answer}\n</answer>",
        "prompt": "",
        "answer": "",
        "solution": f"<answer>\n{BOX}\n</answer>",
        "data_source": "",
        "reward_verifier": "detection",
        "reward_verifier_parm": json.dumps(PARM),
        **fields,
    }


@pytest.mark.parametrize("compat", [True, False])
def test_missing_or_ill_typed_fields_are_the_clients_fault(compat):
    for fields, reason in (
        ({"response": None, "prompt": 7}, "/judge: response, prompt must be given as strings"),
        ({"accuracy_ratio": "much"}, "accuracy_ratio='much' is no finite number"),
        ({"format_ratio": math.nan}, "format_ratio=nan is no finite number"),
    ):
        with pytest.raises(UserError, match=reason):
            judge(request(**fields), compat=compat, iou_threshold="dynamic")
    with pytest.raises(UserError, match="reward_verifier_parm"):
        judge({k: v for k, v in request().items() if k != "reward_verifier_parm"},
              compat=compat, iou_threshold="dynamic")  # fmt: skip


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_earn_at_most_their_format(name, compat):
    for params in (PARM, PARM | {"det_verifier_normalized": True, "image_grid_thw": [[1, 9, 9]]}):
        asked = request(HOSTILE[name], reward_verifier_parm=json.dumps(params))
        answer = judge(asked, compat=compat, iou_threshold=0.5)
        assert all(math.isfinite(value) for value in answer["rewards"].values())
        assert answer["rewards"]["final_reward"] < 0.1
        json.dumps(answer, allow_nan=False)


def dog(*coords):
    return f"{{'bbox_2d': {list(coords)}, 'label': 'dog'}}"


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("[{'BBOX_2D': [100.0, 1e2, 300, 300], 'label': 'DOG'}]", 1),
        (BOX.replace("dog", "dogs"), 0.1 / 1.1),
        (BOX.replace("dog", " dog "), 0.1 / 1.1),
        ("[{'bbox_2d': [300, 100, 100, 300], 'label': 'dog'}]", 0),
        ("[{'bbox_2d': ['100', 100, 300, 300], 'label': 'dog'}]", 0),
        ("[{'bbox_2d': [100, 100, 300], 'label': 'dog'}]", 0),
        ("[{'bbox_2d': [100, 100, 300, 300], 'label': 7}]", 0),
        (f"[{BOX}]", 1),
        (f"[[{BOX}]]", 0),
        (BOX.replace("}]", ""), 1),
        (f"[{dog(100, 100, 300, 300)}, {dog(100, 100, 300, 300)}]", 1),
        (f"[{dog(100, 100, 300, 300)}, {dog(1, 1, 2, 2)}]", (0.6 * (0.7 + 0.3 * 0.75) + 0.1) / 1.1),
        (f"[{dog(110, 100, 310, 300)}]", (0.7 * 19 / 21 + 0.3 + 0.1) / 1.1),
    ],
)
def test_answers_that_both_modes_read_alike(answer, final, compat):
    rewards = judge(request(answer), compat=compat, iou_threshold=0.5)["rewards"]
    assert rewards["final_reward"] == pytest.approx(final, abs=1e-9)


def test_compat_matches_as_many_boxes_as_there_are():
    many = [{"bbox_2d": [k, 0, k + 9, 9], "label": "dog"} for k in range(0, 9_000, 9)]
    for predicted, true in ((many[:300], many[:300]), (many, many[:300]), (many, many[-1:])):
        asked = request(str(predicted), solution=f"<answer>{true}</answer>")
        rewards = judge(asked, compat=True, iou_threshold="0.5")["rewards"]
        assert rewards["report_iou_99_label_match_pure_reward"] == pytest.approx(1)
        assert rewards["size_penalty_reward"] == pytest.approx(0.6 ** (len(predicted) - len(true)))


def test_an_overrun_is_a_wrong_answer_to_the_original_and_an_error_to_us():
    ours = unjudged(request(), "took longer than 5 s", compat=False)
    assert ours == {
        "rewards": dict.fromkeys(
            ("format_reward", "accuracy_reward", "reflection_reward", "final_reward"), 0.0
        ),
        "error": "took longer than 5 s",
    }
    for verifier, keys in (("detection", 33), ("mathverify", 4)):
        theirs = unjudged(request(reward_verifier=verifier), "", compat=True)["rewards"]
        assert len(theirs) == keys
        assert theirs["format_reward"] == 1
        assert theirs["final_reward"] == pytest.approx(0.1 / 1.1)


def test_ratios_default_to_the_originals():
    shifted = "[{'bbox_2d': [300, 300, 400, 400], 'label': 'dog'}]"
    for compat in (True, False):
        for fields in ({}, {"accuracy_ratio": None, "format_ratio": None}, {"format_ratio": "0.1"}):
            answer = judge(request(shifted, **fields), compat=compat, iou_threshold="dynamic")
            assert answer["rewards"]["final_reward"] == pytest.approx(0.1 / 1.1)


@pytest.mark.parametrize(
    ("setting", "same_as"),
    [(" 5e-1", 0.5), (".5", 0.5), ("Average", "average"), ("", "average"), (1.0, "average")],
)
def test_settings_of_the_threshold_as_the_original_reads_them(setting, same_as):
    shifted = request("[{'bbox_2d': [115, 100, 315, 300], 'label': 'dog'}]")
    found, expected = (
        judge(shifted, compat=True, iou_threshold=each) for each in (setting, same_as)
    )
    assert found == expected
    assert found != judge(shifted, compat=True, iou_threshold=0.9)


def test_without_compat_any_verifier_may_be_named():
    asked = request(reward_verifier="mathverify", response=r"\boxed{4}", solution=r"\boxed{4}")
    rewards = judge(asked, compat=False, iou_threshold="dynamic")["rewards"]
    assert len(rewards) == 4
    assert rewards["accuracy_reward"] == 1
