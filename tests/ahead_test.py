"""Which parameters a step's completions come from, and where a run would go on."""

import contextlib
import threading
from types import SimpleNamespace

import pytest

from vtriune_jax.ahead import Ahead
from vtriune_jax.data.stream import Chunk, PromptStream

SIZE = 2


class Clock:
    def __init__(self, step):
        self.step, self.parts = step, []

    def __call__(self, part):
        self.parts.append(part)
        return contextlib.nullcontext()


def stream(first=0):
    chunks = (Chunk(k, [SIZE * k, SIZE * k + 1], [], {"k": k}, {"k": k + 1}) for k in range(99))
    return PromptStream(chunks, SIZE, first)


def collect(step, params, first, clock):
    return SimpleNamespace(step=step, version=params, prompts=first[0], all_groups=[step])


def train(ahead, steps, do=collect, threads=False):
    """Versions count the updates: `step` is trained from version `step`."""
    with Ahead(do, stream(), Clock, ahead=ahead, last=steps, threads=threads) as rollouts:
        for step in range(steps):
            got, clock = rollouts.take(step, step)
            assert (got.step, clock.step) == (step, step)
            yield got, rollouts.position()


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_no_completion_is_older_than_ahead_and_every_prompt_comes_once(ahead, threads):
    got = [each for each, _ in train(ahead, 6, threads=threads)]
    assert [each.version for each in got] == [max(0, step - ahead) for step in range(6)]
    assert [number for each in got for number in each.prompts] == list(range(12))


def test_a_run_would_go_on_with_the_prompts_and_completions_of_the_next_step():
    for step, (_, (position, waiting)) in enumerate(train(1, 4)):
        assert position == {"taken": SIZE * (step + 1), "data": {"k": step + 1}}
        assert waiting == ([step + 1] if step < 3 else [])
    for step, (_, (position, waiting)) in enumerate(train(0, 4)):
        assert position == {"taken": SIZE * (step + 1), "data": {"k": step + 1}}
        assert waiting == []


def test_steps_are_sampled_while_an_earlier_one_is_trained_on():
    """Steps 1 and 2 wait for each other: they end only if both are on their way at once."""
    both = threading.Barrier(2)

    def meet(step, params, first, clock):
        if step in (1, 2):
            both.wait(timeout=30)
        return collect(step, params, first, clock)

    assert len(list(train(2, 4, meet, threads=True))) == 4


def test_what_goes_wrong_in_the_background_is_raised_at_its_step():
    def fail(step, params, first, clock):
        if step == 2:
            raise ZeroDivisionError
        return collect(step, params, first, clock)

    run = train(2, 6, fail, threads=True)
    assert next(run)[0].step == 0
    with pytest.raises(ZeroDivisionError):
        next(run)  # whose position is that of step 2
