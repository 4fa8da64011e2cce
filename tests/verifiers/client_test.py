import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.client import InProcess, VerifierClient, VerifierServer
from vtriune_jax.verifiers.item import encode_verdicts


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


def test_without_a_server_every_verdict_is_an_error_with_a_reason(math_item):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with VerifierClient([address], attempts=2, backoff=0.01) as client:
        verdicts = client.score([math_item("42")] * 3)
    assert [v.status for v in verdicts] == ["error"] * 3
    assert "no verdict after 2 attempts" in verdicts[0].reason
    assert address in verdicts[0].reason


def test_a_server_that_cannot_be_started_again_is_an_error_too(math_item):
    def addresses():
        raise UserError("the verifier server did not start: no space left on device")

    with VerifierClient(addresses, attempts=2, backoff=0.01) as client:
        (verdict,) = client.score([math_item("42")])
    assert verdict.status == "error"
    assert "no space left on device" in verdict.reason


@dataclass
class Script:
    """A server that answers as told, and hangs when nothing is left."""

    address: str
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    asked: int = 0


@pytest.fixture
def scripted():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            script.asked += 1
            if not script.answers:
                time.sleep(1.5)
                return
            status, body = script.answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    script = Script(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield script
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = encode_verdicts([Verdict("ok", 1.0)])


@pytest.mark.parametrize(
    "trouble",
    [
        (500, b"oops"),
        (429, b"later"),
        (200, b"<html>"),
        (200, b'{"verdicts": [{"verdict": 1}]}'),
        (200, b'{"verdicts": []}'),
        (200, b"\xff"),
    ],
)
def test_trouble_is_retried(scripted, math_item, trouble):
    scripted.answers += [trouble, trouble, (200, GOOD)]
    with VerifierClient([scripted.address], backoff=0.01) as client:
        assert client.score([math_item("42")]) == [Verdict("ok", 1.0)]
    assert scripted.asked == 3


def test_a_refusal_is_not_repeated(scripted, math_item):
    scripted.answers += [(413, b"too large")]
    with VerifierClient([scripted.address]) as client:
        (verdict,) = client.score([math_item("42")])
    assert verdict.status == "error"
    assert "HTTP 413 too large" in verdict.reason
    assert scripted.asked == 1


def test_a_hanging_server_is_left_for_another(scripted, server, math_item):
    """The turn starts at the first address: the second attempt goes to the other one."""
    with VerifierClient(
        [scripted.address, *server.addresses()], timeout=1.0, backoff=0.01
    ) as client:
        assert client.score([math_item("42")])[0].score == 1


def test_a_batch_is_cut_by_number_and_by_size(scripted, math_item):
    scripted.answers += [(200, encode_verdicts([Verdict("ok", 1.0)] * n)) for n in (2, 2, 1)]
    with VerifierClient([scripted.address], batch=2, attempts=1) as client:
        verdicts = client.score([math_item("42")] * 5)
    assert scripted.asked == 3
    assert sum(v.status == "ok" for v in verdicts) >= 3  # which answer meets which request varies
    scripted.answers += [(200, GOOD)] * 2
    with VerifierClient([scripted.address], attempts=1) as client:
        assert len(client.score([math_item("1" * 3 * 2**20)] * 2)) == 2
    assert scripted.asked == 5


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
    client = VerifierClient([])
    client.close()
    client.close()
