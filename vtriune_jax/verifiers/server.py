"""The verifier service: python -m vtriune_jax.verifiers.server [--host 127.0.0.1] [--port 8192]

    POST /verify   {"items": [{"completion", "reward": {…}, "progress", "grid", "threshold"}, …]}
                   → {"verdicts": [{"status", "score", "parts", "reason"}, …]} in the same order
    GET  /health   → {"status": "ok", "verifiers": […]}

Stateless, so any number of them may serve one training. It has no authentication and so binds to
loopback unless told otherwise. SIGTERM lets requests in flight finish.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import jax
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.item import decode_items, encode_verdicts
from vtriune_jax.verifiers.router import TIME_LIMIT, Router

REQUEST_LIMIT = 64 * 2**20
"""Bytes of one request."""


def create_app(router: Router, request_limit: int = REQUEST_LIMIT) -> FastAPI:
    """The routes; `router` is closed when the application ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        router.close()

    app = FastAPI(title="vtriune_jax verifiers", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "verifiers": list(known_verifiers())}

    @app.post("/verify")
    async def verify(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > request_limit:
                raise HTTPException(
                    413, f"the request exceeds {request_limit} bytes; send fewer items"
                )
        try:
            items = decode_items(bytes(body))
        except UserError as error:
            raise HTTPException(400, str(error)) from error
        verdicts = await run_in_threadpool(router.score, items)
        return Response(encode_verdicts(verdicts), media_type="application/json")

    return app


def main() -> None:
    """Serve until SIGTERM, Ctrl-C or the death of `--parent`."""
    parser = argparse.ArgumentParser(description="Judge completions over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind to")
    parser.add_argument("--port", type=int, default=8192, help="0 takes a free one")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one per CPU core")
    parser.add_argument("--limit", type=float, default=TIME_LIMIT, help="seconds per completion")
    parser.add_argument("--ready-file", type=Path, help="gets the address once requests are served")
    parser.add_argument("--parent", type=int, help="end when this process is no longer the parent")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to the trainer
    try:
        listener = socket.create_server((args.host, args.port), backlog=2048)
    except OSError as error:
        sys.exit(
            f"cannot listen on {args.host}:{args.port} ({error.strerror}); "
            "choose another --port (0 takes a free one) or --host"
        )
    with listener:
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(Router(args.workers, args.limit)),
                log_level="warning",
                access_log=False,
                timeout_keep_alive=60,  # longer than clients keep idle connections, so they hang up
                timeout_graceful_shutdown=30,
            )
        )
        host, port = listener.getsockname()[:2]
        if args.ready_file:
            _write_atomically(args.ready_file, f"http://{host}:{port}")
        if args.parent:
            threading.Thread(target=_end_with, args=(args.parent, server), daemon=True).start()
        server.run(sockets=[listener])


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _end_with(parent: int, server: uvicorn.Server) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    server.should_exit = True


if __name__ == "__main__":
    main()
