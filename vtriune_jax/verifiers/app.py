"""The routes of the verifier service and what guards them; `server` documents them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtriune_jax.errors import UserError
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.item import decode_items, encode_verdicts
from vtriune_jax.verifiers.service import Refused, Service
from vtriune_jax.verifiers.telemetry import Telemetry

REQUEST_LIMIT = 64 * 2**20
"""Bytes of one request."""
_ARRIVAL_LIMIT = 60.0
"""Seconds for the body of a request to arrive; else slow senders would hold memory for ever."""

T = TypeVar("T")


def create_app(
    service: Service, *, request_limit: int = REQUEST_LIMIT, token: str | None = None
) -> ASGIApp:
    """The routes; `service` is closed when the application ends.

    With a `token`, all but /health ask for `Authorization: Bearer <token>`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="vtriune_jax verifiers", lifespan=lifespan)

    @app.get("/")
    async def root() -> dict[str, str]:
        return {"message": "Reward Judge Server"}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "verifiers": list(known_verifiers())}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        with _as_http():
            service.admit(1)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.post("/verify")
    async def verify(request: Request) -> Response:
        with _as_http():
            service.admit(0)  # before the trouble of reading and decoding
            items = decode_items(await _body(request, request_limit))
            verdicts = await _unless_gone(request, service.verify(items))
        return Response(encode_verdicts(verdicts), media_type="application/json")

    @app.post("/judge")
    async def judge(request: Request) -> Response:
        with _as_http():
            service.admit(0)
            question = _object(await _body(request, request_limit))
            answer = await _unless_gone(request, service.judge(question))
        if isinstance(answer, str):
            raise HTTPException(422, answer)
        return Response(json.dumps(answer), media_type="application/json")

    return _Guard(app, token, service.telemetry, {route.path for route in app.routes})  # type: ignore[attr-defined]


class _Guard:
    """Refuses who has no token and counts the responses: ASGI in, ASGI out."""

    def __init__(
        self, app: ASGIApp, token: str | None, telemetry: Telemetry, paths: set[str]
    ) -> None:
        self._app, self._telemetry, self._paths = app, telemetry, paths
        self._expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._telemetry.responses[path, str(message["status"])] += 1
            await send(message)

        if path == "/health" or self._is_known(scope):
            await self._app(scope, receive, counted)
        else:
            headers = {"WWW-Authenticate": "Bearer"}
            refusal = Response('{"detail": "Authorization: Bearer <token> needed"}', 401, headers)
            await refusal(scope, receive, counted)

    def _is_known(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._expected is None or hmac.compare_digest(given, self._expected)


@contextlib.contextmanager
def _as_http() -> Any:
    """Our errors as HTTP's."""
    try:
        yield
    except UserError as error:
        raise HTTPException(422, str(error)) from error
    except Refused as error:
        headers = {"Retry-After": str(error.retry_after)}
        raise HTTPException(error.status, str(error), headers) from error


async def _body(request: Request, limit: int) -> bytes:
    """All of a request's body; it is counted as it comes, whatever its header promised."""
    body = bytearray()
    try:
        async with asyncio.timeout(_ARRIVAL_LIMIT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    reason = f"the request exceeds {limit} bytes; send fewer items"
                    raise HTTPException(413, reason, {"Connection": "close"})
    except TimeoutError as error:
        reason = f"the request did not arrive within {_ARRIVAL_LIMIT:g} s"
        raise HTTPException(408, reason, {"Connection": "close"}) from error
    return bytes(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request is not JSON ({error}); expected an object") from error
    if not isinstance(question, dict):
        raise UserError(f"the request is a {type(question).__name__}; expected an object")
    return question


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when nobody waits for it any more."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        raise HTTPException(499, "the client has closed the connection") from None


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
