"""Processes that are threads here: what they tell each other, without starting any."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

from vtriune_jax import hosts


class Processes:
    """`count` of them; takes the place of what `hosts` does for those of JAX."""

    def __init__(self, count, monkeypatch):
        self.count = count
        self._meet = threading.Barrier(count)
        self._said = [""] * count
        self._me = threading.local()
        monkeypatch.setattr(hosts, "gather", self._gather)
        monkeypatch.setattr(hosts, "share", lambda: hosts.Share(self._me.index, count))
        monkeypatch.setattr(hosts, "is_first", lambda: self._me.index == 0)

    def run(self, work):
        """`work(index)` of each, at once; what they return, or the first error."""

        def one(index):
            self._me.index = index
            return work(index)

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))

    def _gather(self, value):
        self._said[self._me.index] = json.dumps(value)
        self._meet.wait(60)
        found = [json.loads(text) for text in self._said]
        self._meet.wait(60)
        return found
