"""The recorded cases of V-Triune's server, as requests to ours and as items."""

import json
from pathlib import Path

import pytest

from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers.item import Item

CASES = Path(__file__).parents[3] / "shared" / "conformance" / "vtriune_cases.json"


def load_cases():
    if not CASES.exists():
        pytest.skip(f"no reference cases at {CASES}: they are not part of a clone")
    return {case["id"]: case for case in json.loads(CASES.read_text())}


def parameters(case):
    given = case["params"]["verifier_parm"]
    return given if isinstance(given, dict) else {}


def threshold(case):
    """The server's setting; math has none."""
    return case["params"].get("DET_IOU_THRESHOLD") or "dynamic"


def to_request(case):
    given = case["params"]["verifier_parm"]
    return {
        "response": case["response"],
        "prompt": "",
        "answer": "",
        "solution": case["ground_truth"],
        "data_source": "coco2017",
        "reward_verifier": case["verifier"],
        "reward_verifier_parm": given if isinstance(given, str) else json.dumps(given),
        "format_ratio": case["params"]["format_ratio"],
        "accuracy_ratio": case["params"]["accuracy_ratio"],
    }


def to_item(case):
    """What `to_request` asks, of our own protocol."""
    ratios, given = case["params"], parameters(case)
    names = ("det_verifier_normalized", "det_reward_ratio")
    params = {name: given.get(name) for name in names} | {"iou_threshold": threshold(case)}
    reward = RewardConfig(
        case["verifier"],
        case["ground_truth"],
        accuracy_ratio=1.0 if ratios["accuracy_ratio"] is None else ratios["accuracy_ratio"],
        format_ratio=0.1 if ratios["format_ratio"] is None else ratios["format_ratio"],
        params=params,
    )
    grid = tuple((height, width) for _, height, width in given.get("image_grid_thw") or ())
    return Item(
        case["response"], reward, given.get("step", 0) / (given.get("total_steps") or 1), grid
    )


def expected_rewards(case):
    """All that the original answered; math-verify's own part as of its release 0.9."""
    rewards = dict(case["details"]["rewards"])
    by_version = case["details"].get("reward_by_math_verify_version", {})
    final = by_version.get("0.9.0", case["reward"])
    if final != rewards["final_reward"]:
        rewards |= {"final_reward": final, "accuracy_reward": None}
    return rewards
