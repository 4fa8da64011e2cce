from configs import quickstart
from vtriune_jax import sharding
from vtriune_jax.aot.program import build
from vtriune_jax.aot.sampling import sampling_bytes


def test_servers_and_demonstrations_take_nothing():
    """What the sampler takes is in compile_test.py."""
    config, mesh = quickstart.get_config(), sharding.make_mesh()
    program = build(config, mesh)
    config.rollout.engine = "sglang"
    assert sampling_bytes(config, program, mesh, 0) == {}
    config.rollout.engine, config.stages = "local", ("sft",)
    assert sampling_bytes(config, program, mesh, 0) == {}
