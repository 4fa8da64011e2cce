import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing

import psutil
import pytest
from fastapi.testclient import TestClient

from vtriune_jax.types import RewardConfig, Verdict
from vtriune_jax.verifiers.item import decode_items, decode_verdicts, encode_items, encode_verdicts
from vtriune_jax.verifiers.router import Item, Router
from vtriune_jax.verifiers.server import create_app


@pytest.fixture
def web():
    with TestClient(create_app(Router(workers=1), request_limit=100_000)) as web:
        yield web


def test_items_and_verdicts_travel_unchanged():
    params = {"det_reward_ratio": {"map": 1.0}, "det_verifier_normalized": True, "x": None}
    reward = RewardConfig("detection", "中\ud800\0", "a", 1.0, 0.1, params)
    items = [Item("\udfff\x00 '\"", reward, 0.3, ((28, 56), (1, 2)), 0.5), Item("", reward)]
    assert decode_items(encode_items(items)) == items
    verdicts = [Verdict("ok", 0.1, {"accuracy": 0.1}), Verdict("timeout", reason="slow")]
    assert decode_verdicts(encode_verdicts(verdicts)) == verdicts


def test_health(web):
    assert web.get("/health").json() == {"status": "ok", "verifiers": ["detection", "mathverify"]}


def test_a_request_as_another_program_would_send_it(web):
    item = {"completion": "x", "reward": {"verifier": "detection", "ground_truth": "none"}}
    answer = web.post("/verify", json={"items": [item, {**item, "grid": [[28, 28]]}]})
    assert answer.status_code == 200
    assert [v["status"] for v in answer.json()["verdicts"]] == ["error", "error"]
    assert web.post("/verify", json={"items": []}).json() == {"verdicts": []}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"items": 3}',
        b'{"items": [3]}',
        b'{"items": [{"completion": "x"}]}',
        b'{"items": [{"completion": 7, "reward": {"verifier": "x", "ground_truth": ""}}]}',
        b'{"items": [{"completion": "", "reward": {"verifier": "x", "truth": ""}}]}',
        b'{"items": [{"completion":"", "grid": 1,"reward": {"verifier": "", "ground_truth": ""}}]}',
        b'{"items": [{"completion": "", "reward": ["x", "y"]}]}',
        b'{"items": ' + b"[" * 50_000,
    ],
)
def test_malformed_requests(web, body):
    answer = web.post("/verify", content=body)
    assert answer.status_code == 400
    assert "not a list of items" in answer.json()["detail"]


def test_a_request_too_large(web):
    assert web.post("/verify", content=b" " * 100_001).status_code == 413
    assert web.post("/verify", content=(b" " * 10_000 for _ in range(11))).status_code == 413


def start(tmp_path, *flags):
    ready = tmp_path / "address"
    command = [
        sys.executable,
        "-m",
        "vtriune_jax.verifiers.server",
        "--ready-file",
        str(ready),
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not ready.exists() and process.poll() is None:
        time.sleep(0.02)
    return process, ready.read_text() if ready.exists() else ""


def ask(address, path="/health", data=None):
    with closing(urllib.request.urlopen(address + path, data, timeout=30)) as answer:
        return json.load(answer)


def test_it_starts_quickly_serves_and_ends_on_sigterm(tmp_path, math_item):
    process, address = start(tmp_path, "--port", "0", "--workers", "1")
    with process:
        cpu = sum(psutil.Process(process.pid).cpu_times()[:2])
        assert address.startswith("http://127.0.0.1:")
        assert ask(address)["status"] == "ok"
        body = encode_items([math_item("42")])
        assert ask(address, "/verify", body)["verdicts"][0]["score"] == 1.0
        (worker,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)  # uvicorn passes the signal on
        assert not worker.is_running()
        with pytest.raises(urllib.error.URLError):
            ask(address)
    assert cpu < 3  # wall-clock time, were the machine ours alone


def test_a_port_in_use_is_one_line(tmp_path, server):
    port = server.addresses()[0].rpartition(":")[2]
    process, _ = start(tmp_path, "--port", port)
    with process:
        (line,) = process.stderr.read().decode().splitlines()
        assert process.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in line
    assert "choose another --port" in line


def test_it_does_not_outlive_its_parent(tmp_path):
    """The parent is killed while the server works on something that never ends."""
    script = (
        "import time\n"
        "from vtriune_jax.types import RewardConfig\n"
        "from vtriune_jax.verifiers.client import VerifierClient, VerifierServer\n"
        "from vtriune_jax.verifiers.router import Item\n"
        "server = VerifierServer(workers=1, limit=2)\n"
        "client = VerifierClient(server.addresses)\n"
        "item = Item(r'\\boxed{9^{9^{9^{9}}}}', RewardConfig('mathverify', '1'))\n"
        "client.submit([item])\n"
        "time.sleep(1.5)\n"
        "print(server._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        server = psutil.Process(int(parent.stdout.readline()))
        family = [server, *server.children()]
        parent.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_neither_flax_nor_transformers_nor_sympy_is_imported():
    code = (
        "import sys, vtriune_jax.verifiers.server, vtriune_jax.verifiers.detection\n"
        "heavy = {'flax', 'transformers', 'torch', 'datasets', 'pyarrow', 'sympy', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
