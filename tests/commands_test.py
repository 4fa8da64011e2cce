import ctypes
from types import SimpleNamespace

import jax

from vtriune_jax import commands


def test_memory_is_returned_after_every_program(monkeypatch):
    trimmed = []
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trimmed.append))
        commands.return_memory.__wrapped__()
    program = jax.jit(lambda x: 3.5 * x - 2)
    program(1.0)
    assert trimmed == [0]
    program(2.0)
    assert trimmed == [0]
    program(1)
    assert trimmed == [0, 0]


def test_an_allocator_that_cannot(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
        commands.return_memory.__wrapped__()
    assert jax.jit(lambda x: 4.5 * x)(2.0) == 9
