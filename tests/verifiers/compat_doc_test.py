"""Every example of docs/vtriune_compat.md, in both modes."""

import ast
import json
import re
from pathlib import Path

import pytest

from vtriune_jax.verifiers.judge import judge

TEXT = (Path(__file__).parents[2] / "docs" / "vtriune_compat.md").read_text("utf-8")
DEFAULTS = ast.literal_eval(re.search(r"```python\n(.*?)\n```", TEXT, re.DOTALL)[1])
EXAMPLES = [
    json.loads(block) for block in re.findall(r"```json\n(\{.*?\})\n```\n", TEXT, re.DOTALL)
]


def asked(example, compat):
    case = {**DEFAULTS, **example}
    parm = case["parm"]
    parm = parm if isinstance(parm, str) else json.dumps({**DEFAULTS["parm"], **parm})
    response = f"<think>\nlook\n</think>\n<answer>\n{case['answer']}\n</answer>"
    request = {
        "response": case.get("response", response),
        "prompt": "",
        "answer": "",
        "solution": case["solution"],
        "data_source": "",
        "reward_verifier": case["verifier"],
        "reward_verifier_parm": parm,
        "accuracy_ratio": case["accuracy_ratio"],
        "format_ratio": case["format_ratio"],
    }
    return judge(request, compat=compat, iou_threshold=case["threshold"])


def test_all_examples_are_found():
    assert len(EXAMPLES) == TEXT.count("```json\n{") == 26


def test_the_common_request_scores_1_in_both_modes():
    for compat in (True, False):
        answer = asked({}, compat)
        assert set(answer) == {"rewards"}
        assert answer["rewards"]["final_reward"] == pytest.approx(1)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: str(next(iter(e.items())))[:60])
@pytest.mark.parametrize("mode", ["vtriune", "ours"])
def test_an_example_is_as_documented(example, mode):
    answer = asked(example, compat=mode == "vtriune")
    expected = dict(example[mode])
    reason = expected.pop("error", None)
    for name, value in expected.items():
        assert answer["rewards"][name] == pytest.approx(value, abs=1e-6), answer
    assert (reason is None) == ("error" not in answer)
    assert reason is None or reason in answer["error"]
    assert example["vtriune"] != example["ours"]
