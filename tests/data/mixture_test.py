import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_sample
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.errors import UserError


class Rows(list):
    """A stand-in for a source: a name and samples."""

    def __init__(self, name, count):
        super().__init__(make_sample(images=(), id=f"{name}{k}") for k in range(count))
        self.name = name


def ids(samples):
    return [sample.id for sample in samples]


@given(
    weights=st.lists(st.floats(0.05, 10), min_size=1, max_size=5),
    draws=st.integers(1, 200),
)
@settings(max_examples=30, deadline=None)
def test_weights_hold_at_every_moment(weights, draws):
    sources = [Rows(f"s{k}", 3) for k in range(len(weights))]
    mixture = Mixture(list(zip(sources, weights, strict=True)), seed=0)
    mixture.take(draws)
    drawn = np.array([mixture.state()[f"drawn/s{k}"] for k in range(len(weights))])
    share = np.array(weights) / sum(weights)
    assert drawn.sum() == draws
    assert np.abs(drawn - share * draws).max() < 2


def test_every_epoch_is_a_new_permutation():
    mixture = Mixture([(Rows("a", 20), 1.0)], seed=3)
    first, second = ids(mixture.take(20)), ids(mixture.take(20))
    assert sorted(first) == sorted(second) == sorted(f"a{k}" for k in range(20))
    assert first != second
    assert first != sorted(first)
    assert ids(Mixture([(Rows("a", 20), 1.0)], seed=4).take(20)) != first


@pytest.mark.parametrize("cut", [0, 1, 17, 40])
def test_resume_equals_uninterrupted(cut):
    def fresh():
        return Mixture([(Rows("a", 7), 2.0), (Rows("b", 5), 1.0), (Rows("c", 1), 0.3)], seed=5)

    whole = fresh()
    expected = ids(whole.take(60))
    first = fresh()
    begun = ids(first.take(cut))
    state = json.loads(json.dumps(first.state()))
    assert begun + ids(fresh().restore(state).take(60 - cut)) == expected


def test_take_in_any_pieces_is_the_same():
    one, other = (Mixture([(Rows("a", 7), 2.0), (Rows("b", 5), 1.0)], seed=5) for _ in range(2))
    assert ids(one.take(10)) == ids(other.take(3)) + ids(other.take(7))


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weights_must_be_positive(weight):
    with pytest.raises(UserError, match="data source a has weight"):
        Mixture([(Rows("a", 2), weight)], seed=0)


def test_bad_mixtures():
    with pytest.raises(UserError, match="no data source"):
        Mixture([], seed=0)
    with pytest.raises(UserError, match="listed twice"):
        Mixture([(Rows("a", 2), 1.0), (Rows("a", 2), 1.0)], seed=0)


def test_restore_refuses_other_data():
    state = Mixture([(Rows("a", 2), 1.0)], seed=0).state()
    with pytest.raises(UserError, match="a has 3 rows, the checkpoint saw 2"):
        Mixture([(Rows("a", 3), 1.0)], seed=0).restore(state)
    with pytest.raises(UserError, match="a is in the checkpoint only"):
        Mixture([(Rows("b", 2), 1.0)], seed=0).restore(state)
