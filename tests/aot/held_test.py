"""What `compile` counts as held is what a run keeps on its devices."""

import jax
import numpy as np
import pytest

from configs import quickstart
from vtriune_jax import sharding
from vtriune_jax.aot.held import param_bytes
from vtriune_jax.aot.program import build
from vtriune_jax.config import check


def held(**keys):
    config = quickstart.get_config()
    config.stages = ("grpo",)
    config.grpo.prompts = 16
    config.grpo.samples = 4
    for key, value in keys.items():
        group, name = key.split("_", 1)
        config[group][name] = value
    check(config)
    return build(config, sharding.make_mesh())


def features_of(program):
    return program.batch.features.size * program.batch.features.dtype.itemsize


def test_the_tower_s_own_features_are_there_beside_the_batch():
    program = held(batch_layout="group")
    assert program.held == features_of(program)


def test_packed_rows_may_have_a_prompt_for_each_completion():
    group, auto = held(batch_layout="group"), held(batch_layout="auto")
    of_prompt = features_of(group) // 16
    assert features_of(auto) == features_of(group)
    assert auto.held == (16 + 64 - 16) * of_prompt


def test_minibatches_are_cut_from_the_whole_batch():
    one, four = held(batch_layout="group"), held(batch_layout="group", grpo_minibatches=4)
    assert features_of(four) == features_of(one) / 4
    assert four.held == 2 * features_of(one)


def test_steps_ahead_have_features_where_they_are_sampled_here():
    keys = {"batch_layout": "group", "rollout_ahead": 3, "grpo_tis_cap": 2.0}
    program = held(**keys)
    assert program.held == 4 * features_of(program)
    fleet = held(**keys, rollout_engine="sglang", rollout_addresses=("http://127.0.0.1:1",))
    assert fleet.held == features_of(fleet)


@pytest.mark.parametrize(("rank", "copies"), [(0, 1), (2, 0)])
def test_a_reference_is_a_copy_of_the_parameters_but_of_adapters(rank, copies):
    with_it = held(
        grpo_kl_weight=0.1,
        model_lora={"rank": rank, "alpha": 4.0, "target": ".", "base_dtype": "float32"},
    )
    without = held(model_lora={"rank": rank, "alpha": 4.0, "target": ".", "base_dtype": "float32"})
    params = param_bytes(with_it.state.params, sharding.make_mesh())
    assert params == sum(
        x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(with_it.state.params)
    )
    assert with_it.held - without.held == copies * params
