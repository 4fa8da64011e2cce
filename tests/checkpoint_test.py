import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.errors import UserError
from vtriune_jax.types import TrainState

OPTIMIZER = optax.adamw(1e-3)
EXTRA = {"data": {"seed": 7, "row": 12}, "stage": "grpo", "history": [0.25, None, "x"]}


def make_state(seed: int = 0, width: int = 5) -> TrainState:
    key = jax.random.key(seed)
    params = {
        "language": {"kernel": jax.random.normal(key, (3, width))},
        "visual": {"scale": jax.random.normal(key, (width,), jnp.bfloat16)},
    }
    return TrainState(jnp.int32(seed), params, OPTIMIZER.init(params))


def assert_equal(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def steps_on_disk(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def truncate_arrays(step: Path) -> None:
    for file in step.glob("state/d/*"):
        os.truncate(file, file.stat().st_size // 2)


def test_what_is_restored_is_what_was_saved_bit_for_bit(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path / "checkpoints", every=1, keep=2) as checkpointer:
        assert checkpointer.restore(state) is None
        checkpointer.save(3, state, EXTRA)
    with Checkpointer(tmp_path / "checkpoints", every=1, keep=2) as checkpointer:
        restored, extra, _ = checkpointer.restore(jax.eval_shape(make_state))
    assert_equal(restored, state)
    assert isinstance(restored, TrainState)
    assert extra == EXTRA


def test_saves_every_so_many_steps_and_keeps_the_newest(tmp_path):
    with Checkpointer(tmp_path, every=2, keep=2) as checkpointer:
        for step in range(1, 8):
            if checkpointer.due(step):
                checkpointer.save(step, make_state(step), {})
        checkpointer.wait()
        assert steps_on_disk(tmp_path) == ["4", "6"]
        checkpointer.save(7, make_state(7), {"last": True})
        checkpointer.save(7, make_state(7), {"again": True})
        assert checkpointer.restore(make_state())[1] == {"last": True}


def test_donating_and_changing_right_after_save_does_not_reach_the_checkpoint(tmp_path):
    size = 4_000_000
    fill = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 7, state), donate_argnums=0)

    def big(step: int) -> TrainState:
        params = {"w": jax.random.normal(jax.random.key(step), (size,))}
        return TrainState(jnp.int32(step), params, ())

    fill(big(0))
    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        state, extra = jax.block_until_ready(big(1)), {"rows": [1]}
        checkpointer.save(1, state, extra)
        extra["rows"].append(2)
        jax.block_until_ready(fill(state))
        checkpointer.wait()
        assert_equal(checkpointer.restore(big(0))[0], big(1))
        assert checkpointer.restore(big(0))[1] == {"rows": [1]}

        state = jax.block_until_ready(big(2))
        checkpointer.save(2, state, {})
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        restored = checkpointer.restore(big(0))[0]
        assert_equal(restored, big(2))
        fill(restored)  # and what was restored may be donated


KILLED_IN_MID_SAVE = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.types import TrainState

directory = Path(sys.argv[1])
state = lambda step: TrainState(jnp.int32(step), {"w": jnp.full((16_000_000,), step / 3)}, ())
checkpointer = Checkpointer(directory, every=1, keep=2)
checkpointer.save(1, state(1), {"step": 1})
checkpointer.wait()
checkpointer.save(2, state(2), {"step": 2})
while not list(directory.glob("2.*")):
    time.sleep(0.0005)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_in_mid_save_leaves_the_step_before(tmp_path):
    killed = run_python(KILLED_IN_MID_SAVE, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = steps_on_disk(tmp_path)
    assert left[0] == "1"
    assert left[1].startswith("2.")
    with Checkpointer(tmp_path, every=1, keep=2) as checkpointer:
        wanted = TrainState(jnp.int32(1), {"w": jnp.full((16_000_000,), 1 / 3)}, ())
        restored, extra, _ = checkpointer.restore(wanted)
        assert_equal(restored, wanted)
        assert extra == {"step": 1}
        checkpointer.save(2, wanted, {"step": 2})
    assert steps_on_disk(tmp_path) == ["1", "2"]


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.types import TrainState

def state(shape, specs):
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor"))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = {"w": put(jnp.arange(128.0).reshape(8, 16), specs), "b": put(jnp.ones(3), P())}
    return TrainState(put(jnp.int32(5), P()), params, ())

written = state((2, 2, 2), P("fsdp", "tensor"))
wanted = state((1, 8, 1), P(None, "fsdp"))
with Checkpointer(sys.argv[1], every=1, keep=1) as checkpointer:
    checkpointer.save(5, written, {})
    checkpointer.wait()
    restored, _, _ = checkpointer.restore(wanted)
for name in ("w", "b"):
    assert restored.params[name].sharding == wanted.params[name].sharding, restored.params[name]
    assert np.array_equal(restored.params[name], written.params[name])
print("ok", len(restored.params["w"].addressable_shards))
"""


def test_restores_onto_the_shardings_asked_for(tmp_path):
    done = run_python(SHARDED, tmp_path, JAX_NUM_CPU_DEVICES="8")
    assert done.stdout == "ok 8\n", done.stderr


def test_another_model_is_one_line_naming_the_checkpoint_and_the_remedy(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
        checkpointer.save(3, make_state(), {})
        checkpointer.wait()
        with pytest.raises(UserError) as error:
            checkpointer.restore(make_state(width=6))
        assert "\n" not in str(error.value)
        assert f"checkpoint {tmp_path / '3'} is of another model" in str(error.value)
        assert (
            "opt_state/0/mu/language/kernel is float32[3, 5] there and float32[3, 6] here"
            in str(error.value)
        )
        state = make_state()
        with pytest.raises(UserError, match=r"absent here .* use the config"):
            checkpointer.restore(TrainState(state.step, state.params, ()))


# In a process of its own, whose stderr is what a user sees.
RESTORED = """
import sys
import jax.numpy as jnp
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.errors import UserError
from vtriune_jax.types import TrainState

def state(step):
    return TrainState(jnp.int32(step), {f"w{i}": jnp.full(3000, step / 3) for i in range(20)}, ())

with Checkpointer(sys.argv[1], every=1, keep=3) as checkpointer:
    restored, extra, _ = checkpointer.restore(state(0))
    print(int(restored.step), extra, bool((restored.params["w7"] == state(1).params["w7"]).all()))
    checkpointer.save(2, state(20), {"step": 2})
    checkpointer.wait()
    print(int(checkpointer.restore(state(0))[0].step))
"""


def test_damaged_arrays_fall_back_to_the_step_before_with_a_warning(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        for step in (1, 2):
            params = {f"w{i}": jnp.full(3000, step / 3) for i in range(20)}
            checkpointer.save(step, TrainState(jnp.int32(step), params, ()), {"step": step})
    truncate_arrays(tmp_path / "2")
    done = run_python(RESTORED, tmp_path)
    assert done.stdout == "1 {'step': 1} True\n20\n", done.stderr
    [line] = done.stderr.splitlines()
    assert f"checkpoint {tmp_path / '2'} cannot be read" in line
    assert "going on from step 1" in line
    assert len(list(tmp_path.glob("unreadable-2-*"))) == 1


def test_a_damaged_record_falls_back_to_the_step_before_with_a_warning(tmp_path, caplog):
    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"step": step})
    os.truncate(tmp_path / "2" / "extra" / "metadata", 9)
    with (
        Checkpointer(tmp_path, every=1, keep=3) as checkpointer,
        caplog.at_level(logging.WARNING),
    ):
        restored, extra, _ = checkpointer.restore(make_state())
    assert_equal(restored, make_state(1))
    assert extra == {"step": 1}
    assert "going on from step 1" in caplog.text


def test_when_no_step_can_be_read_nothing_is_touched(tmp_path):
    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        checkpointer.save(1, make_state(), {})
    os.truncate(tmp_path / "1" / "extra" / "metadata", 9)
    with (
        Checkpointer(tmp_path, every=1, keep=3) as checkpointer,
        pytest.raises(UserError, match=r"no checkpoint in .* can be read \(steps \[1\]"),
    ):
        checkpointer.restore(make_state())
    assert steps_on_disk(tmp_path) == ["1"]


def test_what_json_cannot_say_is_an_error_at_once(tmp_path):
    with (
        Checkpointer(tmp_path, every=1, keep=3) as checkpointer,
        pytest.raises(TypeError, match="not JSON serializable"),
    ):
        checkpointer.save(1, make_state(), {"rows": np.zeros(2)})
    assert steps_on_disk(tmp_path) == []


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with (
        Checkpointer(tmp_path, every=1, keep=3) as checkpointer,
        pytest.raises(
            UserError, match=r"no space left to write .*MiB needed, 0.0 MiB free\); free"
        ),
    ):
        checkpointer.save(1, make_state(), {})
    assert steps_on_disk(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "x"), ValueError("RESOURCE_EXHAUSTED: … No space left on device …")]
)
def test_a_disk_that_fills_up_in_mid_save_is_one_line(tmp_path, monkeypatch, error):
    def fail():
        raise error

    with Checkpointer(tmp_path, every=1, keep=3) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fail)
        with pytest.raises(UserError, match=r"no space left to write .*; free"):
            checkpointer.wait()
        monkeypatch.undo()
