"""`/judge` against the rewards of V-Triune's server, on the cases that were recorded there.

With compat every key of every answer is the original's. In our own mode the rewards differ on
purpose in the cases listed here with their reasons, so that any other change shows.
"""

import pytest

from tests.verifiers.cases import expected_rewards, load_cases, threshold, to_item, to_request
from vtriune_jax.verifiers.judge import judge

FLOOR = "the original cuts rescaled coordinates to integers"
IOU_FIRST = "the original's iou_first removes other pairs than it credits"
NUMBER = "the original takes this threshold for the mean over eleven"
DIFFERENT = {
    "det-061": "only the last ] is missing: we mend it",
    "det-065": "a code fence: we read it",
    "det-071": "an escaped apostrophe: the list is well-formed, its label just wrong",
    "det-100": "a truth without boxes: error, not the format's reward",
    "det-155": NUMBER,
    "det-156": NUMBER,
    "det-290": IOU_FIRST,
    "det-292": IOU_FIRST,
    "det-307": IOU_FIRST,
    "det-308": IOU_FIRST,
    "det-318": IOU_FIRST,
    "det-351": "all weights are 0: error",
    "det-352": "no weights: the published ones instead of none",
    "det-356": "a negative weight: error, not 0",
    "det-382": FLOOR,
    "det-396": FLOOR,
    "det-429": "only the last ] is missing: we mend it",
    "det-438": "total_steps = 0 breaks the original; we are told the progress",
    "det-441": FLOOR,
    "det-rand-013": IOU_FIRST,
    "det-rand-021": FLOOR,
    "det-rand-029": FLOOR,
    "det-rand-042": FLOOR,
    "det-rand-057": IOU_FIRST,
    "det-rand-062": FLOOR,
    "det-rand-065": FLOOR,
    "det-rand-076": FLOOR,
    "det-rand-081": FLOOR,
    "det-rand-101": IOU_FIRST,
    "det-rand-111": FLOOR,
    "det-rand-117": FLOOR,
    "det-rand-134": IOU_FIRST,
    "det-rand-140": FLOOR,
    "math-143": "an empty ground truth: error, not 0",
    "math-163": "both ratios are 0: error, not 0",
    "math-181": "a parameter we do not need is missing",
    "math-183": "the parameters are not JSON; ours are a mapping by type",
}
ERRORS = {"det-100", "det-351", "det-356", "math-143", "math-163"}


@pytest.fixture(scope="module")
def cases():
    return load_cases()


def test_with_compat_every_number_is_the_originals(cases):
    for name, case in cases.items():
        answer = judge(to_request(case), compat=True, iou_threshold=threshold(case))
        expected = expected_rewards(case)
        assert set(answer) == {"rewards"}
        assert set(answer["rewards"]) == set(expected), name
        for key, value in expected.items():
            if value is not None:
                assert answer["rewards"][key] == pytest.approx(value, abs=1e-6), (name, key)
                assert isinstance(answer["rewards"][key], float)


def test_a_requests_own_threshold_overrides_the_servers(cases):
    for compat in (True, False):
        for name in ("det-133", "det-164", "det-155"):
            case = cases[name]
            set_by_server = judge(to_request(case), compat=compat, iou_threshold=threshold(case))
            given = case["params"]["verifier_parm"] | {"iou_threshold": threshold(case)}
            params = case["params"] | {"verifier_parm": given}
            request = to_request(case | {"params": params})
            assert judge(request, compat=compat, iou_threshold="0.5") == set_by_server
            null = case["params"]["verifier_parm"] | {"iou_threshold": None}
            request = to_request(case | {"params": case["params"] | {"verifier_parm": null}})
            assert judge(request, compat=compat, iou_threshold=threshold(case)) == set_by_server


def test_our_rewards_equal_the_originals_but_where_we_mean_to_differ(cases, router):
    verdicts = router.score([to_item(case) for case in cases.values()])
    agree = {
        name: verdict.status == "ok"
        and abs(verdict.score - expected_rewards(case)["final_reward"]) < 1e-6
        for (name, case), verdict in zip(cases.items(), verdicts, strict=True)
    }
    assert {name for name, same in agree.items() if not same} == set(DIFFERENT)
    statuses = {name: verdict.status for name, verdict in zip(cases, verdicts, strict=True)}
    assert {name for name, status in statuses.items() if status != "ok"} == ERRORS
    assert all(v.reason for v in verdicts if v.status == "error")


def test_our_judge_answers_with_the_same_keys_and_the_routers_scores(cases, router):
    verdicts = router.score([to_item(case) for case in cases.values()])
    for (name, case), verdict in zip(cases.items(), verdicts, strict=True):
        answer = judge(to_request(case), compat=False, iou_threshold=threshold(case))
        if name == "math-183":
            assert "JSONDecodeError" in answer["error"]
        elif verdict.status == "ok":
            assert answer["rewards"]["final_reward"] == pytest.approx(verdict.score, abs=1e-12)
            assert {type(value) for value in answer["rewards"].values()} == {float}, name
            assert "error" not in answer
            if "error" not in case["details"]:
                assert set(answer["rewards"]) == set(case["details"]["rewards"])
        else:
            assert answer["rewards"]["final_reward"] == 0
            assert answer["error"]


@pytest.mark.parametrize("order", ["label_match", "map"])
def test_our_sub_scores_are_the_originals_where_nothing_was_cut_off(cases, order):
    compared = 0
    for name, case in cases.items():
        if case["verifier"] != "detection" or name in DIFFERENT or "error" in case["details"]:
            continue
        if case["details"].get("normalized_pred"):
            continue
        rewards = judge(to_request(case), compat=False, iou_threshold=threshold(case))["rewards"]
        for key, value in case["details"]["rewards"].items():
            if order in key:
                assert rewards[key] == pytest.approx(value, abs=1e-6), (name, key)
                compared += 1
    assert compared > 300
