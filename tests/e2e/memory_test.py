"""What lies in the devices' memory while a run trains: one state, however the run began."""

import gc

import jax
import pytest

from tests.e2e.runs import arguments, records
from vtriune_jax import train
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.main import main


class Held(list):
    """(stage, bytes of the run's arrays / bytes of the parameters), right before each update."""

    def run(self, words):
        """One run of `main`; what lives before it, Orbax's copies for instance, is not its own."""
        gc.collect()
        self.others = jax.live_arrays()  # kept, so that no array of the run takes the id of one
        assert main(words) == 0

    def look(self, stage, params):
        ids = set(map(id, self.others))
        own = [array for array in jax.live_arrays() if id(array) not in ids]
        alive = sum(array.nbytes for array in own if not array.is_deleted())
        self.append((stage.name, alive / sum(leaf.nbytes for leaf in jax.tree.leaves(params))))


@pytest.fixture
def held(monkeypatch):
    found, packed = Held(), train.packed

    def spy(stage, got, do, params, parts):
        found.look(stage, params)
        return packed(stage, got, do, params, parts)

    monkeypatch.setattr(train, "packed", spy)
    return found


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_parameters_two_moments_and_a_reference_only_if_there_is_one(
    held, kl, warm, data, tmp_path, monkeypatch
):
    keys = {"model_path": warm / "final", "grpo_kl_weight": kl, "grpo_freeze": "()"}
    keys |= {"checkpoint_every": 100, **data}
    with monkeypatch.context() as patch:  # Orbax keeps arrays of CPUs for a while, as it reads them
        patch.setattr(Checkpointer, "save", lambda *_: None)
        held.run(arguments(tmp_path / "stages", **keys))
    for steps in (3, 5):
        again = {"stages": "grpo", "grpo_steps": steps, **keys}
        held.run(arguments(tmp_path / "resumed", **again))
    assert len(records(tmp_path / "resumed")) == 5
    assert [stage for stage, _ in held] == ["sft"] * 3 + ["grpo"] * 8
    for stage, share in held:  # images and features are small beside it
        copies = 3 + (stage == "grpo" and kl > 0)
        assert copies <= share < copies + 0.5


@pytest.mark.parametrize("layout", ["group", "packed"])
def test_a_step_begins_without_the_features_of_the_one_before(
    layout, warm, data, tmp_path, monkeypatch
):
    packed, collect, shapes, seen = train.packed, train.collect, set(), []

    def remember(stage, got, *more):
        shapes.add(got.features.shape[-2:])
        return packed(stage, got, *more)

    def look(*given):
        gc.collect()
        alive = [x for x in jax.live_arrays() if x.ndim > 2 and x.shape[-2:] in shapes]
        seen.append(sum(not array.is_deleted() for array in alive))
        return collect(*given)

    monkeypatch.setattr(train, "packed", remember)
    monkeypatch.setattr(train, "collect", look)
    keys = {"model_path": warm / "final", "stages": "grpo", "eval_rows_per_source": 0, **data}
    keys |= {"batch_layout": layout, "batch_windows": 5}  # with which no parameter has such a shape
    assert main(arguments(tmp_path / "run", **keys)) == 0
    assert shapes == {(20, 32)}
    assert seen == [0, 0, 0]
