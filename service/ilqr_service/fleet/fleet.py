"""A fleet: members started, watched, replaced; sessions placed; sizes changed.

A member that dies is noticed by a call to it that never returns while it lives. Each of its servers
is then started again, on its journal, by the living member with the most free room. So a session
goes on as after a restart: from its newest snapshot and the bins since, with the answers it gave.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from ilqr_service import logs
from ilqr_service.fleet.gateway import Gateway
from ilqr_service.fleet.member import Measured, Server, actor
from ilqr_service.fleet.placement import Load, cost, place, room
from ilqr_service.settings import ServiceSettings
from ilqr_service.transport.http import Web
from ilqr_vae.errors import ProtocolError, ServiceError
from ilqr_vae.protocol.keys import ClientKey

_TICK_S, _MEASURE_S = 0.1, 1.0
_CALL_S, _START_S = 5.0, 300.0
_NEWS_S = 60.0
_FEWEST_ROOM = 0.25
_QUIET_S = 60.0


@dataclass(eq=False)
class _Member:
    """A member as the fleet knows it: its actor, its servers, what was measured."""

    actor: Any
    lives: Any
    load: Load
    servers: dict[str, Server] = field(default_factory=dict[str, Server])
    newest: Measured | None = None
    placed: deque[float] = field(default_factory=deque[float])
    quiet_since: float = field(default_factory=time.monotonic)


class Fleet:
    """Servers of one model on a Ray cluster that this process is connected to.

    Args:
        model: file that every node sees.
        settings: of every server; its addresses and ``http`` are the fleet's.
        root: folder of the journals, which every node sees; sessions left in it go on.
        fewest, most: members; between the two it follows the load.
        cpus, gpus: of each member; also its threads.
        key: to reach servers that have keys.
        host: address of their nodes that servers bind to; loopback without keys.

    Raises:
        ServiceError: the cluster has no room for ``fewest``, or an address cannot be bound.
    """

    def __init__(
        self,
        model: Path,
        settings: ServiceSettings,
        root: Path,
        *,
        fewest: int = 1,
        most: int = 0,
        cpus: float = 1.0,
        gpus: float = 0.0,
        key: ClientKey | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        from msgspec.structs import replace

        self._model, self._root = str(model.absolute()), root.absolute()
        self._cpus, self._gpus = cpus, gpus
        self.fewest, self.most = fewest, max(fewest, most)
        self._settings = replace(
            settings,
            ingest=f"tcp://{host}:*",
            results=f"tcp://{host}:*",
            http="",
            threads=settings.threads or max(1, int(cpus)),
            control_rate=1e9,  # the gateway asks for everybody
        )
        self._members: list[_Member] = []
        self._lost: dict[str, float] = {}
        self._down: dict[str, tuple[float, float]] = {}
        self.takeovers: list[tuple[str, float]] = []
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._number = 0
        self._root.mkdir(parents=True, exist_ok=True)
        left = sorted(p.name for p in self._root.iterdir() if p.is_dir())
        self._number = max((int(n) for n in left if n.isdigit()), default=0)
        self._grow(fewest, left)
        self.gateway = Gateway(
            settings,
            key,
            servers=self.servers,
            place=self._place,
            took_up=self._took_up,
            missing=lambda: bool(self._lost),
            rolled=self._rolled,
        )
        registry = CollectorRegistry()
        registry.register(cast(Any, self))
        self._web: Web | None = None
        try:
            if settings.http:
                self._web = Web(
                    settings.http,
                    registry,
                    healthy=lambda: self._thread.is_alive(),
                    ready=lambda: bool(self.servers()),
                )
        except ServiceError:
            self.gateway.close()
            self._end(self._members)
            raise
        self.http = "" if self._web is None else self._web.address
        self._thread = threading.Thread(target=self._watch, name="fleet", daemon=True)
        self.gateway.start()
        self._thread.start()

    def servers(self) -> list[Server]:
        """Those that answer."""
        with self._lock:
            return [server for member in self._members for server in member.servers.values()]

    def pids_on(self, node: str) -> list[int]:
        """Processes of the members on a node, by Ray's name of it."""
        import ray

        places = [cast(Any, ray.get(m.actor.place.remote())) for m in list(self._members)]
        return [pid for where, pid in places if where == node]

    def __len__(self) -> int:
        return len(self._members)

    def close(self) -> None:
        """Answer what is queued, end all sessions and members."""
        self._stop.set()
        self._thread.join()
        self.gateway.close()
        if self._web is not None:
            self._web.close()
        self._end(self._members)
        self._members = []

    def scale(self, count: int) -> None:
        """Have so many members from here on. Sessions of those that go live on with the others.

        Raises:
            ServiceError: the cluster has no room for as many.
        """
        self.fewest, self.most = count, max(count, self.most)
        if count > len(self._members):
            self._grow(count - len(self._members), [])
        while len(self._members) > max(1, count):
            self._retire(min(self._members, key=lambda m: m.load.sessions))

    # ---- members -------------------------------------------------------------------------------

    def _name(self) -> str:
        self._number += 1
        return f"{self._number:04d}"

    def _grow(self, count: int, journals: list[str]) -> None:
        """Start members, each with one of the journals that are there, or a new one."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        kind, begun = actor(self._cpus, self._gpus), list[tuple[_Member, list[Any]]]()
        try:
            for k in range(count):
                made = kind.remote(self._model, self._settings, str(self._root))
                mine = journals[k::count] or [self._name()]
                starts = [made.start.remote(name) for name in mine]
                begun.append((_Member(made, made.lives.remote(), Load(self._cpus, 0.0, 0)), starts))
            for member, starts in begun:
                started: list[Server] = cast(Any, ray.get(starts, timeout=_START_S))
                member.servers = {server.name: server for server in started}
        except (RayError, GetTimeoutError) as error:
            self._end([member for member, _ in begun])
            cause = getattr(error, "cause", None)
            if isinstance(cause, ServiceError):
                raise cause from error
            raise ServiceError(
                "--servers",
                expected=f"a cluster with room for {count} of {self._cpus:g} cores",
                got=str(error).splitlines()[0],
            ) from error
        with self._lock:
            self._members += [member for member, _ in begun]

    def _end(self, members: list[_Member]) -> None:
        import ray
        from ray.exceptions import RayError

        for member in members:
            try:
                ray.get(member.actor.close.remote(), timeout=_CALL_S + self._settings.drain_s)
            except RayError as error:
                logs.warning("a member did not end by itself", error=str(error).splitlines()[0])
            ray.kill(member.actor)

    def _retire(self, member: _Member) -> None:
        """Hand a member's servers to others, and end it."""
        import ray

        with self._lock:
            self._members.remove(member)
            names, member.servers = list(member.servers), {}
            self._lost |= dict.fromkeys(names, time.monotonic())
        for name in names:
            ray.get(member.actor.stop.remote(name, leave=True))
        self._take_up()
        self._end([member])

    def _take_up(self) -> None:
        """Start again the servers that nobody runs, on the members with the most room."""
        import ray
        from ray.exceptions import RayError

        for name, since in list(self._lost.items()):
            if not self._members:
                return
            each = cost([member.load for member in self._members])
            heir = max(self._members, key=lambda m: room(m.load, each))
            try:
                server: Server = cast(Any, ray.get(heir.actor.start.remote(name), timeout=_START_S))
            except RayError as error:
                logs.warning("a server could not be taken up", server=name, error=str(error))
                continue
            down = time.monotonic() - since
            with self._lock:
                heir.servers[name] = server
                del self._lost[name]
                self._down[name] = (down, time.monotonic())
                self.takeovers.append((name, down))
            logs.info("server taken up", server=name, ingest=server.ingest, down_s=round(down, 2))

    # ---- its thread ----------------------------------------------------------------------------

    def _watch(self) -> None:
        measured = 0.0
        while not self._stop.wait(_TICK_S):
            try:
                self._bury()
                if self._lost:
                    self._take_up()
                if time.monotonic() - measured > _MEASURE_S:
                    measured = time.monotonic()
                    self._measure()
                    self._follow()
            except Exception:
                logs.exception("the fleet's thread goes on")

    def _bury(self) -> None:
        """Notice members that died."""
        import ray

        calls = {member.lives: member for member in self._members}
        if not calls:
            return
        dead, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        with self._lock:
            for call in dead:
                member = calls[call]
                if member not in self._members:
                    continue  # retired
                self._members.remove(member)
                self._lost |= dict.fromkeys(member.servers, time.monotonic())
                logs.warning("a member died", servers=", ".join(member.servers))
        if dead and not self._members:
            self._grow(1, sorted(self._lost))
            self._lost.clear()

    def _measure(self) -> None:
        """What each member uses, and how many sessions it has."""
        import ray
        from ray.exceptions import RayError

        counts: dict[str, int] = {}
        for server, _ in self.gateway.infos():
            counts[server.name] = counts.get(server.name, 0) + 1
        for member in list(self._members):
            try:
                now: Measured = cast(Any, ray.get(member.actor.measured.remote(), timeout=_CALL_S))
            except RayError:
                continue
            before, member.newest = member.newest, now
            if before is None:
                continue
            busy = (now.cpu_s - before.cpu_s) / max(1e-3, now.at_s - before.at_s)
            sessions = sum(counts.get(name, 0) for name in member.servers)
            with self._lock:
                while member.placed and member.placed[0] < time.monotonic() - 2 * _MEASURE_S:
                    member.placed.popleft()
                member.load = Load(self._cpus, busy, sessions, min(sessions, len(member.placed)))
            if sessions:
                member.quiet_since = time.monotonic()

    def _follow(self) -> None:
        """Between ``fewest`` and ``most`` members: one more where there is little room, one less
        where one had no session for long."""
        loads = [member.load for member in self._members]
        if not loads:
            return
        each = cost(loads)
        free = sum(room(load, each) for load in loads) / sum(load.cores for load in loads)
        wanted = len(loads) < self.fewest or (free < _FEWEST_ROOM and len(loads) < self.most)
        if wanted and self._fits():
            try:
                self._grow(1, [])
            except ServiceError as error:
                logs.warning("no further member", error=str(error))
            return
        limit = time.monotonic() - _QUIET_S
        idle = [m for m in self._members if m.load.sessions == 0 and m.quiet_since < limit]
        if idle and len(loads) > self.fewest and free > 2 * _FEWEST_ROOM:
            self._retire(idle[0])

    def _fits(self) -> bool:
        """Whether the cluster has room for one more member now: else it would be waited for."""
        import ray

        free = ray.available_resources()
        return free.get("CPU", 0.0) >= self._cpus and free.get("GPU", 0.0) >= self._gpus

    # ---- for the gateway -----------------------------------------------------------------------

    def _place(self) -> Server:
        with self._lock:
            loads = [m.load for m in self._members]
            chosen = place(loads)
            if chosen is None:
                raise ProtocolError(
                    "session",
                    expected="room for one more",
                    got=f"{len(loads)} full servers",
                )
            member = self._members[chosen]
            member.placed.append(time.monotonic())
            load = member.load
            member.load = Load(load.cores, load.busy, load.sessions + 1, load.placed + 1)
            return min(member.servers.values(), key=lambda server: server.name)

    def _took_up(self, name: str) -> int:
        down, at = self._down.get(name, (0.0, 0.0))
        return round(down * 1e9) if time.monotonic() - at < _NEWS_S else 0

    def _rolled(self, path: str) -> None:
        self._model = str(Path(path).absolute())

    # ---- /metrics ------------------------------------------------------------------------------

    def collect(self) -> list[Metric]:
        """The fleet's own metrics, and those of every server with its name."""
        import ray
        from ray.exceptions import RayError

        members = list(self._members)
        sizes = {
            "members": (len(members), "members that live"),
            "servers": (len(self.servers()), "servers that answer"),
            "takeovers": (len(self.takeovers), "servers taken up since the fleet began"),
            "down_seconds": (sum(d for _, d in self.takeovers), "time that servers were down"),
            "busy_cores": (sum(m.load.busy for m in members), "cores that members use"),
        }
        found = {
            f"ilqr_fleet_{name}": cast(Metric, GaugeMetricFamily(f"ilqr_fleet_{name}", text, value))
            for name, (value, text) in sizes.items()
        }
        for member in members:
            try:
                pages: dict[str, bytes] = cast(
                    Any, ray.get(member.actor.metrics.remote(), timeout=_CALL_S)
                )
            except RayError:
                continue
            for name, page in pages.items():
                for family in text_string_to_metric_families(page.decode()):
                    kept = found.setdefault(
                        family.name, Metric(family.name, family.documentation, family.type)
                    )
                    for sample in family.samples:
                        labels = sample.labels | {"server": name}
                        kept.samples.append(sample._replace(labels=labels))
        return list(found.values())
