import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.thresholds import stepped_threshold


@pytest.mark.parametrize("x64", [False, True])
def test_boundaries_belong_to_the_lower_stage(x64):
    progress = [0, 0.05, 10 / 100, 0.11, 13 / 138, 14 / 138, 25 / 100, 0.2500001, 1]
    expected = [0.85, 0.85, 0.85, 0.95, 0.85, 0.95, 0.95, 0.99, 0.99]
    with jax.enable_x64(x64):
        found = jax.jit(stepped_threshold)(np.array(progress))
    np.testing.assert_allclose(found, expected, rtol=1e-7)


def test_any_number_of_stages():
    found = stepped_threshold(jnp.array([0.4, 0.6]), bounds=(0.5,), values=(0.2, 0.3))
    np.testing.assert_allclose(found, [0.2, 0.3], rtol=1e-6)
    assert float(stepped_threshold(0.5, bounds=(), values=(0.7,))) == pytest.approx(0.7)


def test_stages_that_do_not_fit_their_bounds():
    with pytest.raises(
        ValueError, match=r"values=\(0.5, 0.6\); expected rising bounds and one more"
    ):
        stepped_threshold(0.5, values=(0.5, 0.6))
    with pytest.raises(ValueError, match=r"bounds=\(0.5, 0.2\)"):
        stepped_threshold(0.5, bounds=(0.5, 0.2))
