"""A server that speaks SGLang's protocol (0.5.21) without SGLang, for fast tests.

    python -m tests.rollout.fake_sglang --port=31000 [--model-path=FOLDER --responder=checkpoint]

or, in this process on a thread, `with FakeServer() as server: … server.address`, or as a process of
its own that can be killed and stopped, `with FakeServer(process=True)`. `contract.py` holds what is
the same as in the real server, and runs on both. Beyond the protocol, `POST /fake` sets
`token_seconds`, `capacity`, `health_seconds` and `faults`, and `GET /fake` counts what happened:
`server.script(…)` and `server.seen()`.

A fault is {"kind": …, "path": "/generate", "times": 1 (-1: always), …}:

    status   answers `status` with `body`            hang     never answers
    drop     closes the connection, `after` tokens   die      ends the server, `after` tokens
    json     answers what is not JSON                slow     waits `seconds` before it answers
    lengths  one log-prob too few                    tokens   a wrong prompt length
    ids      an id that is not the log-prob's        banned   `id` as the token number `at`
    missing  forgets the last completion             version  leaves out the weight versions
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.rollout.fake_app import FakeApp

ROOT = Path(__file__).parents[2]


def parser() -> argparse.ArgumentParser:
    """The flags; those of the real server have its names."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=0)
    flags.add_argument("--model-path", default="")
    flags.add_argument("--weight-version", default="default")
    flags.add_argument("--api-key", default="")
    flags.add_argument("--admin-api-key", default="")
    flags.add_argument("--max-total-tokens", type=int, default=16384)
    flags.add_argument("--context-length", type=int, default=32768)
    flags.add_argument("--random-seed", dest="seed", type=int, default=0)
    flags.add_argument("--responder", choices=("pseudo", "checkpoint"), default="pseudo")
    flags.add_argument("--token-seconds", type=float, default=0.0)
    flags.add_argument("--capacity", type=int, default=2048)
    flags.add_argument(
        "--by-prompt", action="store_true", help="a checkpoint's draws follow from it"
    )
    flags.add_argument("--settle", type=float, default=0.0, help="seconds idle before a pause")
    flags.add_argument("--no-vision-cache", action="store_true", help="SGLANG_VLM_CACHE_SIZE_MB=0")
    return flags


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class FakeServer:
    """A running fake server; arguments are flags, as `token_seconds=0.01`."""

    def __init__(self, *, process: bool = False, port: int = 0, **flags: Any):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process = process
        self._flags = [f"--port={self.port}"]
        for name, value in flags.items():
            name = name.replace("_", "-")
            self._flags += [f"--{name}"] if value is True else [f"--{name}={value}"]
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """And wait until it answers."""
        if self._process:
            command = [sys.executable, "-m", "tests.rollout.fake_sglang", *self._flags]
            self._child = subprocess.Popen(command, cwd=ROOT)
        else:
            ready = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
            self._thread.start()
            ready.wait(60)
        for _ in range(1200):
            try:
                self.seen()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(f"no fake server at {self.address}")

    def kill(self) -> None:
        """kill -9, and wait for it."""
        if self._child:
            self._child.kill()
            self._child.wait()
        elif self._thread and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        assert self._child
        os.kill(self._child.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._child
        os.kill(self._child.pid, signal.SIGCONT)

    def script(self, **settings: Any) -> None:
        """Set `faults`, `token_seconds`, `capacity`, `health_seconds`."""
        self.call("/fake", settings)

    def seen(self) -> dict[str, Any]:
        """What happened so far."""
        return self.call("/fake")

    def call(self, path: str, body: Any = None, key: str = "") -> Any:
        """Any endpoint, from outside; GET without a body. Raises urllib's HTTPError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text[:1] in (b"{", b"[") else text.decode()

    def _run(self, ready: threading.Event) -> None:
        asyncio.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(parser().parse_args(self._flags), self._stop, self._stop.set, ready)


async def serve(
    options: argparse.Namespace,
    stop: asyncio.Event,
    die: Callable[[], None],
    ready: threading.Event | None = None,
) -> None:
    """Until `stop`, with the connections cut off then."""
    app = FakeApp(options, die).app()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, options.host, options.port)
    await site.start()
    if ready:
        ready.set()
    await stop.wait()
    await site.stop()
    while runner.server and (connections := runner.server.connections):
        for connection in list(connections):
            if connection.transport:
                connection.transport.abort()
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)  # handlers that hang are cancelled with the loop


def main() -> None:
    """Serve until killed, or dead of a wrong shape."""
    asyncio.run(serve(parser().parse_args(), asyncio.Event(), die=lambda: os._exit(1)))


if __name__ == "__main__":
    main()
