"""What must stay true of the compiled update, whatever changes in it."""

import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.rl import tiny_update
from tests.rl.tiny_update import CONFIG, FREEZE, GRPO, SOURCES, TX, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.rl import update as updates
from vtriune_jax.rl.update import abstract_state, jit_update

pytestmark = pytest.mark.usefixtures("optimised")

VOCAB, CHUNK = 1009, 2  # tokens of each row whose logits may exist at once


@pytest.fixture(scope="module")
def compiled():
    """The update of a model with an uncommon number of words, and its state's shapes."""
    config = replace(CONFIG, text=replace(CONFIG.text, vocab=VOCAB), remat="full")
    batch = make_batch()
    graphdef, params = models.abstract(config)
    state = abstract_state(params, TX, FREEZE)
    update = jit_update(
        graphdef,
        TX,
        replace(GRPO, max_logits=len(batch.ids) * CHUNK * VOCAB),
        sharding.make_mesh(),
        state,
        num_sources=SOURCES,
        freeze=FREEZE,
    )
    return update.lower(state, batch).compile(), state, batch


def test_logits_exist_in_chunks_only(compiled):
    text, batch = compiled[0].as_text(), compiled[2]
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", text)}
    logits = {s for s in shapes if VOCAB in s and CONFIG.text.embed not in s}
    assert max(map(math.prod, logits)) == len(batch.ids) * CHUNK * VOCAB


def test_the_state_is_updated_in_place(compiled):
    program, state, _ = compiled
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.output_size_in_bytes - size < 2000  # the sums


def test_the_host_is_not_called(compiled):
    text = compiled[0].as_text()
    assert not re.search(r"callback|infeed|outfeed|is_host_transfer", text)


def test_it_is_traced_once_whatever_the_data(monkeypatch):
    traces = []

    def counted(*args):
        traces.append(None)
        return policy_logps(*args)

    policy_logps = updates.policy_logps
    monkeypatch.setattr(updates, "policy_logps", counted)
    update, state, *_ = tiny_update.build()
    for seed in range(3):
        state, _ = update(state, make_batch(seed=seed))
    assert len(traces) == 1


def test_nothing_goes_to_the_device_unasked():
    update, state, *_ = tiny_update.build()
    for seed in range(2):
        state, _ = update(state, make_batch(seed=seed))
    host = replace(state, step=np.zeros((), np.int32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="transfer"):
        update(host, make_batch())
