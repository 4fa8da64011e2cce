"""An engine over fake servers, prompts for it, and what must be true of every completion."""

import contextlib
import time

import numpy as np

from tests.data.conftest import png
from tests.rollout.made_up import BANNED, PAD, STOP, make_prompt
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.sglang import SGLangEngine

SAMPLING = Sampling(max_tokens=12, n=3, temperature=0.8)
PICTURES = [png(84, 56, seed=1), png(56, 28, seed=2)]
PROMPTS = [
    *(make_prompt(k) for k in range(5)),
    make_prompt(5, [(PICTURES[0], 2, 3)]),
    make_prompt(6, [(PICTURES[0], 2, 3), (PICTURES[1], 1, 2)]),
]


def pictures_of(prompt):
    return prompt.sample.images


@contextlib.contextmanager
def engine(*servers, deadline=20.0, addresses=None, pictures=pictures_of, **settings):
    quick = {"patience": 0.3, "health_timeout": 1.5, "backoff": 0.05, "reread": 0.1}
    addresses = addresses or [server.address for server in servers]
    with Fleet(addresses, **(quick | settings)) as fleet:
        made = SGLangEngine(
            fleet,
            stop_ids=[STOP],
            banned_ids=BANNED,
            image_id=PAD,
            decode_text=lambda ids: " ".join(map(str, ids)),
            pictures=pictures,
            deadline=deadline,
            backoff=0.02,
        )
        wait_for(lambda: all(each.state != "new" for each in fleet.servers()))
        yield made, fleet


def check(groups, prompts, oracle, sampling=SAMPLING):
    """Every prompt once and in order, n whole completions each, log-probs that are their ids'."""
    assert [group.prompt.sample.id for group in groups] == [p.sample.id for p in prompts]
    for group in groups:
        assert len(group.completions) == sampling.n
        for drawn in group.completions:
            ids, stopped = drawn.ids, drawn.finish == "stop"
            assert ids.dtype == np.int32
            assert drawn.logps.dtype == np.float32
            assert (ids == STOP).sum() == stopped == (ids[-1] == STOP)
            assert stopped or (drawn.finish, len(ids)) == ("length", sampling.max_tokens)
            assert not np.isin(ids, BANNED).any()
            assert drawn.text == " ".join(map(str, ids[:-1] if stopped else ids))
            assert [drawn.versions[0][1], drawn.versions[-1][2]] == [0, len(ids)]
            expected = oracle(group.prompt, ids, sampling.temperature or 1.0)
            np.testing.assert_allclose(drawn.logps, expected, atol=1e-5)


def wait_for(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
