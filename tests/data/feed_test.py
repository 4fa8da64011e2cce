import contextlib
import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import make_sample
from vtriune_jax.data import feed as module
from vtriune_jax.data.feed import Skipped, feed, tell, tell_once
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.errors import UserError


class Rows(list):
    """A stand-in for a source; the rows whose number is in `bad` have no prompt."""

    def __init__(self, name, count, bad=()):
        super().__init__(
            make_sample(images=(), data_source=name, id=f"{name}{k}{'!' * (k in bad)}")
            for k in range(count)
        )
        self.name = name


def make(sample):
    """The prompt of a sample is its id here; some take longer than others."""
    time.sleep(0.0002 * (hash(sample.id) % 5))
    if sample.id.endswith("!"):
        raise UserError(f"{sample.id} is broken")
    return sample.id


def wait_until(holds):
    """Ten seconds at most."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def mixture(seed=5):
    rows = [(Rows("a", 7, bad={1, 2}), 2.0), (Rows("b", 5, bad=range(4)), 1.0), (Rows("c", 9), 0.5)]
    return Mixture(rows, seed=seed)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_prompts_come_in_order(threads):
    samples = Rows("a", 40)
    with feed(threads, "error") as source:
        assert source.prompts(samples, make) == [sample.id for sample in samples]


def test_the_first_bad_sample_is_the_error():
    def slow_first(sample):
        time.sleep(0.05 if sample.id == "a3!" else 0)
        return make(sample)

    with feed(4, "error") as source, pytest.raises(UserError, match="a3! is broken"):
        source.prompts(Rows("a", 9, bad={3, 4, 5}), slow_first)


def test_bad_samples_are_left_out_and_told_of(capsys):
    with feed(4, "skip") as source:
        found = source.prompts(Rows("a", 6, bad={1, 4}), make)
    skipped = [Skipped("a", "a1! is broken"), Skipped("a", "a4! is broken")]
    assert found == ["a0", skipped[0], "a2", "a3", skipped[1], "a5"]
    tell(skipped, "held-out")
    tell([], "held-out")
    assert capsys.readouterr().out == "held-out: bad rows skipped: 2, the first: a1! is broken\n"


def test_of_each_source_the_first_bad_row_is_told(capsys):
    told = set()
    for step, rows in enumerate([["a1"], [], ["a4", "b2", "b3"], ["b1", "a1"]]):
        tell_once([Skipped(row[0], f"{row} is broken") for row in rows], f"step {step}", told)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 0: a bad row of a is skipped (a1 is broken); further ones are")
    assert second.startswith("step 2: a bad row of b is skipped (b2 is broken); further ones are")


@given(threads=st.integers(1, 6), counts=st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_draws_are_full_and_the_same_for_any_threads(threads, counts):
    one, other = mixture(), mixture()
    with feed(1, "skip") as single, feed(threads, "skip") as several:
        for number, count in enumerate(counts):
            prompts, skipped = several.draw(other, count, make, number)
            assert (prompts, skipped) == single.draw(one, count, make, number)
            assert len(prompts) == count
            assert not any(prompt.endswith("!") for prompt in prompts)
            assert one.state() == other.state()
    drawn = sum(n for key, n in other.state().items() if key.startswith("drawn/"))
    assert drawn == sum(counts)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_shares_of_several_processes_make_the_draw_of_one(processes):
    """Though each skips bad rows of its own, and stands where the others stand in the data."""
    whole, parts = mixture(), [mixture() for _ in range(processes)]
    total = 0
    with feed(2, "skip") as source:
        for number in range(5):
            prompts, skipped = source.draw(whole, 12, make, number)
            shares = [
                source.draw(part, 12, make, number, slice(index, None, processes))
                for index, part in enumerate(parts)
            ]
            for index, (own, _) in enumerate(shares):
                assert own == prompts[index::processes]
            assert sorted(row.fault for _, bad in shares for row in bad) == sorted(
                row.fault for row in skipped
            )
            assert all(part.state() == whole.state() for part in parts)
            total += len(skipped)
    assert total


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_resume_equals_uninterrupted(cut):
    def steps(stream, numbers):
        with feed(3, "skip") as source:

            def prepare(step):
                return *source.draw(stream, 6, make, step), stream.state()

            return list(source.ahead(prepare, numbers))

    whole = steps(mixture(), range(8))
    assert any(skipped for _, skipped, _ in whole)
    begun = steps(mixture(), range(cut))
    position = json.loads(json.dumps(begun[-1][2]))
    assert begun + steps(mixture().restore(position), range(cut, 8)) == whole


def test_a_mixture_without_good_rows_is_an_error(monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP", 50)
    broken = Mixture([(Rows("a", 3, bad=range(3)), 1.0)], seed=0)
    with feed(2, "skip") as source:
        with pytest.raises(UserError, match=r"none of 5\d rows in succession can .* is broken"):
            source.draw(broken, 7, make)
        monkeypatch.setattr(module, "GIVE_UP", 500)
        mostly = Mixture([(Rows("a", 10, bad=range(9)), 1.0)], seed=0)
        assert source.draw(mostly, 3, make)[0] == ["a9"] * 3


def test_one_ahead_and_none_beyond_the_end():
    begun = []

    def prepare(number):
        begun.append(number)
        return number

    with feed(1, "error") as source:
        steps = source.ahead(prepare, range(3))
        assert next(steps) == 0
        wait_until(lambda: begun == [0, 1])
        time.sleep(0.02)
        assert begun == [0, 1]
        assert list(steps) == [1, 2]
        assert begun == [0, 1, 2]
        assert list(source.ahead(prepare, range(0))) == []


def test_an_error_ahead_is_raised_at_its_step():
    def prepare(number):
        if number == 2:
            raise UserError("step 2 is bad")
        return number

    with feed(1, "error") as source:
        steps = source.ahead(prepare, range(5))
        assert [next(steps), next(steps)] == [0, 1]
        with pytest.raises(UserError, match="step 2 is bad"):
            next(steps)


def test_leaving_early_ends_all_threads():
    """What was begun is finished, of what waits nothing is."""
    release, made = threading.Event(), []

    def slow(sample):
        release.wait(10)
        made.append(sample.id)
        return sample.id

    def prepare(number):
        return [number] if number == 0 else source.draw(mixture(), 50, slow)[0]

    before = set(threading.enumerate())

    def names():
        return [t.name for t in set(threading.enumerate()) - before if "prompt" in t.name]

    with contextlib.suppress(KeyError), feed(2, "skip") as source:
        next(source.ahead(prepare, range(9)))
        wait_until(lambda: len(names()) == 3)
        threading.Timer(0.05, release.set).start()
        raise KeyError
    assert len(made) <= 2
    assert names() == []
