"""Which groups a step trains on, with fakes for everything that draws and judges."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from vtriune_jax import collect as module
from vtriune_jax.collect import collect, differ, spread
from vtriune_jax.data.stream import Chunk, PromptStream
from vtriune_jax.stages import plan
from vtriune_jax.types import Verdict

PROMPTS = 4
GRPO = replace(plan(base.get_config(), ())[1], prompts=PROMPTS)
GOOD, FLAT = (Verdict("ok", 0.0), Verdict("ok", 1.0)), (Verdict("ok", 1.0),) * 2
FAILED = (Verdict("ok", 1.0), Verdict("error"))


@pytest.fixture
def run(monkeypatch):
    """A step over prompts whose groups are judged as a string says: + learnable, - flat."""

    def go(outcomes, refill, **changes):
        def group(number):
            sample = SimpleNamespace(data_source="a", number=number)
            completions = (SimpleNamespace(ids=np.zeros(3)),) * 2
            return SimpleNamespace(prompt=SimpleNamespace(sample=sample), completions=completions)

        chunks = (
            Chunk(k, list(range(PROMPTS * k, PROMPTS * k + PROMPTS)), [], {"k": k}, {"k": k + 1})
            for k in range(9)
        )
        seen = []

        def respond(params, prompts, features, drawn):
            seen.append((prompts, drawn))
            return [group(number) for number in prompts]

        def verify(stage, step, groups, parts):
            numbers = [each.prompt.sample.number for each in groups]
            return [list({"+": GOOD, "-": FLAT, "x": FAILED}[outcomes[n]]) for n in numbers]

        monkeypatch.setattr(module, "verify", verify)

        def encode(params, prompts):
            return jnp.array(prompts, float)[:, None, None]

        stream = PromptStream(chunks, PROMPTS)
        stage = replace(GRPO, refill=refill, **changes)
        clock = lambda part: contextlib.nullcontext()  # noqa: E731
        first = stream.take()
        got = collect(stage, 0, None, first, stream, respond, encode, None, clock)
        numbers = [each.prompt.sample.number for each in got.groups]
        assert numbers == [int(x) for x in got.features.ravel()]
        return got, numbers, stream.position()["taken"], seen

    return go


def test_without_refill_every_group_is_kept(run):
    got, numbers, taken, seen = run("+-x-", refill=0)
    assert (numbers, taken, len(seen)) == ([0, 1, 2, 3], 4, 1)
    assert got.used.all()
    assert got.refill is None


def test_flat_groups_are_replaced_and_what_follows_the_last_one_goes_back(run):
    got, numbers, taken, seen = run("+-x+" + "-+++", refill=3)
    assert numbers == [0, 3, 5, 6]
    assert got.used.all()
    assert taken == 7
    assert [drawn for _, drawn in seen] == [0, 4]
    assert got.refill.rounds == 1
    assert (len(got.refill.dropped), got.refill.missing) == (3, 0)
    assert len(got.all_groups) == len(got.all_verdicts) == 8


def test_when_the_rounds_are_used_up_flat_groups_fill_the_batch_without_weight(run):
    got, numbers, taken, _ = run("+---" + "--+-", refill=1, minibatches=2)
    assert sorted(numbers) == [0, 1, 2, 6]
    assert {n for n, used in zip(numbers, got.used, strict=True) if used} == {0, 6}
    assert got.used.tolist() == [True, False, True, False]  # one in each minibatch
    assert taken == 8
    assert (got.refill.rounds, got.refill.missing) == (1, 2)


def test_nothing_to_learn_from_at_all(run):
    got, numbers, taken, _ = run("-" * 12, refill=2)
    assert (numbers, taken) == ([0, 1, 2, 3], 12)
    assert not got.used.any()


def test_what_differs():
    assert differ(GOOD)
    assert not differ(FLAT)
    assert not differ(FAILED)


def test_groups_are_dealt_out():
    assert spread([0, 1, 2, 3, 4, 5], 3) == [0, 3, 1, 4, 2, 5]
