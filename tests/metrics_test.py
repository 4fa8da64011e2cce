import json

import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.metrics import (
    REFLECTION_WORDS,
    Refill,
    SourceMean,
    finish,
    is_correct,
    mean_over_sources,
    per_source_means,
    reflects,
)
from vtriune_jax.types import (
    Completion,
    Group,
    Message,
    Prompt,
    RewardConfig,
    Sample,
    Verdict,
    Vision,
)

TIMEOUT, ERROR = Verdict("timeout", reason="30 s"), Verdict("error", reason="connection refused")


def group(source: str, *answers: str | tuple[str, int]) -> Group:
    """Completions given as text, or as (text, tokens) for one that was cut at its limit."""
    sample = Sample(source, "0", (), (Message("user", "?"),), RewardConfig("mathverify", "1"))
    empty = np.zeros(0, np.int32)
    vision = Vision(patches=empty, positions=empty, segments=empty)
    prompt = Prompt(sample, empty, empty, empty, vision, empty)
    completions = []
    for answer in answers:
        text, tokens = answer if isinstance(answer, tuple) else (answer, len(answer.split()))
        ids = np.zeros(tokens, np.int32)
        finish = "length" if isinstance(answer, tuple) else "stop"
        completions.append(Completion(ids, np.zeros(tokens, np.float32), text, finish))
    return Group(prompt, tuple(completions))


def ok(accuracy: float, **parts: float) -> Verdict:
    return Verdict("ok", accuracy, {"accuracy": accuracy, **parts})


def of(groups: list[Group], verdicts: list[list[Verdict]]) -> dict[str, float]:
    return finish({}, groups, verdicts, [], {})


def test_rewards_by_source_and_part_with_slashes_replaced():
    metrics = of(
        [group("math/a", "x", "y"), group("det", "z"), group("math/a", "w")],
        [[ok(1.0, format=0.5), ok(0.0, format=1.0)], [ok(0.25, iou_50=0.75, map=0.5)], [ok(1.0)]],
    )
    assert metrics["reward/math_a"] == pytest.approx(2 / 3)
    assert metrics["reward_accuracy/math_a"] == pytest.approx(2 / 3)
    assert metrics["reward_format/math_a"] == 0.75  # of the two that report it
    assert metrics["reward_iou_50/det"] == 0.75
    assert metrics["reward_map/det"] == 0.5
    assert metrics["reward"] == pytest.approx(2.25 / 4)


def test_a_failed_verification_is_masked_and_counted():
    metrics = of([group("a", "x", "y", "z", "w")], [[ok(1.0), TIMEOUT, ERROR, ERROR]])
    assert metrics["reward/a"] == 1.0
    assert metrics["verifier_failed/a"] == 0.75
    assert metrics["verifier_timeout/a"] == 1
    assert metrics["verifier_error/a"] == 2
    assert metrics["length/a"] == 1.0


def test_what_has_no_denominator_is_left_out():
    metrics = of([group("a", "x y", "z")], [[TIMEOUT, ERROR]])
    assert set(metrics) == {
        "length/a", "reflection/a", "truncated/a",
        "verifier_error/a", "verifier_failed/a", "verifier_timeout/a",
    }  # fmt: skip


def test_lengths_and_truncation():
    metrics = of([group("a", "one", "one two three", ("…", 8))], [[ok(1.0), ok(0.0), ok(0.0)]])
    assert metrics["length/a"] == 4.0
    assert metrics["length_correct/a"] == 1.0
    assert metrics["length_wrong/a"] == 5.5
    assert metrics["truncated/a"] == pytest.approx(1 / 3)


def test_groups_without_variance_among_the_valid_rewards():
    groups = [group("a", "x", "y", "z")] * 5
    verdicts = [
        [ok(1.0), TIMEOUT, TIMEOUT],  # has nothing to be compared with
        [ok(1.0), ok(1.0), ok(1.0)],
        [ok(1.0), TIMEOUT, ok(1.0)],
        [ok(1.0), ok(0.0), ok(1.0)],
        [TIMEOUT, TIMEOUT, TIMEOUT],  # says nothing about the policy
    ]
    assert of(groups, verdicts)["zero_variance/a"] == pytest.approx(2 / 3)


def test_reflection_and_its_conditional_ratios():
    metrics = of(
        [group("a", "Wait, 3.", "wait", "let me re-check", "four", "five")],
        [[ok(1.0), ok(0.0), TIMEOUT, ok(1.0), ok(1.0)]],
    )
    assert metrics["reflection/a"] == pytest.approx(3 / 5)
    assert metrics["reflection_in_correct/a"] == pytest.approx(1 / 3)
    assert metrics["reflection_in_wrong/a"] == 1.0
    assert metrics["correct_with_reflection/a"] == 0.5
    assert metrics["correct_without_reflection/a"] == 1.0


@pytest.mark.parametrize("word", REFLECTION_WORDS)
def test_every_reflection_word_is_found_whole(word):
    assert reflects(f"so. {word.capitalize()}: 4")
    assert not reflects(f"so x{word}x 4")


def test_words_that_only_contain_a_reflection_word_are_none():
    assert not reflects("The waiter saw a Yeti while waiting and pre-checked it")


def test_correct_does_not_move_with_the_dynamic_threshold():
    assert is_correct(Verdict("ok", 0.1, {"accuracy": 0.0, "iou_50": 0.9}))
    assert not is_correct(Verdict("ok", 1.0, {"accuracy": 0.0, "format": 1.0}))
    assert is_correct(Verdict("ok", 0.9, {"accuracy": 1.0, "format": 0.0}))


def test_update_sums_are_divided_once_per_source_and_over_all():
    sums = {
        "loss": (jnp.float32(6.0), jnp.float32(4.0)),
        "entropy": (jnp.array([1.0, 0.0, 3.0]), jnp.array([2.0, 0.0, 2.0])),
        "skipped": (jnp.float32(2.0), jnp.float32(3.0)),
        "kl": (jnp.zeros(3), jnp.zeros(3)),
    }
    metrics = finish(sums, [], [], ["a", "b", "c/d"], {"rollout": 1.5})
    assert metrics == {
        "entropy": 1.0, "entropy/a": 0.5, "entropy/c_d": 1.5,
        "loss": 1.5, "skipped_steps": 2.0, "time/rollout": 1.5,
    }  # fmt: skip
    assert all(type(value) is float for value in metrics.values())
    json.dumps(metrics)


def test_skipped_rows_are_counted_per_source_and_in_all():
    metrics = finish({}, [], [], ["a", "b/c"], {}, ["b/c", "a", "b/c"])
    assert metrics == {"skipped_rows": 3, "skipped_rows/a": 1, "skipped_rows/b_c": 2}


def test_the_largest_of_all_sources_is_no_sum():
    sums = {"rollout_ratio_max": (jnp.array([1.5, 0.0, 4.0]), jnp.array([1.0, 0.0, 1.0]))}
    assert finish(sums, [], [], ["a", "b", "c"], {}) == {
        "rollout_ratio_max": 4.0, "rollout_ratio_max/a": 1.5, "rollout_ratio_max/c": 4.0,
    }  # fmt: skip


def test_dropped_groups_are_counted_per_source_and_in_all():
    assert finish({}, [], [], [], {}, refill=Refill(2, ["a", "b/c", "a"], 1)) == {
        "dropped_groups": 3, "dropped_groups/a": 2, "dropped_groups/b_c": 1,
        "refill_rounds": 2, "missing_groups": 1,
    }  # fmt: skip


def test_a_wrong_number_of_sources_or_verdicts_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        finish({"kl": (jnp.ones(2), jnp.ones(2))}, [], [], ["a"], {})
    with pytest.raises(ValueError, match="zip"):
        of([group("a", "x", "y")], [[ok(1.0)]])


def test_per_source_means_mask_and_count_failures():
    groups = [group("a/b", "x", "y"), group("c", "z"), group("a/b", "w")]
    means = per_source_means(groups, [[ok(1.0), TIMEOUT], [ERROR], [ok(0.5)]])
    assert means == {"a/b": SourceMean(0.75, 2, 1), "c": SourceMean(None, 0, 1)}
    assert mean_over_sources(means) == 0.75
    assert mean_over_sources({}) is None


def test_metrics_of_no_groups_are_empty():
    assert finish({}, [], [], [], {}) == {}
