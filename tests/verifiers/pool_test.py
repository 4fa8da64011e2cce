import os
import signal
import time

import psutil
import pytest

from vtriune_jax.verifiers.pool import CHUNK, LARGEST_CHUNK, Pool, WorkerDied

LIMIT = 1.0
ALONE, BATCH = "tests.verifiers.rogue", "tests.verifiers.rogue_batch"
WORKER = "vtriune_jax.verifiers.worker"
FINE = {"accuracy": 1.0, "format": 0.0}


@pytest.fixture
def pool():
    pool = Pool(2, LIMIT)
    yield pool
    pool.close()


def ask(pool, module, *completions):
    calls = [(module, (completion, "", {}, 0.0)) for completion in completions]
    return pool.submit(calls).result(timeout=30)


def test_answers_come_in_order_from_as_many_processes_as_asked_for(pool):
    answers = ask(pool, ALONE, *["pid", "fine", "raise"] * 100)
    assert answers[1::3] == [FINE] * 100
    assert answers[2::3] == ["ValueError: as told, in two lines"] * 100
    assert len({answer["pid"] for answer in answers[::3]}) <= 2
    assert pool.replaced == 0


def test_none_is_started_before_it_is_needed(pool):
    def workers():
        return {child for child in psutil.Process().children() if WORKER in child.cmdline()}

    others = workers()  # of other tests' pools
    assert pool.submit([]).result() == []
    assert workers() == others
    ask(pool, ALONE, "fine")
    assert workers() > others


def test_an_endless_completion_costs_its_neighbours_nothing(pool):
    start = time.monotonic()
    answers = ask(pool, ALONE, *["fine"] * 20, "sleep 60", *["fine"] * 20, "sleep 60", "raise")
    assert time.monotonic() - start < 30
    for place in (20, 41):
        assert isinstance(answers[place], TimeoutError)
        assert str(answers[place]) == "took longer than 1 s"
    assert answers[42] == "ValueError: as told, in two lines"
    assert [a for k, a in enumerate(answers) if k not in (20, 41, 42)] == [FINE] * 40
    assert pool.replaced == 2


def test_batches_are_judged_together_and_one_by_one_if_that_takes_too_long(pool):
    assert ask(pool, BATCH, "fine")[0]["together"] == 1
    many = ask(pool, BATCH, *["fine"] * 4 * LARGEST_CHUNK)  # enough for large ones for everyone
    assert max(a["together"] for a in many) == LARGEST_CHUNK
    answers = ask(pool, BATCH, *["fine"] * 8, "sleep 60", *["fine"] * 8)
    assert isinstance(answers.pop(8), TimeoutError)
    assert {answer["accuracy"] for answer in answers} == {1.0}
    assert min(answer["together"] for answer in answers) == 1
    # nor may one that exceeds the limit only together with others be masked
    assert {a["accuracy"] for a in ask(pool, BATCH, *["sleep 0.4"] * 6)} == {1.0}


def test_the_one_idle_worker_leaves_some_for_the_others(pool):
    ask(pool, BATCH, "fine", "fine")
    busy = pool.submit([(ALONE, ("sleep 0.5", "", {}, 0.0))])
    while pool.waiting:
        time.sleep(0.01)
    assert max(a["together"] for a in ask(pool, BATCH, *["fine"] * 2 * CHUNK)) == CHUNK
    assert busy.result(timeout=30) == [FINE]


def test_a_batch_that_loses_an_answer_is_an_error(pool):
    answers = ask(pool, BATCH, "lose one", "fine", "fine", "fine")
    assert "did not return a list of" in answers[0]


def test_a_completion_that_kills_is_found_out_and_a_killed_one_is_judged_again(pool, tmp_path):
    for module in (ALONE, BATCH):
        answers = ask(pool, module, "fine", "die", f"die once {tmp_path / module}", "fine")
        died = answers.pop(1)
        assert isinstance(died, WorkerDied)
        assert "exit status -9" in str(died)
        assert [answer["accuracy"] for answer in answers] == [1.0] * 3


def test_a_worker_that_was_stopped_does_not_hold_up_the_rest():
    pool = Pool(1, LIMIT)
    try:
        pid = ask(pool, ALONE, "pid")[0]["pid"]
        os.kill(pid, signal.SIGSTOP)
        # more than fits into the socket: it is the sending that hangs
        answers = ask(pool, ALONE, "x" * 2**24, "fine")
        assert isinstance(answers[0], TimeoutError)
        assert answers[1] == FINE
        assert not psutil.pid_exists(pid)
    finally:
        pool.close()


def test_memory_is_bounded_and_a_fat_worker_is_replaced():
    pool = Pool(2, 60.0)  # to fill so much memory takes a while on a busy machine
    try:
        check_memory(pool)
    finally:
        pool.close()


def check_memory(pool):
    assert ask(pool, ALONE, "grow 2000", "fine") == ["MemoryError", FINE]
    assert pool.replaced == 0
    assert ask(pool, ALONE, "keep 600", "fine", "fine") == [FINE] * 3
    deadline = time.monotonic() + 30
    while pool.replaced < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.replaced == 1


def test_what_cannot_be_imported_says_why(pool):
    (answer,) = ask(pool, "tests.verifiers.nowhere", "fine")
    assert answer == "ModuleNotFoundError: No module named 'tests.verifiers.nowhere'"


def test_any_function_can_be_called(pool):
    answer = pool.call("json", "dumps", {"a": 1}, indent=None)
    assert answer.result(timeout=30) == ['{"a": 1}']


def test_what_waits_can_be_cancelled():
    pool = Pool(1, LIMIT)
    try:
        slow = pool.submit([(ALONE, ("sleep 0.5", "", {}, 0.0))])
        while pool.waiting:
            time.sleep(0.01)
        waiting = pool.submit([(ALONE, ("fine", "", {}, 0.0))] * 10)
        assert pool.waiting == 10
        assert waiting.cancel()
        assert slow.result(timeout=30) == [FINE]
        assert ask(pool, ALONE, "fine") == [FINE]
    finally:
        pool.close()


def test_closing_finishes_what_is_being_judged_and_ends_the_workers():
    pool = Pool(1, LIMIT)
    pid = ask(pool, ALONE, "pid")[0]["pid"]
    first = pool.submit([(ALONE, ("sleep 0.3", "", {}, 0.0))])
    while pool.waiting:
        time.sleep(0.01)
    second = pool.submit([(ALONE, ("fine", "", {}, 0.0))])
    pool.close()
    assert first.result() == [FINE]
    assert second.result() == ["the verifiers were closed"]
    assert not psutil.pid_exists(pid)
    assert ask(pool, ALONE, "fine") == ["the verifiers were closed"]
