"""The trainer's weights → every server of the fleet, after each update.

    sync = WeightSync(fleet, Publisher(folder, config, reference=checkpoint), probe=probe)
    metrics = sync.push(params, version=step + 1)       # while rollouts are under way

On each server: pause (requests are kept, and computed anew) → load the version's folder → check
that it has it → go on. A server that fails in any of these is quarantined and gets no work until it
is well and has the newest version: old weights are never used. Then the probe asks whether the
server's model is the trainer's.

Of several processes with the same servers, all write a version, and the first one gives it to the
servers. The others send them no request meanwhile, and are told which servers have it; one that
comes back later they know by the name of its version and by the probe.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from vtriune_jax import hosts
from vtriune_jax.errors import UserError
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.probe import Expected, Finding, Probe
from vtriune_jax.rollout.publish import Publisher
from vtriune_jax.rollout.servers import Server
from vtriune_jax.rollout.trouble import TROUBLE, ServerError, Unfit, refusal


@dataclass(frozen=True)
class Target:
    """What servers should have."""

    version: str
    path: str
    """As they see it."""
    expected: Expected | None
    """What the probe should find there, if there is one."""


class WeightSync:
    """Publishes versions and brings the servers up to date, those that come back too.

    It takes the fleet's `on_return`.
    """

    def __init__(
        self,
        fleet: Fleet,
        publisher: Publisher,
        *,
        server_dir: str = "",
        mark: str = "",
        probe: Probe | None = None,
        deadline: float = 300.0,
        recovery: float = 300.0,
    ):
        """`server_dir` is the publisher's folder as the servers see it, if that is another path.

        The names of versions end with `mark`, which must be this start's own where processes are to
        know what another one has given. In seconds: `deadline`, for one server from pause to
        continue; `recovery`, the time in which one must come back when all have failed.
        """
        self._fleet, self._publisher, self._probe = fleet, publisher, probe
        self._server_dir, self._mark = server_dir or str(publisher.folder), mark
        self._deadline, self._recovery = deadline, recovery
        self._target: Target | None = None
        self._numbers: dict[str, int] = {}
        """Name of a version → its number."""
        self._given: dict[Server, Target] = {}
        """Server → what it was given and, as the probe has found, has."""
        fleet.on_return = self._on_return

    def push(self, params: Any, version: int) -> dict[str, float]:
        """Give all servers these parameters; returns what it took, as metrics `sync/…`.

        To be called from the main thread, by all processes together. Raises UserError, on all
        processes, when one is left without a server that has them, or when the probe finds a
        server's model to be another one.
        """
        start, name = time.monotonic(), f"{version}{self._mark}"
        self._numbers[name] = version
        published = self._publisher.publish(params, version)
        path = f"{self._server_dir.rstrip('/')}/{published.folder.name}"
        expected = None
        if self._probe:
            before = self._target.expected if self._target else None
            expected = self._probe.expect(params, name, before)
        target = Target(name, path, expected)
        self._fleet.run(self._aim(target)).result()
        hosts.gather(None)  # all know the version, of which they may get tokens from now on
        expecting = time.monotonic() - start - published.seconds
        addresses, metrics = hosts.from_first(lambda: self._give(target))
        if self._fleet.is_guest:
            self._fleet.run(self._follow(target, addresses)).result()
        with hosts.together():
            self._wait_ready()
        in_use = {server.version for server in self._fleet.servers()}
        self._publisher.collect({self._numbers[name] for name in in_use & self._numbers.keys()})
        metrics["sync/probe_seconds"] += expecting
        return metrics | {
            "sync/seconds": time.monotonic() - start,
            "sync/publish_seconds": published.seconds,
            "sync/gather_seconds": published.gather_seconds,
            "sync/write_seconds": published.write_seconds,
            "sync/bytes": float(published.bytes),
            "sync/gb_per_second": published.bytes / published.seconds / 1e9,
        }

    def _give(self, target: Target) -> tuple[list[str], dict[str, float]]:
        """The addresses of the servers that have the target now, and metrics.

        Raises UserError if the probe finds another model.
        """
        start = time.monotonic()
        updated, failed = self._fleet.run(self._update(target)).result()
        done = time.monotonic()
        findings, silent = self._fleet.run(self._ask(updated, target)).result()
        probed = time.monotonic()
        for finding in findings:
            if self._probe and self._probe.is_off(finding):
                raise UserError(self._probe.report(finding))
        return [server.address for server in updated if server not in silent], {
            "sync/update_seconds": done - start,
            "sync/probe_seconds": probed - done,
            "sync/servers_updated": float(len(updated)),
            "sync/servers_quarantined": float(len(failed) + len(silent)),
            **(self._probe.metrics(findings) if self._probe else {}),
        }

    def _wait_ready(self) -> None:
        """For a server to come back, if none is left."""
        try:
            self._fleet.wait_ready(self._recovery)
        except UserError as error:
            raise UserError(f"no rollout server could be given the new weights: {error}") from error

    # ---------------------------------------------------------------------------- on the loop

    async def _aim(self, target: Target) -> None:
        """From now on servers should have this; a guest gives them no work until it is told who
        does."""
        self._fleet.published(target.version)
        if self._fleet.is_guest:
            self._target = target
            for server in self._fleet.servers():
                server.paused = True

    async def _follow(self, target: Target, addresses: Collection[str]) -> None:
        """Go on with the servers that another process has given the target."""
        for server in self._fleet.servers():
            if server.address in addresses:
                server.version, self._given[server] = target.version, target
            elif server.state == "ready" and server.version != target.version:
                self._fleet.quarantine(server, f"was not given weights {target.version!r}")
            server.paused, server.heard = False, time.monotonic()
        self._fleet.queue.assign()

    async def _update(self, target: Target) -> tuple[list[Server], list[Server]]:
        """Those that have the target now, and those that failed."""
        self._target = target
        ready = [server for server in self._fleet.servers() if server.state == "ready"]
        return await self._each(ready, lambda server: self._switch(server, target))

    async def _ask(
        self, servers: Sequence[Server], target: Target
    ) -> tuple[list[Finding], list[Server]]:
        """What the probe finds, if there is one, and the servers that did not answer it."""
        probe, findings = self._probe, []

        async def ask(server: Server) -> None:
            if probe and target.expected:
                findings.append(await probe.ask(self._fleet, server, target.expected))
            self._given[server] = target

        _, silent = await self._each(servers, ask)
        return findings, silent

    async def _each(
        self, servers: Sequence[Server], do: Callable[[Server], Coroutine[Any, Any, None]]
    ) -> tuple[list[Server], list[Server]]:
        """All at once; (those that did it, those that failed and are quarantined now)."""

        async def one(server: Server) -> bool:
            try:
                await do(server)
            except TROUBLE as error:
                self._fleet.quarantine(server, f"at the update of weights: {refusal(error)}")
                return False
            return True

        done = await asyncio.gather(*map(one, servers))
        return (
            [server for server, good in zip(servers, done, strict=True) if good],
            [server for server, good in zip(servers, done, strict=True) if not good],
        )

    async def _on_return(self, server: Server) -> None:
        """Raises one of TROUBLE unless the server has the newest weights, whatever they are by
        then, and has them right."""
        while (target := self._target) and not self._has(server, target):
            if not self._fleet.is_guest:
                await self._switch(server, target)
            elif server.version != target.version:
                raise Unfit(f"has weights {server.version!r}, not yet {target.version!r}")
            if self._probe and target.expected:
                finding = await self._probe.ask(self._fleet, server, target.expected)
                if self._probe.is_off(finding):
                    raise Unfit(self._probe.report(finding))
            self._given[server] = target

    def _has(self, server: Server, target: Target) -> bool:
        """And was found to have it right: an earlier run may have had versions of this name."""
        return self._given.get(server) is target and server.version == target.version

    async def _switch(self, server: Server, target: Target) -> None:
        """From pause to continue. Raises one of TROUBLE; the fleet sees to it that a server which
        was left paused goes on, before it looks after its health."""
        async with asyncio.timeout(self._deadline):
            await self._post(server, "/pause_generation", {"mode": "retract"})
            await self._load(server, target)
            await self._post(server, "/continue_generation", {})

    async def _load(self, server: Server, target: Target) -> None:
        answer = await self._post(
            server,
            "/update_weights_from_disk",
            {"model_path": target.path, "weight_version": target.version, "flush_cache": True},
        )
        if not (isinstance(answer, dict) and answer.get("success")):
            raise ServerError(f"did not load {target.path}: {answer}")
        info = await self._fleet.get(server, "/model_info", timeout=self._deadline)
        found = info.get("weight_version") if isinstance(info, dict) else None
        if found != target.version:
            raise Unfit(f"has weights {found!r} after the update to {target.version!r}")

    async def _post(self, server: Server, path: str, body: dict[str, Any]) -> Any:
        return await self._fleet.post(server, path, body, timeout=self._deadline)
