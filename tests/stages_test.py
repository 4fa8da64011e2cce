import pytest
from jax.sharding import AbstractMesh

from configs import base
from vtriune_jax.errors import UserError
from vtriune_jax.stages import check_rows, plan

BANNED = (5, 6)


@pytest.fixture
def config():
    config = base.get_config()
    config.sft.steps, config.sft.prompts, config.sft.lr = 7, 4, 0.5
    config.grpo.steps, config.grpo.samples = 3, 5
    return config


def test_stages_follow_each_other(config):
    sft, grpo = plan(config, BANNED)
    assert [(s.name, s.number, s.start, s.steps) for s in (sft, grpo)] == [
        ("sft", 0, 0, 7),
        ("grpo", 1, 7, 3),
    ]
    config.stages = ("grpo",)
    [grpo] = plan(config, BANNED)
    assert (grpo.number, grpo.start) == (0, 0)


def test_imitation_draws_nothing_and_rewards_need_groups(config):
    sft, grpo = plan(config, BANNED)
    assert (sft.samples, sft.sampling, sft.minibatches) == (0, None, 1)
    assert (sft.loss.kind, grpo.loss.kind) == ("sft", "grpo")
    assert sft.loss.banned_ids == grpo.loss.banned_ids == BANNED
    assert grpo.samples == grpo.sampling.n == 5
    assert grpo.sampling.max_tokens == config.batch.completion_tokens


def test_each_stage_has_its_own_keys(config):
    sft, grpo = plan(config, BANNED)
    assert (sft.optim.learning_rate, grpo.optim.learning_rate) == (0.5, config.grpo.lr)
    assert (sft.freeze, grpo.freeze) == ((), ("^visual/",))
    assert sft.prompts == 4
    config.grpo.betas, config.grpo.grad_clip = (0.8, 0.7), 9.0
    optim = plan(config, BANNED)[1].optim
    assert (optim.b1, optim.b2, optim.clip_norm) == (0.8, 0.7, 9.0)


def test_completions_have_the_room_of_the_configs_slot_whatever_their_row_has(config):
    config.batch.completion_tokens = 96
    grpo = plan(config, BANNED)[1]
    assert grpo.loss.room == grpo.sampling.max_tokens == 96


@pytest.mark.parametrize(
    ("prompts", "samples", "minibatches", "micro_batches", "near"),
    [(24, 3, 1, 2, 32), (24, 4, 3, 2, 24), (10, 8, 1, 1, 16), (100, 6, 4, 3, 112)],
)
def test_prompts_that_divide_over_devices_are_named(
    config, prompts, samples, minibatches, micro_batches, near
):
    config.grpo.update(prompts=prompts, samples=samples, minibatches=minibatches)
    config.batch.micro_batches, config.stages = micro_batches, ("grpo",)
    mesh = AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
    if near != prompts:
        with pytest.raises(UserError, match=rf"^grpo.prompts={prompts} is not .*, choose {near},"):
            check_rows(config, mesh)
    config.grpo.prompts = near
    check_rows(config, mesh)
    config.stages = ("sft", "grpo")
    config.sft.prompts = 4
    with pytest.raises(UserError, match=rf"^sft.prompts=4 is .* of {8 * micro_batches}, choose"):
        check_rows(config, mesh)


@pytest.mark.parametrize("key", ["minibatches", "epochs"])
def test_old_log_probs_are_needed_after_the_first_update_only(config, key):
    assert plan(config, BANNED)[1].loss.old == "current"
    config.grpo[key] = 2
    assert plan(config, BANNED)[1].loss.old == "recomputed"
    config.grpo.old = "rollout"
    assert plan(config, BANNED)[1].loss.old == "rollout"


def test_one_temperature_for_sampling_and_loss(config):
    config.grpo.temperature = 0.7
    grpo = plan(config, BANNED)[1]
    assert grpo.loss.temperature == grpo.sampling.temperature == 0.7


def test_minibatches_are_shuffled_by_the_seed_and_each_comes_once_an_epoch(config):
    config.grpo.minibatches, config.grpo.epochs = 8, 2
    grpo = plan(config, BANNED)[1]
    orders = [grpo.order(seed, step) for seed in (0, 1) for step in (0, 1)]
    for order in orders:
        assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == grpo.order(0, 0)
    assert orders[0][:8] != orders[0][8:]
