import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.types import RewardConfig, Verdict
from vtriune_jax.verifiers import client as client_module
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.in_process import InProcess
from vtriune_jax.verifiers.item import TOKEN, Item, decode_items, encode_verdicts
from vtriune_jax.verifiers.request import check_health


def test_both_doors_give_the_same_verdicts_in_order(client, boxes_item, math_item):
    kinds = [
        boxes_item(),
        math_item("42"),
        boxes_item("none"),
        math_item("41"),
        math_item("1", "no"),
    ]
    items = kinds * 30
    served = client.submit(items).result()
    with InProcess(workers=1) as here:
        local = here.score(kinds)
    assert served == local * 30
    assert [v.status for v in local] == ["ok"] * 4 + ["error"]
    assert client.score([]) == []


def test_several_batches_at_once_from_several_threads(client, math_item):
    with ThreadPoolExecutor(4) as threads:
        futures = [
            threads.submit(client.score, [math_item(str(k)), math_item("42")]) for k in range(20)
        ]
        assert all(f.result()[1].score == 1 and f.result()[0].score == 0 for f in futures)


class Scripted:
    """A server that finds everything right, at the pace and with the trouble it is told."""

    def __init__(self):
        self.trouble = []
        """What the next requests get instead: (status, body) or (status, body, headers)."""
        self.delay = 0.0
        """Seconds before each answer."""
        self.asked = []
        """The items of each request."""
        self.at = []
        """When each came."""
        self.seen = []
        """Their headers."""
        self.address = ""
        self.healthy = True
        self.ready = 200
        """The status with which it says whether it is."""


@contextmanager
def scripted_server():
    script, over = Scripted(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if not script.healthy:
                over.wait(20)
            self._say(script.ready, b"{}", {})

        def do_POST(self):
            items = decode_items(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append(items)
            script.at.append(time.monotonic())
            script.seen.append(dict(self.headers))
            if script.trouble:
                status, body, *headers = script.trouble.pop(0)
                self._say(status, body, *headers or [{}])
            else:
                over.wait(script.delay)
                self._say(200, encode_verdicts([Verdict("ok", 1.0)] * len(items)), {})

        def _say(self, status, body, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):  # the client hung up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    script.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield script
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def scripted():
    with scripted_server() as script:
        yield script


@pytest.fixture
def second():
    with scripted_server() as script:
        yield script


@pytest.fixture
def nobody():
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    return f"http://127.0.0.1:{port}"


GOOD = Verdict("ok", 1.0)


def test_without_a_server_every_verdict_is_an_error_with_a_reason(nobody, math_item):
    with VerifierClient([nobody], deadline=0.3, backoff=0.01) as client:
        verdicts = client.score([math_item("42")] * 3)
    assert [v.status for v in verdicts] == ["error"] * 3
    assert "no verdict after 0.3 s and" in verdicts[0].reason
    assert nobody.removeprefix("http://") in verdicts[0].reason


def test_a_server_that_does_not_answer_in_time_is_a_timeout(scripted, math_item):
    scripted.delay = 10.0
    with VerifierClient([scripted.address], deadline=0.3) as client:
        (verdict,) = client.score([math_item("42")])
    assert verdict == Verdict("timeout", reason="no verdict after 0.3 s and 1 attempts")


@pytest.mark.parametrize(
    ("addresses", "reason"),
    [(UserError("did not start: no space left on device"), "no space left"), ((), "is empty")],
)
def test_no_address_at_all_is_an_error_too(math_item, addresses, reason):
    def find():
        if isinstance(addresses, UserError):
            raise addresses
        return addresses

    with VerifierClient(find, deadline=0.2, backoff=0.01) as client:
        (verdict,) = client.score([math_item("42")])
    assert verdict.status == "error"
    assert reason in verdict.reason


def verdicts_of(**fields):
    return json.dumps({"verdicts": [{"status": "ok", "score": 1.0, **fields}]}).encode()


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b"oops"),
        (429, b"later"),
        (200, b"<html>"),
        (200, b'{"verdicts": [{"verdict": 1}]}'),
        (200, b'{"verdicts": []}'),
        (200, b"[" * 100_000),
        (200, b"\xff"),
        (200, verdicts_of(status="fine")),
        (200, verdicts_of(score="1.0")),
        (200, verdicts_of(score=float("nan"))),
        (200, verdicts_of(parts={"accuracy": None})),
        (200, verdicts_of(parts=3)),
        (200, verdicts_of(reason=None)),
    ],
)
def test_trouble_is_retried(scripted, math_item, trouble):
    scripted.trouble += [trouble, trouble]
    with VerifierClient([scripted.address], backoff=0.01) as client:
        assert client.score([math_item("42")]) == [GOOD]
    assert len(scripted.asked) == 3


def test_a_server_that_asks_for_time_gets_it(scripted, math_item):
    scripted.trouble.append((503, b"ending", {"Retry-After": "1"}))
    with VerifierClient([scripted.address], backoff=0.001) as client:
        assert client.score([math_item("42")]) == [GOOD]
    assert scripted.at[1] - scripted.at[0] >= 1.0


def test_who_asks_for_time_is_not_waited_for_when_another_can(scripted, second, math_item):
    scripted.trouble.append((429, b"later", {"Retry-After": "30"}))
    second.trouble.append((500, b"oops"))
    with VerifierClient([scripted.address, second.address], backoff=0.001, deadline=10) as client:
        assert client.score([math_item("42")]) == [GOOD]
        assert [client.score([math_item("42")]) for _ in range(5)] == [[GOOD]] * 5
    assert not scripted.trouble or not second.trouble
    if not scripted.trouble:  # it was asked: only once
        assert len(scripted.asked) == 1


def test_a_refusal_is_not_repeated(scripted, math_item):
    scripted.trouble.append((401, b"no token"))
    with VerifierClient([scripted.address]) as client:
        verdicts = client.score([math_item("42")] * 2)
    assert [v.status for v in verdicts] == ["error"] * 2
    assert "HTTP 401 no token" in verdicts[0].reason
    assert len(scripted.asked) == 1


def test_of_a_batch_that_is_refused_only_the_guilty_is_lost(scripted, client, math_item):
    scripted.trouble += [(413, b"too large")] * 2 + [(422, b"malformed")]
    with VerifierClient([scripted.address]) as one_by_one:
        verdicts = one_by_one.score([math_item("42")] * 3)
    assert sorted(v.status for v in verdicts) == ["error", "ok", "ok"]
    no_json = Item("", RewardConfig("exact", "", params={"choices": {1, 2}}))
    verdicts = client.score([math_item("42"), no_json, math_item("41"), math_item("42")])
    assert [v.status for v in verdicts] == ["ok", "error", "ok", "ok"]
    assert [v.score for v in verdicts] == [1, 0, 0, 1]
    assert "not JSON serializable" in verdicts[1].reason


def test_the_token_of_the_environment_is_sent(scripted, math_item, monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
    with VerifierClient([scripted.address]) as client:
        client.score([math_item("42")])
    assert scripted.seen[0]["Authorization"] == "Bearer secret"


def test_a_batch_is_cut_by_number_and_by_size(scripted, math_item):
    with VerifierClient([scripted.address], batch=2) as client:
        assert client.score([math_item("42")] * 5) == [GOOD] * 5
        assert sorted(len(items) for items in scripted.asked) == [1, 2, 2]
        assert client.score([math_item("1" * 3 * 2**20)] * 2) == [GOOD] * 2
        assert [len(items) for items in scripted.asked[3:]] == [1, 1]


def test_what_comes_at_about_the_same_time_shares_a_request(scripted, math_item):
    with VerifierClient([scripted.address], linger=0.2, batch=6) as client:
        futures = [client.submit([math_item(str(k))] * 2) for k in range(4)]
        assert [future.result() for future in futures] == [[GOOD] * 2] * 4
    asked = sorted([item.completion[-2] for item in items] for items in scripted.asked)
    assert asked == [["0", "0", "1", "1", "2", "2"], ["3", "3"]]


def test_the_work_is_shared_by_all_servers(scripted, second, math_item):
    scripted.delay = second.delay = 0.3
    with VerifierClient([scripted.address, second.address], batch=1, hedge=5) as client:
        assert client.score([math_item("42")] * 16) == [GOOD] * 16
    assert len(scripted.asked) == len(second.asked) == 8


def test_a_straggler_is_asked_again_elsewhere_and_then_left_alone(scripted, second, math_item):
    scripted.delay = 10.0
    with VerifierClient([scripted.address, second.address], hedge=0.05) as client:
        for k in range(40):
            assert client.score([math_item(str(k))]) == [GOOD]
    assert 1 <= len(scripted.asked) <= 8  # half would have gone there
    assert len(second.asked) == 40


def test_a_server_that_hangs_is_noticed_by_its_health(scripted, math_item):
    """It took the request and will never answer; nor does it tell its health. Then it recovers."""
    scripted.delay, scripted.healthy = 20.0, False

    def addresses():
        if len(scripted.asked) == 1:
            scripted.delay, scripted.healthy = 0.0, True
        return [scripted.address]

    with VerifierClient(addresses, patience=0.2, backoff=0.01) as client:
        assert client.score([math_item("42")]) == [GOOD]
    assert len(scripted.asked) == 2


def test_one_that_is_merely_slow_is_waited_for(scripted, math_item):
    scripted.delay = 0.5
    with VerifierClient([scripted.address], patience=0.1) as client:
        assert client.score([math_item("42")]) == [GOOD]
    assert len(scripted.asked) == 1


def test_a_half_open_connection_costs_one_timeout(server, math_item):
    """Somebody who accepts and never says a word, then a server at the same time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"http://127.0.0.1:{silent.getsockname()[1]}", *server.addresses()]
        with VerifierClient(addresses, timeout=0.5, hedge=60.0, backoff=0.01) as client:
            for _ in range(4):
                assert client.score([math_item("42")])[0].score == 1


def test_health_is_checked_before_a_run(scripted, server, nobody):
    check_health([scripted.address, *server.addresses()])
    scripted.ready = 429
    check_health([scripted.address])
    scripted.ready = 401
    with pytest.raises(UserError, match=f"{scripted.address} wants a token; set {TOKEN} to"):
        check_health([scripted.address])
    scripted.ready = 200
    with pytest.raises(UserError, match=f"no verifier server answers at {nobody}"):
        check_health([scripted.address, nobody])


def test_a_mistake_in_the_client_is_raised_and_not_waited_for(scripted, math_item, monkeypatch):
    monkeypatch.setattr(client_module, "encode_items", lambda items: {}["no such key"])
    with VerifierClient([scripted.address]) as client, pytest.raises(KeyError):
        client.submit([math_item("42")] * 2).result(timeout=10)


def test_closing_twice_with_something_on_its_way(scripted, math_item):
    scripted.delay = 10.0
    client = VerifierClient([scripted.address])
    future = client.submit([math_item("42")])
    while not scripted.asked:
        time.sleep(0.01)
    client.close()
    client.close()
    assert future.cancelled()
