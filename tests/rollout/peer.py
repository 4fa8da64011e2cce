"""A server as the contract's checks talk to it: plain HTTP, no client of ours."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A server with the weights `first`."""

    address: str
    first: Path
    second: Path
    """Other weights of the same shapes."""
    image_id: int
    vision_start: int
    vision_end: int
    vocab: int

    def post(self, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
        """(status, JSON or text)."""
        data = json.dumps(body).encode() if body is not None else b""
        request = urllib.request.Request(
            self.address + path,
            data if method == "POST" else None,
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, parsed(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, parsed(error.read())

    def get(self, path: str) -> Any:
        """JSON or text of a status 200."""
        status, answer = self.post(path, method="GET")
        assert status == 200
        return answer

    def generate(self, **body: Any) -> Any:
        """The answer of a request that succeeds."""
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer

    def events(self, seen: Any = None, **body: Any) -> list[Any]:
        """The events of a stream, given to `seen` as they come; the last one is [DONE]."""
        request = urllib.request.Request(
            f"{self.address}/generate",
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        events = []
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.strip():
                    assert line.startswith(b"data: ")
                    events.append(parsed(line[6:].strip()))
                    if seen and events[-1] != "[DONE]":
                        seen(events[-1])
        assert events.pop() == "[DONE]"
        return events

    def ids(self, *images: int) -> list[int]:
        """A prompt with one placeholder for each image."""
        picture = [self.vision_start, self.image_id, self.vision_end]
        return [11, 12, 13, *(picture * len(images)), 14, 15]

    def version(self) -> str:
        return self.get("/model_info")["weight_version"]

    def update(self, folder: Path | str, version: str, **more: Any) -> tuple[int, Any]:
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        return self.post("/update_weights_from_disk", body | more)


def parsed(text: bytes) -> Any:
    return json.loads(text) if text[:1] in (b"{", b"[") and text != b"[DONE]" else text.decode()
