from dataclasses import replace
from types import SimpleNamespace

import pytest

from vtriune_jax.data.feed import Skipped
from vtriune_jax.data.stream import Chunk, PromptStream

SIZE = 4


def chunks(first=0):
    """Chunk k has the prompts 4k … 4k + 3 and passes over one row; the mixture counts chunks."""
    for k in range(first, 20):
        prompts = [SimpleNamespace(number=SIZE * k + i) for i in range(SIZE)]
        yield Chunk(k, prompts, [Skipped(f"row {k}", "torn")], {"drawn": k}, {"drawn": k + 1})


def numbers(prompts):
    return [prompt.number for prompt in prompts]


def test_without_giving_back_a_chunk_is_taken_at_a_time():
    stream = PromptStream(chunks(), SIZE)
    for k in range(3):
        prompts, skipped = stream.take()
        assert numbers(prompts) == list(range(SIZE * k, SIZE * k + SIZE))
        assert [row.data_source for row in skipped] == [f"row {k}"]
        assert stream.position() == {"taken": SIZE * (k + 1), "data": {"drawn": k + 1}}


def test_what_is_given_back_comes_first_and_is_told_once():
    stream = PromptStream(chunks(), SIZE)
    stream.take()
    stream.take()
    stream.give_back(5)
    assert stream.position() == {"taken": 3, "data": {"drawn": 0}}
    prompts, skipped = stream.take()
    assert (numbers(prompts), skipped) == ([3, 4, 5, 6], [])
    prompts, skipped = stream.take()
    assert numbers(prompts) == [7, 8, 9, 10]
    assert [row.data_source for row in skipped] == ["row 2"]


@pytest.mark.parametrize("back", range(SIZE))
def test_a_stream_goes_on_from_a_position(back):
    whole = PromptStream(chunks(), SIZE)
    whole.take()
    whole.take()
    whole.give_back(back)
    position = whole.position()
    resumed = PromptStream(chunks(position["data"]["drawn"]), SIZE, position["taken"])
    for _ in range(3):
        assert whole.take() == resumed.take()
        assert whole.position() == resumed.position()


def test_any_number_can_be_taken_and_each_prompt_has_a_ticket():
    stream = PromptStream(chunks(), SIZE)
    assert numbers(stream.take(6)[0]) == [0, 1, 2, 3, 4, 5]
    assert stream.tickets(3) == [
        {"number": 3, "data": {"drawn": 0}},
        {"number": 4, "data": {"drawn": 1}},
        {"number": 5, "data": {"drawn": 1}},
    ]
    assert stream.take(0) == ([], [])
    assert stream.tickets(0) == []
    assert numbers(stream.take()[0]) == [6, 7, 8, 9]
    assert stream.position() == {"taken": 10, "data": {"drawn": 2}}


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_take_what_one_takes(count):
    """Wherever a step begins: each has the prompts of its remainder, and knows which they are."""

    def share(index):
        for chunk in chunks():
            yield replace(chunk, prompts=chunk.prompts[index::count])

    whole = PromptStream(chunks(), SIZE)
    parts = [PromptStream(share(index), SIZE, index=index, count=count) for index in range(count)]
    for back in (0, 3, 0, 5, 2, 0):
        prompts, _ = whole.take()
        for index, part in enumerate(parts):
            taken, _ = part.take()
            assert taken == prompts[part.place() :: count]
            assert {prompt.number % count for prompt in taken} == {index}
        for stream in (whole, *parts):
            stream.give_back(back)
        assert all(part.position() == whole.position() for part in parts)


def test_any_prompt_of_a_step_can_be_made_again_by_any_process():
    stream = PromptStream(chunks(), SIZE, index=1, count=2, again=lambda ticket: ticket)
    stream.take()
    stream.take()
    make = stream.maker(2 * SIZE)
    assert make(1) == {"number": 1, "data": {"drawn": 0}}
    assert make(6) == {"number": 6, "data": {"drawn": 1}}
