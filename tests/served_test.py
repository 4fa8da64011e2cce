"""A fleet as the engine of several processes: what it tells, and what it cannot do."""

import jax
import pytest

from configs import base
from vtriune_jax import sharding
from vtriune_jax.assemble import assemble
from vtriune_jax.errors import UserError
from vtriune_jax.served import of_all


def stats(tokens, lag, ready, quarantines, **more):
    return {
        "completions": 8.0,
        "tokens_per_s": tokens,
        "version_lag": lag,
        "servers": 2.0,
        "servers_ready": ready,
        "quarantines": quarantines,
        **more,
    }


def test_what_the_processes_do_adds_up_and_servers_are_counted_once():
    first = stats(30.0, 1.0, 2.0, 0.0, **{"server/a:1/in_flight": 3.0, "server/b:1/in_flight": 1.0})
    other = stats(10.0, 0.0, 1.0, 1.0, **{"server/a:1/in_flight": 4.0, "server/c:1/in_flight": 9.0})
    assert of_all([first, other]) == {
        "completions": 16.0,
        "tokens_per_s": 40.0,
        "version_lag": 0.75,
        "servers": 2.0,
        "servers_ready": 1.0,
        "quarantines": 1.0,
        "server/a:1/in_flight": 7.0,
        "server/b:1/in_flight": 1.0,
    }
    assert of_all([first]) == first
    assert of_all([stats(0.0, 0.0, 2.0, 0.0)])["version_lag"] == 0.0


def test_refills_of_steps_begun_ahead_are_refused(monkeypatch, tmp_path):
    config = base.get_config()
    config.grpo.refill = 2
    config.rollout.engine, config.rollout.addresses = "sglang", ("http://a:1",)
    config.rollout.ahead = 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding, "check_hosts", lambda mesh: None)
    with (
        pytest.raises(UserError, match=r"rollout\.ahead=1 with grpo\.refill=2 is not possible"),
        assemble(config, tmp_path),
    ):
        pass
