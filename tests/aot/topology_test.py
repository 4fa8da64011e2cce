import pytest

from vtriune_jax.aot import topology
from vtriune_jax.errors import UserError


def test_without_the_tpu_compiler(monkeypatch):
    """JAX then raises a plain RuntimeError, and XLA one of its own."""

    def missing(**_):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r"says 'JAX TPU support not .* `pip install 'jax\[tpu\]'`"):
        topology.get("v5p:2x2x4")


@pytest.mark.parametrize(
    "name", ["v5e:4x4x4", "v6e:1000x1000", "v5p:4x4", "tpu7x:64x64x64", "v4:4", "v6e:2x2x1"]
)
def test_shapes_that_no_pod_has(name, monkeypatch):
    monkeypatch.setattr(topology, "_tpus", lambda *_: pytest.fail("asked the compiler"))
    with pytest.raises(UserError, match=f"^--topology={name} is no shape of these TPUs: they have"):
        topology.get(name)


@pytest.mark.parametrize("name", ["v5p:0x2x2", "v5p:", "v5p:2x2x", "v6e", "v9:2x2", "cpu:0"])
def test_names_that_are_not_known(name):
    with pytest.raises(UserError, match=f"^--topology={name} is not known; choose v4, v5e"):
        topology.get(name)
