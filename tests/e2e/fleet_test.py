"""Runs whose completions come from servers: fake ones, with the weights that they are given."""

import json
import threading
import time

import numpy as np
import pytest

from tests.documented import undocumented
from tests.e2e.runs import arguments, records
from tests.rollout.fake_sglang import FakeServer
from vtriune_jax.main import main

KEYS = {
    "stages": "grpo",
    "grpo_steps": 4,
    "grpo_tis_cap": 2.0,
    "eval_rows_per_source": 1,
    "rollout_engine": "sglang",
    "rollout_weights_dtype": "float32",
    "rollout_probe_gap": 1e-3,
}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {"model_path": warm / "final", **KEYS, **data}


@pytest.fixture
def start(warm):
    """A server of the checkpoint that the run starts from."""
    running = []

    def make(**flags):
        model = warm / "final"
        server = FakeServer(model_path=model, responder="checkpoint", **flags)
        server.start()
        running.append(server)
        return server

    yield make
    for server in running:
        server.kill()


def asked(servers):
    return {"rollout_addresses": tuple(server.address for server in servers)}


def test_on_policy_the_servers_log_probs_are_the_trainers(start, keys, tmp_path):
    servers = [start(), start()]
    workdir = tmp_path / "run"
    assert main(arguments(workdir, **keys, **asked(servers))) == 0
    for step, record in enumerate(records(workdir)):
        assert undocumented(record) == []
        assert record["rollout_gap"] < 1e-4
        assert record["sync/logp_gap_max"] < 1e-3
        assert record["sync/servers_updated"] == 2
        assert record["rollout/version_lag"] == 0
        assert 0 < record["reward"] < 1
        assert record["rollout/completions"] >= 32 * (step + 1)
    versions = {server.call("/model_info")["weight_version"] for server in servers}
    assert versions == {"4"}
    kept = sorted(path.name for path in (workdir / "weights").iterdir())
    assert kept == ["version-00000003", "version-00000004"]


def test_a_step_ahead_with_stragglers_and_a_server_that_dies(start, keys, tmp_path):
    """A server dies while it samples and comes back with its first weights; nothing is lost."""
    servers = [start(token_seconds=0.002), start(token_seconds=0.004, process=True)]
    workdir = tmp_path / "run"
    more = {"rollout_ahead": 1, "rollout_over_sampling": 0.25, "rollout_carry": 2}

    def disturb():
        timeline = workdir / "timeline.json"
        while not (timeline.exists() and "grpo 1" in timeline.read_text()):
            time.sleep(0.05)
        servers[1].kill()
        time.sleep(1.0)
        servers[1].start()

    trouble = threading.Thread(target=disturb)
    trouble.start()
    code = main(arguments(workdir, **{**keys, **more, "grpo_steps": 6}, **asked(servers)))
    trouble.join()
    assert code == 0
    lines = records(workdir)
    assert [line["step"] for line in lines] == list(range(6))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["rollout/quarantines"] >= 1
    spans = json.loads((workdir / "timeline.json").read_text().rstrip().rstrip(",") + "]")
    assert {"rollout", "verify", "wait", "update", "sync"} <= {span["name"] for span in spans}


def test_no_server_is_left(start, keys, tmp_path, capsys):
    server = start()
    server.script(faults=[{"kind": "status", "status": 500, "path": "/generate", "times": -1}])
    more = {"rollout_deadline_seconds": 5.0, "rollout_probe_prompts": 0}
    assert main(arguments(tmp_path / "run", **keys, **more, **asked([server]))) == 2
    said = capsys.readouterr().err
    assert server.address in said
    assert "HTTP 500" in said
