"""A proxy before a real server, which garbles answers of /generate."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LIMIT = 120
"""Seconds until it gives up a request."""


def shorter(output: Any) -> None:
    """One log-prob too few."""
    output["meta_info"]["output_token_logprobs"][-1:] = []


def other_ids(output: Any) -> None:
    """Ids that are not those of the log-probs."""
    output["output_ids"] = [i + 1 for i in output["output_ids"]]


def other_prompt(output: Any) -> None:
    """It has read a prompt of another length."""
    output["meta_info"]["prompt_tokens"] += 1


def old_weights(output: Any) -> None:
    """Drawn with weights that nobody has published."""
    for span in output["meta_info"]["weight_versions"]:
        span["version"] = "ancient"


def other_model(output: Any) -> None:
    """Log-probs of the prompt that differ a little."""
    for entry in output["meta_info"]["input_token_logprobs"]:
        if entry[0] is not None:
            entry[0] -= 0.5


CHANGES: dict[str, Callable[[Any], None]] = {
    "no log-prob": shorter,
    "other ids": other_ids,
    "wrong prompt": other_prompt,
    "old weights": old_weights,
    "other log-probs": other_model,
}
"""Fault → what it does to each completion; others are of the whole answer."""


def garbled(text: bytes, fault: str) -> bytes:
    """An answer, streamed or not, with the fault in all that is complete."""
    change = CHANGES.get(fault)
    if not change:
        return text if fault != "no JSON" else b"data: <html>It works!</html>\n\n"
    if not text.startswith(b"data: "):
        output = json.loads(text)
        change(output)
        return json.dumps(output).encode()
    events = []
    for event in text.split(b"\n\n"):
        if event.startswith(b"data: {"):
            output = json.loads(event.removeprefix(b"data: "))
            if output["meta_info"]["finish_reason"]:
                change(output)
            event = b"data: " + json.dumps(output).encode()
        events.append(event)
    return b"\n\n".join(events)


@contextlib.contextmanager
def garbler(upstream: str, faults: list[str]) -> Iterator[str]:
    """Its address. The next request to /generate has the next of `faults`, "" for none."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._pass(None, "")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            faulty = self.path == "/generate" and faults
            self._pass(body, faults.pop(0) if faulty else "")

        def _pass(self, body: bytes | None, fault: str) -> None:
            names = ("Content-Type", "Authorization")
            headers = {name: self.headers[name] for name in names if name in self.headers}
            request = urllib.request.Request(upstream + self.path, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=LIMIT) as answer:
                    status, text, kind = answer.status, answer.read(), answer.headers
            except urllib.error.HTTPError as error:
                with error:
                    status, text, kind = error.code, error.read(), error.headers
            text = garbled(text, fault)
            self.send_response(500 if fault == "error" else status)
            self.send_header("Content-Type", kind.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if fault == "cut off":
                self.wfile.write(text[: len(text) // 2])
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # the client hung up, or the server did
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
