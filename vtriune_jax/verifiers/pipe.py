"""Python objects over a socket, each with its length in front; what `pool` and `worker` talk in.

Not a multiprocessing.Connection, since a time limit must hold for sending too: a process that was
stopped does not read.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")


def send(end: socket.socket, message: Any) -> None:
    """Write one message; TimeoutError after the socket's timeout, OSError if nobody is there."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    end.sendall(_LENGTH.pack(len(data)) + data)


def receive(end: socket.socket) -> Any:
    """Read one message; EOFError when the other side has closed, else as `send`."""
    return pickle.loads(_exactly(end, *_LENGTH.unpack(_exactly(end, _LENGTH.size))))


def _exactly(end: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = end.recv_into(view)
        if not count:
            raise EOFError("the other side has closed")
        view = view[count:]
    return data
