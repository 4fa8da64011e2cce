"""Runs whose verifier servers are killed, hang, answer late, wrongly or not at all. What such a run
records is, digit for digit, what the undisturbed one does: no completion is lost."""

import functools
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from tests.e2e.runs import arguments, records, timeless
from vtriune_jax import assemble, collect
from vtriune_jax.main import main
from vtriune_jax.types import RewardConfig
from vtriune_jax.verifiers.client import VerifierClient
from vtriune_jax.verifiers.embedded import VerifierServer
from vtriune_jax.verifiers.item import Item

STEPS = 5


@pytest.fixture(scope="module")
def run(data, warm, tmp_path_factory):
    """A function that trains a little and returns the records."""

    def go(name, **values):
        workdir = tmp_path_factory.mktemp(name) / "run"
        keys = {"stages": "grpo", "grpo_steps": STEPS, "eval_rows_per_source": 0}
        keys |= {"model_path": warm / "final", "checkpoint_every": 100} | values | data
        assert main(arguments(workdir, **keys)) == 0
        return [timeless(record) for record in records(workdir)]

    return go


@pytest.fixture(scope="module")
def undisturbed(run):
    lines = run("undisturbed")
    assert len(lines) == STEPS
    failed = [line[name] for line in lines for name in line if name.startswith("verifier_")]
    assert failed
    assert not any(failed)
    assert any(line["reward"] > 0 for line in lines)
    return lines


@pytest.fixture
def impatient(monkeypatch):
    """Makes a run notice in three seconds what else takes it ten."""
    soon = functools.partial(VerifierClient, patience=3.0, hedge=0.5, timeout=4.0)
    monkeypatch.setattr(assemble, "VerifierClient", soon)
    monkeypatch.setattr(assemble, "VerifierServer", functools.partial(VerifierServer, patience=3.0))


def child_of(process, module):
    """The newest living child process that runs a module of the verifiers."""
    children = [c for c in process.children() if c.status() != psutil.STATUS_ZOMBIE]
    found = [c for c in children if f"vtriune_jax.verifiers.{module}" in c.cmdline()]
    return max(found, key=lambda child: child.create_time())


def stop(process, then_kill=False):
    """A process that answers no more and, if so wanted, is killed with everything on its way."""
    process.send_signal(signal.SIGSTOP)
    if then_kill:
        threading.Timer(0.4, process.send_signal, [signal.SIGKILL]).start()


def test_processes_that_are_killed_or_hang(run, undisturbed, impatient, monkeypatch):
    me, answered_by = psutil.Process(), []

    def server():
        return child_of(me, "server")

    faults = [
        lambda: None,  # the workers start with the first question
        lambda: stop(child_of(server(), "worker"), then_kill=True),
        lambda: stop(server(), then_kill=True),
        lambda: server().kill(),
        lambda: stop(server()),
    ]

    def verify(stage, step, *args):
        faults[step]()
        verdicts = judge(stage, step, *args)
        answered_by.append(server().pid)
        return verdicts

    judge = collect.verify
    monkeypatch.setattr(collect, "verify", verify)
    assert run("killed", verifiers_mode="server") == undisturbed
    one, two, three, four, five = answered_by
    assert one == two
    assert len({two, three, four, five}) == 4


@contextmanager
def proxy(upstream, faults):
    """Passes requests on, but for the next of `faults`; yields its address."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._pass(None)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = faults.pop(0) if faults else ""
            if fault == "slow":
                time.sleep(1.5)
            if fault == "half-open":
                over.wait(60)
            elif fault == "hang up":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "wrong JSON":
                self._say(200, b'{"verdicts": [{"status": "ok", "score": "high"}]}', {})
            elif fault == "no JSON":
                self._say(200, b"<html>It works!</html>", {})
            elif fault == "error":
                self._say(500, b"Internal Server Error", {})
            elif fault == "busy":
                self._say(429, b"later", {"Retry-After": "1"})
            else:
                self._pass(body, cut=fault == "cut off")

        def _pass(self, body, cut=False):
            request = urllib.request.Request(upstream + self.path, body)
            try:
                with urllib.request.urlopen(request) as answer:
                    status, text = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, text = error.code, error.read()
            self._say(status, text, {}, len(text) // 2 if cut else None)

        def _say(self, status, text, headers, most=None):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text[:most])
            if most is not None:
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # the client hung up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_servers_that_answer_late_wrongly_or_not_at_all(run, undisturbed, impatient):
    faults = ["wrong JSON", "slow", "half-open", "cut off", "error", "no JSON", "busy"]
    faults += ["hang up", "half-open", "half-open", "slow"]
    with ExitStack() as stack:
        servers = [stack.enter_context(VerifierServer(workers=1)) for _ in range(2)]
        proxies = [stack.enter_context(proxy(s.addresses()[0], faults)) for s in servers]
        lines = run("wrong", verifiers_mode="server", verifiers_addresses=tuple(proxies))
    assert lines == undisturbed
    assert faults == []


def test_what_no_server_judges_is_masked_and_counted(run, undisturbed, monkeypatch):
    """The first step is as ever; from then on nobody answers, and nothing is learnt any more."""
    faults = []

    def verify(stage, step, *args):
        if step == 1:
            faults.extend(["no JSON"] * 10_000)
        return judge(stage, step, *args)

    judge = collect.verify
    monkeypatch.setattr(collect, "verify", verify)
    with VerifierServer(workers=1) as server, proxy(server.addresses()[0], faults) as address:
        with VerifierClient([address]) as client:  # the worker starts before the deadline runs
            client.score([Item(r"\boxed{7}", RewardConfig("mathverify", "7"))])
        lines = run(
            "nobody",
            verifiers_mode="server",
            verifiers_addresses=(address,),
            verifiers_deadline_seconds=10.0,
            grpo_steps=2,
        )
    assert lines[0] == undisturbed[0]
    sources = [name for name in lines[1] if name.startswith("verifier_error/")]
    assert len(sources) > 1
    assert sum(lines[1][name] for name in sources) == 8 * 4
    assert all(lines[1][name.replace("error", "failed")] == 1 for name in sources)
    assert not [name for name in lines[1] if name.startswith("reward")]
    assert "loss" not in lines[1]  # no token to train on
