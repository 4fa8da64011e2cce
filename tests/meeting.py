"""One of several processes that meet: python -m tests.meeting PORT PROCESSES PROCESS FOLDER

Asserts whatever several processes are needed for; its status tells the test.
"""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vtriune_jax import exchange, hosts, sharding, waiting
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.errors import UserError
from vtriune_jax.rl.update import init_state
from vtriune_jax.steps import advantages
from vtriune_jax.types import Completion, Group, Verdict

PORT, COUNT, INDEX, FOLDER = *map(int, sys.argv[1:4]), Path(sys.argv[4])


def error(block, *arguments) -> str:
    try:
        block(*arguments)
    except UserError as found:
        return str(found)
    return ""


def values_are_exchanged() -> None:
    assert hosts.gather({"i": INDEX, "x": "é" * INDEX}) == [
        {"i": i, "x": "é" * i} for i in range(COUNT)
    ]
    long = "x" * 5000 if INDEX == 1 else ""
    assert [len(text) for text in hosts.gather(long)] == [5000 * (i == 1) for i in range(COUNT)]
    assert hosts.from_first(lambda: INDEX + 7) == 7


def an_error_of_one_is_an_error_of_all() -> None:
    def block():
        with hosts.together():
            if INDEX == 1:
                raise UserError("row 5 is broken")

    assert error(block) == ("" if INDEX == 1 else "process 1: ") + "row 5 is broken"
    assert not error(hosts.check_same, "settings", {"a": 1, "b": 2})
    words = "the processes have different settings: b is 0 for process 0 and 1 for process 1; "
    assert error(hosts.check_same, "settings", {"a": 1, "b": min(INDEX, 1)}).startswith(words)


def a_folder_of_ones_own_is_noticed() -> None:
    assert not error(hosts.check_shared, FOLDER / "shared")
    hosts.gather(None)
    assert list((FOLDER / "shared").iterdir()) == []
    words = error(hosts.check_shared, FOLDER / f"own{INDEX}", 0.2)
    assert "is not the folder that process 0 sees there" in words


def a_row_belongs_to_one_process() -> None:
    sharding.check_hosts(sharding.make_mesh())
    assert "several hosts in one group of `tensor`" in error(
        sharding.check_hosts, sharding.make_mesh(fsdp=1, tensor=-1)
    )


def rows_are_placed_and_fetched(mesh) -> None:
    own = np.arange(8 * INDEX, 8 * INDEX + 8)[:, None]
    placed = sharding.shard_rows({"a": own}, mesh)
    assert placed["a"].shape == (8 * COUNT, 1)
    assert not placed["a"].is_fully_addressable
    np.testing.assert_array_equal(sharding.local_rows(placed, mesh)["a"], own)
    again = sharding.shard_rows(placed, mesh)
    np.testing.assert_array_equal(sharding.local_rows(again, mesh)["a"], own)


def groups_go_where_they_are_trained_on() -> None:
    """Of two rounds of 8 groups the batch takes 8, too many of them from the first process."""

    def prompt(number):
        return SimpleNamespace(sample=SimpleNamespace(id=number))

    def group(number):
        ids = np.arange(number, dtype=np.int32)
        return Group(
            prompt(number), (Completion(ids, np.float32(ids / 3), f"é{number}", "stop"),) * 2
        )

    own = [*range(8)[hosts.share().slice], *range(8, 16)[hosts.share().slice]]
    held = {n: (group(n), [Verdict("ok", n / 7, {"accuracy": 0.5}), Verdict("error")]) for n in own}
    order = [0, 4, 8, 12, 1, 5, 9, 2]  # two minibatches
    given = exchange.shares(order, 2, hosts.gather(own))
    made = []
    batch = exchange.exchanged(given, held, lambda n: made.append(n) or prompt(n))
    assert [each.prompt.sample.id for each, _ in batch] == given[INDEX]
    assert len(batch) == 8 // COUNT
    assert made == [n for n in given[INDEX] if n not in held]
    for found, judged in batch:
        number = found.prompt.sample.id
        for completion, expected in zip(found.completions, group(number).completions, strict=True):
            np.testing.assert_array_equal(completion.ids, expected.ids)
            np.testing.assert_array_equal(completion.logps, expected.logps)
            assert (completion.text, completion.finish) == (expected.text, "stop")
        assert judged == [Verdict("ok", number / 7, {"accuracy": 0.5}), Verdict("error")]
    half = len(given[0]) // 2
    assert sorted(n for each in given for n in each[:half]) == sorted(order[:4])


def completions_of_all_come_in_the_order_of_their_prompts() -> None:
    """Prompts 5, 6, …, two of each process, whose completions tell their number."""
    numbers = range(5, 5 + 2 * COUNT)

    def group(number):
        ids = np.full(1 + number % 3, number, np.int32)
        completion = Completion(ids, np.float32(ids / 3), "", ("stop", "length")[number % 2])
        return Group(SimpleNamespace(), (completion,) * 2)

    own = [group(number) for number in numbers if number % COUNT == INDEX]
    arrays = waiting.to_arrays(own, first=5)
    found = waiting.from_arrays(arrays, lambda ids: "")
    assert [each[0].ids[0] for each in found] == list(numbers)
    for one, number in zip(found, numbers, strict=True):
        for got, want in zip(one, group(number).completions, strict=True):
            np.testing.assert_array_equal(got.ids, want.ids)
            np.testing.assert_array_equal(got.logps, want.logps)
            assert got.finish == want.finish
    assert waiting.to_arrays([], first=5) == {}
    place = (INDEX - 5) % COUNT
    answer = waiting.first_from(found, lambda *_: ["new"])
    ready = answer(None, ["one", "other"], None, place)
    assert [each.completions[0].ids[0] for each in ready] == [5 + place, 5 + place + COUNT]
    assert answer(None, ["one", "other"], None, place + 2 * COUNT) == ["new"]


def a_batch_is_compared_over_all_processes() -> None:
    scores = np.arange(4.0 * COUNT).reshape(2 * COUNT, 2) ** 2
    judged = [[Verdict("ok", score) for score in row] for row in scores.tolist()]
    stage = SimpleNamespace(advantage="reinforce++")
    values, weights = advantages(stage, [], judged[INDEX::COUNT], np.ones(2, bool))
    expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(values, expected[INDEX::COUNT], rtol=1e-6)
    assert weights.all()


def a_state_is_saved_and_restored_by_all(mesh) -> None:
    def make(seed):
        kernel = np.random.default_rng(seed).standard_normal((3, 8, 8), np.float32)
        params = {"language": {"layers": {"attn": {"q": {"kernel": jnp.asarray(kernel)}}}}}
        return init_state(params, optax.adamw(1e-3), mesh)

    folder, state = FOLDER / "checkpoints", make(0)
    kernel = state.params["language"]["layers"]["attn"]["q"]["kernel"]
    assert not kernel.is_fully_addressable
    with Checkpointer(folder, every=1, keep=2) as checkpoints:
        assert checkpoints.restore(state) is None
        for step in (1, 2, 3):
            checkpoints.save(step, make(step), {"done": step})
    hosts.gather(None)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    hosts.gather(None)
    if hosts.is_first():  # of the newest one nobody can read the arrays
        for file in (folder / "3").glob("state/**/d/*"):
            file.write_bytes(file.read_bytes()[:5])
    hosts.gather(None)
    with Checkpointer(folder, every=1, keep=2) as checkpoints:
        restored = checkpoints.restore(state)
    assert restored.extra == {"done": 2}
    for got, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(make(2)), strict=True):
        for one, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    assert [path.name[:12] for path in sorted(folder.iterdir())] == ["2", "unreadable-3"]


def main() -> None:
    hosts.join(f"127.0.0.1:{PORT}", COUNT, INDEX, 60)
    mesh = sharding.make_mesh()
    values_are_exchanged()
    an_error_of_one_is_an_error_of_all()
    a_folder_of_ones_own_is_noticed()
    a_row_belongs_to_one_process()
    rows_are_placed_and_fetched(mesh)
    groups_go_where_they_are_trained_on()
    completions_of_all_come_in_the_order_of_their_prompts()
    a_batch_is_compared_over_all_processes()
    a_state_is_saved_and_restored_by_all(mesh)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        try:
            main()
        finally:
            if sys.exc_info()[1]:
                hosts.leave(1)
