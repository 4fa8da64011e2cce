import resource
import socket
import subprocess
import sys
import threading

import pytest

from vtriune_jax.verifiers import pipe
from vtriune_jax.verifiers.pool import child_environment
from vtriune_jax.verifiers.worker import MEMORY_LIMIT, describe, guarded, judge

ROGUE = "tests.verifiers.rogue"


def test_an_exception_becomes_one_short_line():
    error = guarded(int, "x\ny" * 1000)
    assert isinstance(error, ValueError)
    assert "\n" not in describe(error)
    assert len(describe(error)) <= 500
    assert describe(KeyError()) == "KeyError"
    assert guarded(int, "7") == 7


def test_judging_never_raises():
    calls = [((text, "", {}, 0.0), {}) for text in ("fine", "raise", "nothing")]
    fine, raised, nothing = judge(ROGUE, "verify", calls)
    assert (fine["accuracy"], raised, nothing) == (1.0, "ValueError: as told, in two lines", None)
    assert (
        judge(f"{ROGUE}_batch", "verify_batch", calls) == ["ValueError: as told, in two lines"] * 3
    )


def test_messages_of_any_size_and_content():
    ours, theirs = socket.socketpair()
    message = {"text": "\ud800\0" * 2**20, "none": None}
    with ours, theirs:
        sender = threading.Thread(target=pipe.send, args=(ours, message))
        sender.start()
        assert pipe.receive(theirs) == message
        sender.join()
        ours.close()
        with pytest.raises(EOFError):
            pipe.receive(theirs)


def test_a_timeout_holds_for_both_directions():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        with pytest.raises(TimeoutError):
            pipe.send(ours, b"x" * 2**24)
        with pytest.raises(TimeoutError):
            pipe.receive(ours)


def start():
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "vtriune_jax.verifiers.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=child_environment(),
        )
    ours.settimeout(30)
    return process, ours


def test_the_process_is_limited_and_ends_with_its_parents_end():
    process, end = start()
    with process, end:
        pipe.send(end, ("load", ROGUE))
        assert pipe.receive(end) is False
        pipe.send(end, ("load", f"{ROGUE}_batch"))
        assert pipe.receive(end) is True
        limits = resource.prlimit(process.pid, resource.RLIMIT_DATA)
        assert limits == (MEMORY_LIMIT, MEMORY_LIMIT)
        end.close()
        assert process.wait(timeout=30) == 0


def test_without_a_parent_it_ends_in_mid_thought():
    """Nobody is left who could kill it at the limit: its own alarm does, a second later."""
    process, end = start()
    with process, end:
        pipe.send(end, ("judge", [(ROGUE, "verify", [(("sleep 60", "", {}, 0.0), {})])], 0.1))
        end.close()
        assert process.wait(timeout=30) < 0
