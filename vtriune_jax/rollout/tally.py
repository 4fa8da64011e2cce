"""What is counted while a fleet works, and the snapshot of it that goes into the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.servers import Server
from vtriune_jax.types import Completion


@dataclass
class Tally:
    """Sums since the start; changed on the fleet's loop alone."""

    completions: int = 0
    tokens: int = 0
    requests: int = 0
    retries: int = 0
    """Requests that failed and were made again."""
    aborted: int = 0
    """Completions that were interrupted because enough groups were complete."""
    banned: int = 0
    """Completions cut off because a banned id came all the same."""
    lag: int = 0
    """Versions that the weights of each token were behind when it arrived, summed up."""
    pending: int = 0
    """Prompts that are not complete."""
    _last: dict[str, float] = field(default_factory=dict)
    _at: float = field(default_factory=time.monotonic)

    def received(self, server: Server, drawn: Completion, fleet: Fleet) -> None:
        """Tokens came from a server."""
        self.tokens += len(drawn.ids)
        server.tokens += len(drawn.ids)
        self.lag += sum((b - a) * fleet.lag(str(v)) for v, a, b in drawn.versions)

    def snapshot(self, fleet: Fleet) -> dict[str, float]:
        """Sums so far; rates and the mean lag are since the last snapshot."""
        now = time.monotonic()
        seconds = max(now - self._at, 1e-9)
        sums = {"tokens": float(self.tokens), "lag": float(self.lag)}
        servers = list(fleet.queue.servers.values())
        sums |= {server.address: float(server.tokens) for server in servers}
        new = {name: value - self._last.get(name, 0.0) for name, value in sums.items()}
        self._last, self._at = sums, now
        known = fleet.servers()
        stats = {
            "completions": float(self.completions),
            "tokens": float(self.tokens),
            "tokens_per_s": new["tokens"] / seconds,
            "pending_prompts": float(self.pending),
            "in_flight": float(sum(server.in_flight for server in servers)),
            "requests": float(self.requests),
            "retries": float(self.retries),
            "aborted": float(self.aborted),
            "banned": float(self.banned),
            "version_lag": new["lag"] / max(new["tokens"], 1.0),
            "servers": float(len(known)),
            "servers_ready": float(sum(server.works for server in known)),
            "quarantines": float(fleet.quarantines),
        }
        for server in known:
            name = server.address.split("//")[-1]
            stats[f"server/{name}/tokens_per_s"] = new[server.address] / seconds
            stats[f"server/{name}/in_flight"] = float(server.in_flight)
        return stats
