"""The names under which V-Triune's server reports rewards and sub-scores."""

from __future__ import annotations

from collections.abc import Mapping

_SCORES = {
    "iou_score_max_iou": "iou_first",
    "iou_score_max_label": "label_first",
    "map_score": "map",
    "map50_score": "map50",
    "map75_score": "map75",
}
_REPORTED = {"iou_match": ("iou_first_", (50, 95)), "label_match": ("", (50, 75, 95, 99))}
_KINDS = {"pure": "iou", "precision": "precision", "recall": "recall"}


def nothing() -> dict[str, float]:
    """The four rewards that every response has, at 0."""
    names = ("format_reward", "accuracy_reward", "reflection_reward", "final_reward")
    return dict.fromkeys(names, 0.0)


def named(parts: Mapping[str, float], final: float) -> dict[str, float]:
    """The parts of a reward, those of detection under the original's 29 names."""
    rewards = nothing()
    rewards |= {"format_reward": parts["format"], "accuracy_reward": parts["accuracy"]}
    return {**rewards, "final_reward": final, **sub_scores(parts)}


def sub_scores(parts: Mapping[str, float]) -> dict[str, float]:
    """What is reported beside the rewards: nothing unless the parts are detection's."""
    if "size_penalty" not in parts:
        return {}
    penalty = parts["size_penalty"]
    scores = {"size_penalty": penalty}
    scores |= {f"pure_{name}": parts[ours] for name, ours in _SCORES.items()}
    scores |= {f"weighted_{name}": penalty * parts[ours] for name, ours in _SCORES.items()}
    scores |= {
        f"report_iou_{at}_{order}_{kind}": parts[f"{prefix}{ours}_{at}"]
        for order, (prefix, percents) in _REPORTED.items()
        for at in percents
        for kind, ours in _KINDS.items()
    }
    return {f"{name}_reward": float(value) for name, value in scores.items()}
