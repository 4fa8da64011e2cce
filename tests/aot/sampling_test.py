import pytest

from configs import quickstart
from vtriune_jax import sharding
from vtriune_jax.aot.program import build
from vtriune_jax.aot.sampling import sampling_bytes


def found(**keys):
    config = quickstart.get_config()
    config.grpo.prompts, config.grpo.samples = 8, 2
    for key, value in keys.items():
        group, _, name = key.partition("_")
        if name:
            config[group][name] = value
        else:
            config[key] = value
    mesh = sharding.make_mesh()
    program = build(config, mesh)
    return sampling_bytes(config, program, mesh, 0), program.batch.features


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, {"vision tower", "sampler"}),
        ({"grpo_freeze": ()}, {"vision tower", "sampler"}),
        ({"rollout_engine": "sglang"}, {"vision tower"}),
        ({"rollout_engine": "sglang", "grpo_freeze": ()}, set()),
        ({"stages": ("sft",)}, set()),
        ({"stages": ("sft",), "sft_freeze": ("^visual/",)}, {"vision tower"}),
    ],
)
def test_what_runs_between_updates(keys, names):
    """How much the sampler takes is in compile_test.py."""
    assert found(**keys)[0].keys() == names


def test_features_of_other_steps_and_rounds_lie_beside_both():
    alone, features = found()
    ahead, _ = found(rollout_ahead=2)
    refilled, _ = found(grpo_refill=3)
    own = features.size * features.dtype.itemsize
    for name, size in alone.items():
        assert ahead[name] == size + 2 * own
        assert refilled[name] == size + 3 * own
