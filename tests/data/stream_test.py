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
