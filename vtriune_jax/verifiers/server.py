"""The verifier service: python -m vtriune_jax.verifiers.server [--host 127.0.0.1] [--port 8192]

    POST /verify   {"items": [{"completion", "reward": {…}, "progress", "grid", "threshold"}, …]}
                   → {"verdicts": [{"status", "score", "parts", "reason"}, …]} in the same order
    POST /judge    V-Triune's own wire, one completion: {"response", "solution", "reward_verifier",
                   …} → {"rewards": {"format_reward", "accuracy_reward", "final_reward", …}}
    GET  /         → {"message": "Reward Judge Server"}, by which V-Triune's client knows it
    GET  /health   → {"status": "ok", "verifiers": […]}: the process lives
    GET  /ready    → 200, or 429 or 503 as /verify would answer now
    GET  /metrics  → counters for Prometheus

400s are final: 401 no token, 408 too slow, 413 too large, 422 malformed; 429 (too much to do) and
503 (ending) come with Retry-After. Stateless but for a cache, so any number of servers may serve
one training. SIGTERM lets requests in flight finish and refuses new ones.

It binds to loopback. Another --host needs a token in the environment variable
VTRIUNE_VERIFIER_TOKEN, which clients then send as `Authorization: Bearer …` (ours does when it has
the variable), or --open, for a network in which everyone may use it: V-Triune's client sends none.
"""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import jax
import uvicorn

from vtriune_jax.verifiers.app import create_app
from vtriune_jax.verifiers.item import TOKEN
from vtriune_jax.verifiers.router import TIME_LIMIT, Router
from vtriune_jax.verifiers.service import CACHE, QUEUE, Service


def main() -> None:
    """Serve until SIGTERM, Ctrl-C or the death of `--parent`."""
    args = _arguments()
    token = os.environ.get(TOKEN)
    if not (token or args.open or _is_loopback(args.host)):
        print(
            f"error: --host {args.host} would let the whole network in; set {TOKEN}, or pass "
            "--open if everyone there may use it",
            file=sys.stderr,
        )
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to the trainer
    try:
        listener = socket.create_server((args.host, args.port), backlog=2048)
    except OSError as error:
        sys.exit(
            f"cannot listen on {args.host}:{args.port} ({error.strerror}); "
            "choose another --port (0 takes a free one) or --host"
        )
    service = Service(
        Router(args.workers, args.limit, {"iou_threshold": args.iou_threshold}),
        cache=args.cache,
        queue=args.queue,
        compat=args.compat == "vtriune",
        iou_threshold=args.iou_threshold,
    )
    with listener:
        config = uvicorn.Config(
            create_app(service, token=token),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=60,  # longer than clients keep idle connections, so they hang up
            timeout_graceful_shutdown=5,
        )
        server = _Server(config, service, args.drain)
        host, port = listener.getsockname()[:2]
        if args.ready_file:
            _write_atomically(args.ready_file, f"http://{host}:{port}")
        if args.parent:
            threading.Thread(target=_end_with, args=(args.parent, server), daemon=True).start()
        gc.freeze()  # what was imported need not be searched for garbage again and again
        gc.set_threshold(50_000)  # nor a request while it is read, which has a thousand objects
        server.run(sockets=[listener])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Judge completions over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--open", action="store_true", help="no token although not on loopback")
    parser.add_argument("--port", type=int, default=8192, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per CPU core")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per completion")
    parser.add_argument("--cache", type=int, default=CACHE, help="verdicts kept; 0: none")
    parser.add_argument("--queue", type=int, default=QUEUE, help="completions in work before a 429")
    parser.add_argument("--drain", type=float, default=30.0, help="seconds to finish on SIGTERM")
    parser.add_argument(
        "--iou_threshold",
        type=_threshold,
        default="dynamic",
        help='"dynamic", "average" or a number in 0…1, for rows that do not say',
    )
    parser.add_argument(
        "--compat", choices=("vtriune",), help="/judge as the original server, quirks included"
    )
    parser.add_argument("--ready-file", type=Path, help="gets the address once requests are served")
    parser.add_argument("--parent", type=int, help="end when this process is no longer the parent")
    return parser.parse_args()


def _threshold(text: str) -> str | float:
    """The value of --iou_threshold; ValueError for another."""
    if text in ("dynamic", "average"):
        return text
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(f"{value} is not in 0…1")
    return value


class _Server(uvicorn.Server):
    """On SIGTERM or Ctrl-C it refuses new work with 503 until the old is done, then ends; at the
    second signal it ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self._service, self._drain = service, drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        """Begin to end; may be called from any thread."""
        self._service.draining = True
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        give_up = time.monotonic() + self._drain
        while self._service.pending and time.monotonic() < give_up:
            time.sleep(0.02)
        self.should_exit = True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _end_with(parent: int, server: _Server) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    server.drain()


if __name__ == "__main__":
    main()
