"""The endpoints of the fake server: JSON in and out as SGLang 0.5.21 has it, faults by script."""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import orjson
from aiohttp import web

from tests.rollout.fake_engine import Engine, Request
from tests.rollout.fake_models import NoWeights, WrongShape, expand, settings_of, source_of
from tests.rollout.fake_request import (
    Crash,
    Malformed,
    answer,
    draws_of,
    images_of,
    json_of,
    malformed,
    model_info,
    server_info,
    spoil,
)

ADMIN = (
    "/update_weights_from_disk",
    "/update_weight_version",
    "/pause_generation",
    "/continue_generation",
    "/abort_request",
    "/flush_cache",
)
FAULT: ContextVar[dict[str, Any]] = ContextVar("FAULT")
"""What is to go wrong with the request at hand."""
PAUSES = ("abort", "retract", "in_place")


class FakeApp:
    """The endpoints over one engine; `die` ends the server as kill -9 would."""

    def __init__(self, options: argparse.Namespace, die: Callable[[], None]):
        self.options, self.die = options, die
        self.settings = settings_of(options)
        self.engine = Engine(
            source_of(options, self.settings),
            version=options.weight_version,
            model_path=options.model_path,
            token_seconds=options.token_seconds,
            capacity=options.capacity,
        )
        self.faults: list[dict[str, Any]] = []
        self.health_seconds = 0.0
        self.counts: Counter[str] = Counter()
        self.rids: list[str] = []
        self.image_bytes = 0
        self._generating, self._idle_since = 0, time.monotonic()

    def app(self) -> web.Application:
        """For aiohttp to serve."""
        app = web.Application(client_max_size=2**30, middlewares=[self._guard])
        post, get = app.router.add_post, app.router.add_get
        post("/generate", self.generate)
        for path in ("/health", "/health_generate"):
            get(path, self.health)
        for path in ("/model_info", "/get_model_info"):
            get(path, self.model_info)
        for path in ("/server_info", "/get_server_info"):
            get(path, self.server_info)
        post("/pause_generation", self.pause)
        post("/continue_generation", self.resume)
        post("/abort_request", self.abort)
        post("/update_weights_from_disk", self.update)
        post("/update_weight_version", self.rename)
        app.router.add_route("*", "/flush_cache", self.flush)
        app.router.add_route("*", "/fake", self.fake)
        app.cleanup_ctx.append(self._engine)
        return app

    async def _engine(self, _: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(self.engine.run())
        yield
        task.cancel()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Keys, scripted faults, and errors in the real server's words."""
        self.counts[request.path] += 1
        if not self._allowed(request):
            return answer({"error": "Unauthorized"}, 401)
        fault = self._fault(request.path)
        FAULT.set(fault)
        match fault.get("kind"):
            case "status":
                text = fault.get("body", "Internal Server Error")
                return web.Response(text=text, status=fault.get("status", 500))
            case "hang":
                await asyncio.Event().wait()
            case "json":
                return web.Response(text='{"text": "', content_type="application/json")
            case "slow":
                await asyncio.sleep(fault["seconds"])
            case "drop" | "die" if not fault.get("after"):
                self._end(request)
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return answer({"detail": "Not Found"}, 404)
        except Malformed as error:
            return malformed(error)
        except Crash:
            response = web.Response(text="Internal Server Error", status=500)
            response.force_close()
            return response
        except ValueError as error:
            return answer({"error": {"message": str(error)}}, 400)

    def _allowed(self, request: web.Request) -> bool:
        user, admin = self.options.api_key, self.options.admin_api_key
        if request.path.startswith("/health") or request.path == "/fake":
            return True
        key = (admin or user) if request.path in ADMIN else user
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        return not key or (kind.lower() == "bearer" and hmac.compare_digest(given, key))

    def _fault(self, path: str) -> dict[str, Any]:
        for fault in self.faults:
            if fault.get("path", "/generate") == path and fault.get("times", 1):
                fault["times"] = fault.get("times", 1) - 1
                return fault
        return {}

    def _end(self, request: web.Request) -> None:
        if FAULT.get()["kind"] == "die":
            self.die()
        elif request.transport:
            request.transport.abort()

    async def _end_after(self, request: web.Request, lines: list[Request]) -> None:
        while sum(len(each.line.ids) for each in lines) < FAULT.get()["after"]:
            await asyncio.sleep(0.002)
        self._end(request)

    # --------------------------------------------------------------------------------- generation

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """One or many completions, at once or as server-sent events."""
        self._generating += 1
        try:
            return await self._generate(request)
        finally:
            self._generating -= 1
            self._idle_since = time.monotonic()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await json_of(request)
        rids: list[str] = []
        lines: list[Request] = []
        try:
            if not body.get("stream"):
                last = {}
                async for index, output in self._outputs(request, body, rids, lines):
                    last[index] = output
                results = [last[i] for i in sorted(last)]
                if FAULT.get().get("kind") == "missing":
                    results.pop()
                return answer(results[0] if self._is_single(body) else results)
            return await self._stream(request, body, rids, lines)
        finally:
            for one in lines:
                self.engine.abort(one.rid)  # the client may have gone
            for rid in rids:
                self.engine.known.pop(rid, None)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], rids: list[str], lines: list[Request]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        forgets = FAULT.get().get("kind") == "missing"
        try:
            async for index, output in self._outputs(request, body, rids, lines):
                if forgets and index == len(lines) - 1 and output["meta_info"]["finish_reason"]:
                    continue
                if not self._is_single(body):
                    output["index"] = index
                await response.write(b"data: " + orjson.dumps(output) + b"\n\n")
        except ConnectionResetError:
            return response
        except Crash:
            if request.transport:
                request.transport.abort()
            return response
        except ValueError as error:
            code = {"type": "invalid_request_error", "code": 400, "retryable": False}
            text = orjson.dumps({"error": {"message": str(error), **code}})
            await response.write(b"data: " + text + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    def _is_single(body: dict[str, Any]) -> bool:
        params = body.get("sampling_params") or {}
        params = params[0] if isinstance(params, list) else params
        return not isinstance(body["input_ids"][0], list) and params.get("n", 1) == 1

    async def _outputs(
        self, request: web.Request, body: dict[str, Any], rids: list[str], lines: list[Request]
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """(number of the completion, its state) for every chunk; fills `rids` and `lines`."""
        ids = body.get("input_ids")
        if not ids:
            raise ValueError("Either text, input_ids or input_embeds should be provided.")
        prompts = ids if isinstance(ids[0], list) else [ids]
        draws, n, interval = draws_of(body, len(prompts), self.settings)
        images = images_of(body.get("image_data"), len(prompts), self._is_single(body))
        self._register(body.get("rid") or uuid.uuid4().hex, len(prompts), n, body, rids)
        wants = bool(body.get("return_logprob"))
        async with self.engine.reading():
            for i, (prompt_ids, pictures) in enumerate(zip(prompts, images, strict=True)):
                if len(prompt_ids) >= self.options.context_length:
                    raise ValueError(
                        f"The input ({len(prompt_ids)} tokens) is longer than the model's context "
                        f"length ({self.options.context_length} tokens)."
                    )
                self.image_bytes += sum(map(len, pictures))
                prompt = expand(prompt_ids, pictures, self.settings)
                if prompt is None:
                    self.engine.hung += 1
                    await asyncio.Event().wait()
                    return
                source = self.engine.source
                drawn = await asyncio.to_thread(source.begin, prompt, draws[i], n)
                logps = None
                start = body.get("logprob_start_len", -1)
                if wants and start >= 0:
                    found = (await asyncio.to_thread(source.prompt_logps, prompt))[start:]
                    pad = self.settings.image_pad
                    shown = [0 if each == pad else each for each in prompt.ids[start:]]
                    logps = [[p, each, None] for p, each in zip([None, *found], shown, strict=True)]
                for line in drawn:
                    rid = rids[i] if n == 1 else uuid.uuid4().hex
                    lines.append(Request(rid, line, interval, prompt_logps=logps))
            for one in lines:
                self.engine.submit(one)
            end = None
            if FAULT.get().get("after"):
                end = asyncio.create_task(self._end_after(request, lines))
            waits = {asyncio.create_task(one.chunks.get()): k for k, one in enumerate(lines)}
            try:
                while waits:
                    done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        k = waits.pop(task)
                        if not task.result():
                            waits[asyncio.create_task(lines[k].chunks.get())] = k
                            if lines[k].finish:
                                continue  # the next chunk is its last
                        output = self.engine.output(lines[k], wants)
                        spoil(output, FAULT.get())
                        yield k, output
            finally:
                for task in [*waits, *([end] if end else [])]:
                    task.cancel()

    def _register(
        self, rid: str | list[str], prompts: int, n: int, body: dict[str, Any], rids: list[str]
    ) -> None:
        if isinstance(rid, str):
            single = self._is_single(body)
            rid = [rid] if single else [f"{rid}_{i}" for i in range(prompts * n)]
        elif len(rid) != prompts:
            raise ValueError(
                "The specified rids length mismatch with the batch_size for batch processing."
            )
        for each in rid:
            if each in self.engine.known:
                raise ValueError(f"Duplicate request ID detected: {each}")
        self.engine.known |= dict.fromkeys(rid)
        rids += rid
        self.rids += rid

    # ------------------------------------------------------------------------------------ control

    async def health(self, _: web.Request) -> web.Response:
        """One second in the real server."""
        await asyncio.sleep(self.health_seconds)
        if self.engine.paused:  # the real one waits 20 s for a token first
            return web.Response(status=503)
        return web.Response()

    async def model_info(self, _: web.Request) -> web.Response:
        """The weights that it has."""
        return answer(model_info(self.engine.model_path, self.engine.version, self.options))

    async def server_info(self, _: web.Request) -> web.Response:
        """The flags of its start, and its capacity."""
        return answer(server_info(self.options))

    async def pause(self, request: web.Request) -> web.Response:
        """In one of three modes."""
        mode = (await json_of(request)).get("mode", "abort")
        if mode not in PAUSES:
            raise Malformed(f"1 validation error:\n  mode={mode!r}")
        if settle := self.options.settle:
            while self._generating or time.monotonic() - self._idle_since < settle:
                await asyncio.sleep(0.02)
        await self.engine.pause(mode)
        return answer({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, request: web.Request) -> web.Response:
        """After a pause."""
        await json_of(request)
        await self.engine.resume()
        return answer({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, request: web.Request) -> web.Response:
        """One rid, or all; says nothing."""
        body = await json_of(request)
        self.engine.abort(body.get("rid") or "", bool(body.get("abort_all")))
        return web.Response()

    async def update(self, request: web.Request) -> web.Response:
        """Other weights; a wrong shape, or a cache that cannot be flushed, kills the server."""
        body = await json_of(request)
        version = body.get("weight_version")
        try:
            await self.engine.update(
                body["model_path"],
                version,
                flush=body.get("flush_cache", True),
                abort=body.get("abort_all_requests", False),
            )
        except NoWeights as error:
            content = {"success": False, "message": str(error), "num_paused_requests": 0}
            return answer(content, 400)
        except (WrongShape, RuntimeError):
            self.die()
            raise
        message = "Succeeded to update model weights."
        if version is not None:
            message += f" Weight version updated to {version}."
        return answer({"success": True, "message": message, "num_paused_requests": 0})

    async def rename(self, request: web.Request) -> web.Response:
        """Another version for the same weights."""
        version = (await json_of(request))["new_version"]
        self.engine.version = version
        message = f"Weight version updated to {version}"
        return answer({"success": True, "message": message, "new_version": version})

    async def flush(self, _: web.Request) -> web.Response:
        """The prefix cache; not while requests run."""
        if not self.engine.flush():
            return web.Response(text="Flush cache failed.\n", status=400)
        return web.Response(
            text="Cache flushed.\nPlease check backend logs for more details. (When there are "
            "running or waiting requests, the operation will not be performed.)\n"
        )

    async def fake(self, request: web.Request) -> web.Response:
        """Not SGLang's: the script of this server, and what it has counted."""
        if request.method == "POST":
            body = await json_of(request)
            self.faults = body.get("faults", self.faults)
            self.health_seconds = body.get("health_seconds", self.health_seconds)
            self.engine.token_seconds = body.get("token_seconds", self.engine.token_seconds)
            self.engine.capacity = body.get("capacity", self.engine.capacity)
        return answer(
            {
                "pid": os.getpid(),
                "counts": self.counts,
                "rids": self.rids,
                "running": len(self.engine.running),
                "waiting": len(self.engine.waiting),
                "most": self.engine.most,
                "tokens": self.engine.tokens,
                "image_bytes": self.image_bytes,
                "aborted": self.engine.aborted,
                "paused": self.engine.paused,
                "weight_version": self.engine.version,
                "faults": self.faults,
            }
        )
