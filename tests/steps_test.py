from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from tests.rl import tiny_update
from vtriune_jax import sharding
from vtriune_jax.rl import policy
from vtriune_jax.stages import plan
from vtriune_jax.steps import advantages, logps_of, respond, shaped, verify
from vtriune_jax.types import Completion, Group, Prompt, RewardConfig, Sample, Verdict

SFT, GRPO = plan(base.get_config(), ())


def make_prompt(demonstration: str = "yes") -> Prompt:
    reward = RewardConfig("mathverify", "1")
    sample = Sample("a", "0", (), (), reward, demonstration=demonstration)
    empty = np.zeros(0, np.int32)
    return Prompt(sample, empty, empty, empty, None, np.zeros((0, 3), np.int32))


def make_group(*texts: str) -> Group:
    nothing = np.zeros(0)
    return Group(make_prompt(), tuple(Completion(nothing, nothing, t, "stop") for t in texts))


@pytest.fixture
def parts():
    """A verifier that scores the length of the text, and remembers what it was asked."""
    asked = []

    def score(items):
        asked.extend(items)
        return [Verdict("ok", float(len(item.completion))) for item in items]

    return SimpleNamespace(
        asked=asked,
        verifiers=SimpleNamespace(score=score),
        prompter=SimpleNamespace(encode_completion=lambda text: np.arange(len(text) + 1)),
        model_config=SimpleNamespace(vision=SimpleNamespace(patch_size=14)),
    )


def test_a_demonstration_is_the_response_of_a_supervised_stage(parts):
    groups = respond(SFT, 0, parts, {}, [make_prompt("yes"), make_prompt("no")], None)
    assert [c.text for group in groups for c in group.completions] == ["yes", "no"]
    [completion] = groups[0].completions
    assert len(completion.ids) == len(completion.logps) == 4
    assert completion.finish == "stop"
    assert verify(SFT, 0, groups, parts) == []
    values, weights = advantages(SFT, groups, [], np.ones(2, bool))
    assert values.tolist() == weights.tolist() == [[1], [1]]


def test_verdicts_are_grouped_as_the_completions(parts):
    groups = [make_group("a", "bb"), make_group("ccc", "")]
    verdicts = verify(GRPO, 0, groups, parts)
    assert [[verdict.score for verdict in judged] for judged in verdicts] == [[1, 2], [3, 0]]


def test_progress_counts_steps_from_one_to_the_last(parts):
    for step in (0, GRPO.steps - 1):
        verify(GRPO, step, [make_group("a")], parts)
    assert [item.progress for item in parts.asked] == [1 / GRPO.steps, 1.0]
    assert parts.asked[0].threshold is None


def test_a_failed_verification_is_masked():
    ok, failed = (lambda score: Verdict("ok", score)), Verdict("error", reason="no server")
    judged = [[ok(1.0), ok(0.0), failed], [failed] * 3]
    values, weights = advantages(GRPO, [], judged, np.ones(2, bool))
    assert weights.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert values[0, 0] == -values[0, 1] > 0
    assert values[0, 2] == 0
    assert not values[1].any()


def test_a_group_that_only_fills_the_batch_is_masked():
    judged = [[Verdict("ok", score) for score in (0.0, 1.0)]] * 2
    values, weights = advantages(GRPO, [], judged, np.array([True, False]))
    assert weights.tolist() == [[1, 1], [0, 0]]
    assert values[0].any()
    assert not values[1].any()


def test_long_completions_cost_reward_where_that_is_on():
    most = GRPO.sampling.max_tokens
    group = Group(
        make_prompt(),
        tuple(
            Completion(np.zeros(length), np.zeros(length), "", "stop")
            for length in (most - 100, most - 50, most, most)
        ),
    )
    judged = [Verdict("ok", 1.0, {"accuracy": 1.0})] * 3 + [Verdict("error")]
    assert shaped(GRPO, [group], [judged]) == [judged]
    [found] = shaped(replace(GRPO, overlong_cushion=100), [group], [judged])
    assert [verdict.score for verdict in found] == [1.0, 0.5, 0.0, 0.0]
    assert found[1].parts == {"accuracy": 1.0, "overlong": -0.5}
    assert found[3] == judged[3]


@pytest.mark.parametrize(
    ("kl_weight", "old", "names"),
    [
        (0.1, "recomputed", {"old_logps", "reference_logps"}),
        (0.0, "recomputed", {"old_logps"}),
        (0.1, "rollout", {"reference_logps"}),
    ],
)
def test_log_probs_are_made_as_needed_by_one_program(monkeypatch, kl_weight, old, names):
    traced = []
    inner = policy.policy_logps
    monkeypatch.setattr(policy, "policy_logps", lambda *given: traced.append(1) or inner(*given))
    mesh = sharding.make_mesh()
    graphdef, start = tiny_update.model()
    batch_keys, lora_keys = SimpleNamespace(micro_batches=1), SimpleNamespace(rank=0)
    parts = SimpleNamespace(
        config=SimpleNamespace(batch=batch_keys, model=SimpleNamespace(lora=lora_keys)),
        graphdef=graphdef,
        mesh=mesh,
        place=lambda params: params,
    )
    loss = replace(tiny_update.GRPO, kl_weight=kl_weight, old=old)
    known = logps_of(replace(GRPO, loss=loss), start, parts)
    batch = tiny_update.make_batch()
    found = known(start, batch, False)
    assert found.keys() == names
    assert len(traced) == 1
    if old == "recomputed":
        assert np.isnan(known(start, batch, True)["old_logps"]).all()
    for logps in found.values():  # the policy is the reference still
        np.testing.assert_array_equal(logps, next(iter(found.values())))


def test_no_log_probs_are_made_for_one_update_without_a_reference():
    parts = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(lora=SimpleNamespace(rank=0)))
    )
    assert GRPO.loss.old == "current"
    assert logps_of(GRPO, {}, parts) is None
