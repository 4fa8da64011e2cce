"""Over-sampling: which prompts come again, with what, and that each is trained on once."""

import random
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pretend import Processes
from vtriune_jax import hosts
from vtriune_jax.data.stream import Chunk, PromptStream
from vtriune_jax.tail import TailStream
from vtriune_jax.types import Completion, Group

SIZE = 4


def chunks():
    for k in range(99):
        prompts = [SimpleNamespace(number=SIZE * k + i) for i in range(SIZE)]
        yield Chunk(k, prompts, [], {"k": k}, {"k": k + 1})


def partial(tokens):
    return Completion(np.zeros(tokens, np.int32), np.zeros(tokens), "", "abort")


class Servers:
    """Complete the prompts of the given numbers last, and remember what they were asked."""

    def __init__(self, slow=lambda numbers: set()):
        self.slow, self.asked = slow, []

    def submit(self, new, needed, begun):
        self.asked.append(([p.number for p in new], [g.prompt.number for g in begun]))
        prompts = [group.prompt for group in begun] + list(new)
        slow = self.slow([prompt.number for prompt in prompts])
        order = sorted(prompts, key=lambda prompt: prompt.number in slow)
        done = {prompt.number for prompt in order[:needed]}
        future = Future()
        future.set_result(
            SimpleNamespace(
                groups=[Group(p, ()) for p in prompts if p.number in done],
                begun=[Group(p, (partial(3),)) for p in prompts if p.number not in done],
            )
        )
        return future


def step(stream, servers):
    prompts, _ = stream.take()
    groups = stream.answer(servers.submit, prompts)
    stream.trained(groups)
    return [group.prompt.number for group in groups]


def test_stragglers_come_first_in_the_next_step_with_the_tokens_they_have():
    stream = TailStream(PromptStream(chunks(), SIZE), 2, carry=lambda group: True)
    servers = Servers(slow=lambda numbers: {1, 3} if 0 in numbers else set())
    assert step(stream, servers) == [0, 2, 4, 5]
    assert [ticket["number"] for ticket in stream.position()["left"]] == [1, 3]
    assert step(stream, servers) == [1, 3, 6, 7]
    assert servers.asked == [([0, 1, 2, 3, 4, 5], []), ([6, 7, 8, 9], [1, 3])]


def test_tokens_that_are_too_old_are_drawn_anew():
    stream = TailStream(PromptStream(chunks(), SIZE), 2, carry=lambda g: g.prompt.number == 3)
    servers = Servers(slow=lambda numbers: {1, 3} if 0 in numbers else set())
    step(stream, servers)
    step(stream, servers)
    assert servers.asked[1] == ([1, 6, 7, 8, 9], [3])


def test_a_run_that_goes_on_has_the_same_prompts():
    stream = TailStream(PromptStream(chunks(), SIZE), 2, carry=lambda group: True)
    servers = Servers(slow=lambda numbers: {1, 3} if 0 in numbers else set())
    step(stream, servers)
    position = stream.position()
    assert position["taken"] == 6
    left = [(SimpleNamespace(number=ticket["number"]), ticket) for ticket in position["left"]]
    more = (chunk for chunk in chunks() if chunk.number >= position["data"]["k"])
    rest = PromptStream(more, SIZE, position["taken"], position["data"])
    resumed = TailStream(rest, 2, lambda group: True, left)
    assert resumed.position() == position
    assert step(resumed, servers) == [1, 3, 6, 7]
    assert servers.asked[-1] == ([1, 3, 6, 7, 8, 9], [])  # anew: tokens are not saved


@given(st.data(), st.integers(0, 5), st.booleans())
def test_every_prompt_is_trained_on_once_or_left(data, extra, carry):
    def slow(numbers):
        return set(data.draw(st.lists(st.sampled_from(numbers))))

    stream = TailStream(PromptStream(chunks(), SIZE), extra, carry=lambda group: carry)
    trained = [number for _ in range(5) for number in step(stream, Servers(slow))]
    position = stream.position()
    left = [ticket["number"] for ticket in position["left"]]
    assert len(trained) == 5 * SIZE
    assert sorted(trained + left) == list(range(position["taken"]))


@pytest.mark.parametrize("counts", [(2, 2), (2, 4), (4, 1), (1, 2)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_several_processes_share_them_and_another_number_goes_on(counts, ahead, monkeypatch):
    """Steps overlap, and processes are of different speed: each prompt is trained on once or left,
    and all know the same next one."""
    position, trained, steps = {"taken": 0, "data": {"k": 0}}, [], 5

    for count in counts:
        processes = Processes(count, monkeypatch)

        def run(index, count=count, position=position):
            share, chance = hosts.share(), random.Random(index)

            rows = (
                replace(chunk, prompts=chunk.prompts[share.slice])
                for chunk in chunks()
                if chunk.number >= position["data"]["k"]
            )
            first, data = position["taken"], position["data"]
            stream = PromptStream(rows, SIZE, first, data, index=index, count=count)
            tickets = position.get("left", [])[share.slice]
            left = [(SimpleNamespace(number=ticket["number"]), ticket) for ticket in tickets]
            tail = TailStream(stream, 4, lambda group: True, left)
            servers = Servers(lambda numbers: set(chance.sample(numbers, len(numbers) // 2)))
            begun, done = [], []
            for step in range(steps):
                while len(begun) <= min(ahead, steps - 1 - step):
                    begun.append(tail.take()[0])
                    if chance.random() < 0.5:  # it is quick, and has its stragglers early
                        begun[-1] = tail.answer(servers.submit, begun[-1])
                groups = begun.pop(0)
                if not isinstance(groups[0], Group):
                    groups = tail.answer(servers.submit, groups)
                assert len(groups) == SIZE // count
                tail.trained(groups)
                done += [group.prompt.number for group in groups]
            return done, tail.position()

        results = processes.run(run)
        assert len({repr(where) for _, where in results}) == 1
        trained += [number for done, _ in results for number in done]
        position = results[0][1]
    left = [ticket["number"] for ticket in position["left"]]
    assert len(trained) == 2 * steps * SIZE
    assert sorted(trained + left) == list(range(position["taken"]))
    assert len(left) <= 4 * (ahead + 1)
