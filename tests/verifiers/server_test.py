import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager

import psutil
import pytest
from fastapi.testclient import TestClient

from vtriune_jax.types import RewardConfig, Verdict
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.app import create_app
from vtriune_jax.verifiers.cache import Cache, content
from vtriune_jax.verifiers.item import decode_items, decode_verdicts, encode_items, encode_verdicts
from vtriune_jax.verifiers.router import Item, Router
from vtriune_jax.verifiers.service import Refused, Service

SLOW = r"\boxed{9^{9^{9^{9}}}}"
LIMIT = 1.0


@contextmanager
def served(token=None, **options):
    service = Service(Router(workers=1, limit=LIMIT), **options)
    with TestClient(create_app(service, request_limit=100_000, token=token)) as web:
        yield web


@pytest.fixture(scope="module")
def web():
    with served() as web:
        yield web


def test_items_and_verdicts_travel_unchanged():
    params = {"det_reward_ratio": {"map": 1.0}, "det_verifier_normalized": True, "x": None}
    reward = RewardConfig("detection", "中\ud800\0", "a", 1.0, 0.1, params)
    items = [Item("\udfff\x00 '\"", reward, 0.3, ((28, 56), (1, 2)), 0.5), Item("", reward)]
    assert decode_items(encode_items(items)) == items
    verdicts = [Verdict("ok", 0.1, {"accuracy": 0.1}), Verdict("timeout", reason="slow")]
    assert decode_verdicts(encode_verdicts(verdicts)) == verdicts


def test_health_and_ready(web):
    assert web.get("/health").json() == {"status": "ok", "verifiers": list(known_verifiers())}
    assert web.get("/ready").json() == {"status": "ready"}
    assert web.get("/").json() == {"message": "Reward Judge Server"}


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
        b'{"items": [{"completion": "", "reward": {"verifier": ["x"], "ground_truth": ""}}]}',
        b'{"items": [{"completion":"","reward":{"verifier":"x","ground_truth":"","params":1}}]}',
        b'{"items": [{"completion":"","reward":{"verifier":"x","ground_truth":"","params":[1]}}]}',
        b'{"items":[{"completion":"","grid":[[1e999,1]],"reward":{"verifier":"","ground_truth":""}}]}',
        b'{"items": ' + b"[" * 50_000,
    ],
)
def test_malformed_requests(web, body):
    answer = web.post("/verify", content=body)
    assert answer.status_code == 422
    assert "not a list of items" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "reason"), [(b"[", "not JSON"), (b"[" * 50_000, "not JSON"), (b"[]", "is a list")]
)
def test_malformed_questions_of_the_original_wire(web, body, reason):
    answer = web.post("/judge", content=body)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]


def test_a_request_too_large(web):
    for path in ("/verify", "/judge"):
        assert web.post(path, content=b" " * 100_001).status_code == 413
        assert web.post(path, content=(b" " * 10_000 for _ in range(11))).status_code == 413


def test_equal_items_are_judged_once(math_item):
    body = encode_items([math_item("1"), math_item("2"), math_item("1")] * 2)
    slow = encode_items([Item(SLOW, math_item("1").reward)] * 2)
    with served() as web:
        first = web.post("/verify", content=body).json()
        assert counted(web, 'cache_total{result="miss"}') == 2
        assert web.post("/verify", content=body).json() == first
        assert counted(web, 'cache_total{result="miss"}') == 2
        assert counted(web, 'cache_total{result="hit"}') == 10
        for _ in range(2):  # what might go another way next time is not remembered
            verdicts = web.post("/verify", content=slow).json()["verdicts"]
            assert [v["status"] for v in verdicts] == ["timeout"] * 2
        assert counted(web, "cached") == 2
    with served(cache=0) as web:
        assert web.post("/verify", content=body).json() == first
        assert counted(web, "cached") == 0
        assert "result=" not in web.get("/metrics").text


def test_the_cache_forgets_what_was_asked_for_longest_ago(math_item):
    cache, good = Cache(2), Verdict("ok", 1.0)
    keys = [content(math_item(str(k))) for k in range(3)]
    cache.put(keys[0], good)
    cache.put(keys[1], good)
    assert cache.get(keys[0]) is good
    cache.put(keys[2], good)
    assert [cache.get(key) for key in keys] == [good, None, good]
    assert len(cache) == 2


def test_items_are_equal_only_if_all_of_them_is(boxes_item):
    items = [
        boxes_item(),
        boxes_item(progress=0.5),
        boxes_item(threshold=0.5),
        boxes_item(grid=((28, 28),)),
        boxes_item(iou_threshold=0.5),
        boxes_item("\ud800"),
        boxes_item("\\ud800"),
    ]
    assert len({content(item) for item in items}) == len(items)
    assert content(boxes_item()) == content(boxes_item())


def counted(web, name):
    """The value of a line of /metrics."""
    lines = web.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"vtriune_verifier_{name} ")]
    return float(line.rpartition(" ")[2])


def test_metrics_count_what_happened(math_item, boxes_item):
    unknown = Item("x", RewardConfig('any"thing', ""))
    items = [math_item("42"), math_item("1", truth="yes"), unknown, unknown, boxes_item()]
    with served() as web:
        web.post("/verify", content=encode_items(items))
        web.post("/verify", content=b"")
        web.get("/nothing/like/it")
        assert counted(web, 'completions_total{verifier="mathverify",status="ok"}') == 1
        assert counted(web, 'completions_total{verifier="mathverify",status="error"}') == 1
        assert counted(web, 'completions_total{verifier="unknown",status="error"}') == 2
        assert counted(web, 'completions_total{verifier="detection",status="ok"}') == 1
        assert counted(web, 'responses_total{path="/verify",code="200"}') == 1
        assert counted(web, 'responses_total{path="/verify",code="422"}') == 1
        assert counted(web, 'responses_total{path="other",code="404"}') == 1
        assert counted(web, 'request_seconds_bucket{le="+Inf"}') == 1
        assert counted(web, "pending") == counted(web, "waiting") == 0
        types = [line for line in web.get("/metrics").text.splitlines() if line[0] == "#"]
        assert len(types) == len(set(types))


def test_a_token_is_needed_everywhere_but_for_health():
    with served(token="secret") as web:
        assert web.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/", "/ready", "/metrics", "/docs", "/nothing"):
                assert web.get(path, headers=headers).status_code == 401
            answer = web.post("/verify", content=b'{"items": []}', headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        headers = {"Authorization": "Bearer secret"}
        answer = web.post("/verify", content=b'{"items": []}', headers=headers)
        assert answer.json() == {"verdicts": []}


def test_too_much_is_refused_with_the_time_to_come_back(math_item):
    """Driven without HTTP: what matters is what is admitted while something else is in work."""

    async def scenario(service):
        fine = math_item("42")
        whole = asyncio.create_task(service.verify([Item(SLOW, fine.reward)] + [fine] * 5))
        await asyncio.sleep(0)
        with pytest.raises(Refused) as refusal:
            await service.verify([fine])
        assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
        assert "6 completions wait, 4 may" in str(refusal.value)
        assert [verdict.status for verdict in await whole] == ["timeout"] + ["ok"] * 5
        assert (await service.verify([fine]))[0].score == 1
        service.draining = True
        with pytest.raises(Refused) as refusal:
            await service.verify([])
        assert refusal.value.status == 503

    service = Service(Router(workers=1, limit=LIMIT), queue=4)
    try:
        asyncio.run(scenario(service))
    finally:
        service.close()


def test_what_nobody_waits_for_is_not_judged(math_item):
    async def scenario(service):
        slow = [Item(SLOW + str(k), math_item("1").reward) for k in range(1000)]
        task = asyncio.create_task(service.verify(slow))
        while not service._router.pool.waiting:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.pending == 0
        assert (await service.verify([math_item("42")]))[0].score == 1

    service = Service(Router(workers=1, limit=LIMIT))
    try:
        asyncio.run(scenario(service))
    finally:
        service.close()


def start(tmp_path, *flags, **environment):
    ready = tmp_path / "address"
    command = [
        sys.executable,
        "-m",
        "vtriune_jax.verifiers.server",
        "--ready-file",
        str(ready),
        *flags,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, **environment})
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
        assert process.wait(timeout=20) == 0
        assert not worker.is_running()
        with pytest.raises(urllib.error.URLError):
            ask(address)
    assert cpu < 3  # wall-clock time, were the machine ours alone


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(tmp_path, math_item):
    process, address = start(tmp_path, "--port", "0", "--workers", "1", "--limit", "2")
    body = encode_items([Item(SLOW, math_item("1").reward), math_item("42")])
    answers = []
    with process:
        asking = threading.Thread(target=lambda: answers.append(ask(address, "/verify", body)))
        asking.start()
        while "pending 2" not in read(address, "/metrics"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        for path, data in (("/verify", body), ("/ready", None)):
            with pytest.raises(urllib.error.HTTPError, match="503") as refusal:
                ask(address, path, data)
            assert refusal.value.headers["Retry-After"] == "1"
            refusal.value.close()
        assert ask(address)["status"] == "ok"
        asking.join()
        assert [v["status"] for v in answers[0]["verdicts"]] == ["timeout", "ok"]
        assert process.wait(timeout=20) == 0


def test_a_client_that_hangs_up_frees_the_workers(tmp_path, math_item):
    process, address = start(tmp_path, "--port", "0", "--workers", "1", "--limit", "1")
    body = encode_items([Item(f"{k}{SLOW}", math_item("1").reward) for k in range(200)])
    host, _, port = address.removeprefix("http://").partition(":")
    with process:
        head = f"POST /verify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            while "pending 200" not in read(address, "/metrics"):
                time.sleep(0.02)
        assert ask(address, "/verify", encode_items([math_item("42")]))["verdicts"][0]["score"] == 1
        process.terminate()
        assert process.wait(timeout=20) == 0


def read(address, path):
    with closing(urllib.request.urlopen(address + path, timeout=30)) as answer:
        return answer.read().decode()


def test_the_network_needs_a_token(tmp_path):
    flags = ("--port", "0", "--host", "0.0.0.0")
    process, _ = start(tmp_path, *flags)
    with process:
        (line,) = process.stderr.read().decode().splitlines()
        assert process.wait() == 2
    assert line.startswith("error: --host 0.0.0.0 ")
    assert "set VTRIUNE_VERIFIER_TOKEN, or pass --open" in line
    for more, token in ((("--open",), ""), ((), "secret")):
        process, address = start(tmp_path, *flags, *more, VTRIUNE_VERIFIER_TOKEN=token)
        with process:
            port = address.rpartition(":")[2]
            assert ask(f"http://127.0.0.1:{port}")["status"] == "ok"
            process.terminate()
        (tmp_path / "address").unlink()


@pytest.mark.parametrize("value", ["2", "0", "Average", "nan"])
def test_a_threshold_that_is_none(tmp_path, value):
    process, _ = start(tmp_path, "--iou_threshold", value)
    with process:
        assert "argument --iou_threshold: invalid" in process.stderr.read().decode()


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
        "from vtriune_jax.verifiers.client import VerifierClient\n"
        "from vtriune_jax.verifiers.embedded import VerifierServer\n"
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
        "import sys, vtriune_jax.verifiers.server\n"
        "heavy = {'flax', 'transformers', 'torch', 'datasets', 'pyarrow', 'sympy', 'PIL'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
