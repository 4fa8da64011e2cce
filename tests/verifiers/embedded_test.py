import os
import signal

import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.embedded import VerifierServer


def test_a_server_that_was_killed_is_started_again(server, client, math_item, boxes_item):
    items = [math_item("42"), boxes_item()] * 20
    before = server.addresses()
    futures = [client.submit(items)]
    server._process.kill()
    futures += [client.submit(items) for _ in range(3)]
    for future in futures:
        verdicts = future.result()
        assert {v.status for v in verdicts} == {"ok"}
        assert [v.score for v in verdicts] == pytest.approx([1.0] * 40)
    assert server.addresses() != before


def test_a_server_that_hangs_is_killed_and_started_again(math_item):
    with (
        VerifierServer(workers=1, patience=0.5) as server,
        VerifierClient(server.addresses, patience=0.5, backoff=0.01) as client,
    ):
        assert client.score([math_item("42")])[0].score == 1
        hanging = server._process
        os.kill(hanging.pid, signal.SIGSTOP)
        verdicts = client.score([math_item("42"), math_item("41")])
        assert [v.score for v in verdicts] == [1, 0]
        assert hanging.poll() == -signal.SIGKILL


def test_a_server_that_does_not_start_says_why_in_one_line(server, tmp_path):
    port = int(server.addresses()[0].rpartition(":")[2])
    with pytest.raises(UserError, match="did not start: cannot listen on") as error:
        VerifierServer(port=port, log=tmp_path / "log")
    assert "\n" not in str(error.value)
    assert "verifiers.mode='in_process'" in str(error.value)


def test_a_server_that_is_too_slow_to_start():
    with pytest.raises(UserError, match=r"not ready after 0 s: it printed nothing"):
        VerifierServer(start_timeout=0.0)


def test_closing_twice_and_using_a_closed_server():
    server = VerifierServer(workers=1)
    server.close()
    server.close()
    with pytest.raises(UserError, match="was closed"):
        server.addresses()
