"""A fleet: places sessions on members, scales with the load, and collects all metrics.

Clients of a server that was taken over are sent its new address as soon as it runs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from ilqr_service import logs
from ilqr_service.fleet import PATIENCE_S
from ilqr_service.fleet.gateway import Gateway
from ilqr_service.fleet.health import Health
from ilqr_service.fleet.member import Measured, Place, Server
from ilqr_service.fleet.members import Members, Running
from ilqr_service.fleet.placement import Busy, ServerLoad, change, place
from ilqr_service.settings import ServiceSettings
from ilqr_service.transport.http import Web
from ilqr_vae.artifact import read_manifest
from ilqr_vae.errors import ProtocolError, ServiceError, number_of
from ilqr_vae.protocol import messages
from ilqr_vae.protocol.keys import ClientKey

_MEASURE_S, _CALL_S = 1.0, 5.0
_NEWS_S = 60.0
_QUIET_S = 60.0


class Fleet:
    """Servers of one model on the Ray cluster to which this process is connected.

    Args:
        model: model file, visible to every node.
        settings: settings of every server; the addresses and ``http`` are those of the fleet.
        root: folder of the journals, visible to every node; open sessions in it are resumed.
        replicate: ``root`` is local to each node, and journals are copied to a second node.
        fewest, most: limits of the number of members, which follows the load.
        cpus, gpus: resources of each member; ``cpus`` is also its number of threads.
        key: key for access to servers that require keys.
        host: address that servers bind to on their node; loopback without keys.
        patience: seconds without a reply after which a server counts as dead.

    Raises:
        ArtifactError: the model file could not be read.
        ServiceError: the cluster has no room for ``fewest`` members, or an address could not be
            bound.
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
        patience: float = PATIENCE_S,
        replicate: bool = False,
    ) -> None:
        from msgspec.structs import replace

        self._cpus, self._gpus = cpus, gpus
        self.fewest, self.most = fewest, max(fewest, most)
        folder = Path(settings.models or model.absolute().parent).resolve()
        self._settings = replace(
            settings,
            ingest=f"tcp://{host}:*",
            results=f"tcp://{host}:*",
            http="",
            # a member that uses no GPU may run on a node that has one
            device="cpu" if settings.device == "auto" and not gpus else settings.device,
            threads=settings.threads or max(1, int(cpus)),
            control_rate=1e9,  # the gateway enforces the limit for all senders
            models=str(folder),
        )
        self._model = read_manifest(model).model_id
        self._paths = {self._model: str(model.absolute())}
        self._serving: dict[str, str] = {}
        self._sizing, self._stop = threading.RLock(), threading.Event()
        self._turned_away = self._growing = False
        self._busy = Busy()
        self._members = Members(
            self._settings,
            root.absolute(),
            cpus,
            gpus,
            models=lambda name: (dict(self._paths), self._serving.get(name, self._model)),
            health=Health(key, patience),
            taken_up=self._taken_up,
            replicate=replicate,
        )
        left = self._members.left
        self._members.grow([left[k::fewest] or [self._members.name()] for k in range(fewest)])
        self.gateway = Gateway(
            settings,
            key,
            servers=self.servers,
            place=self._place,
            took_up=self._took_up,
            missing=lambda: bool(self._members.lost),
            served=self._served,
            size=self._sizing,
        )
        registry = CollectorRegistry()
        registry.register(cast(Any, self))
        self._web: Web | None = None
        try:
            if settings.http:
                self._web = Web(
                    settings.http,
                    registry,
                    healthy=lambda: self._members.watched and self._thread.is_alive(),
                    ready=lambda: bool(self.servers()),
                )
        except ServiceError:
            self.gateway.close()
            self._members.close()
            raise
        self.http = "" if self._web is None else self._web.address
        self._thread = threading.Thread(target=self._follow, name="fleet", daemon=True)
        self.gateway.start()
        self._members.watch()
        self._thread.start()

    @property
    def takeovers(self) -> list[tuple[str, float]]:
        """Servers that were taken over, and their seconds of downtime."""
        return list(self._members.takeovers)

    @property
    def copies(self) -> int:
        """Servers with a complete copy of their journal on a second node."""
        return self._members.in_step

    @property
    def busy(self) -> float:
        """Cores that members use, as measured last."""
        return sum(member.load.busy for member in list(self._members.alive))

    def servers(self) -> list[Server]:
        """Servers that answer."""
        return self._members.servers()

    def places(self) -> list[tuple[Place, list[str]]]:
        """Return where each member runs, and the names of its servers."""
        with self._members.lock:
            return [(member.place, sorted(member.servers)) for member in self._members.alive]

    def __len__(self) -> int:
        return len(self._members)

    def close(self) -> None:
        """Answer queued bins, end all sessions and members. A second call has no effect."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._members.stop()
        self._thread.join()
        self.gateway.close()
        if self._web is not None:
            self._web.close()
        self._members.close()

    def scale(self, count: int) -> None:
        """Set the number of members. Sessions of removed members continue on others.

        Raises:
            ServiceError: the cluster has no room for that many.
        """
        with self._sizing:
            self.fewest, self.most = count, max(count, self.most)
            if count > len(self._members):
                more = count - len(self._members)
                self._members.grow([[self._members.name()] for _ in range(more)])
            while len(self._members) > max(1, count):
                self._members.retire(min(self._members.alive, key=lambda m: m.load.sessions))

    # ---- what follows their load ---------------------------------------------------------------

    def _follow(self) -> None:
        while not self._stop.wait(_MEASURE_S):
            try:
                self._measure()
                with self._sizing:
                    self._resize()
            except ServiceError as error:
                logs.warning("no further member", error=str(error))
            except Exception:
                logs.exception("the fleet goes on")

    def _measure(self) -> None:
        """Measure what each member uses, and count its sessions."""
        import ray
        from ray.exceptions import RayError

        counts = Counter(server.name for server, _ in self.gateway.infos())
        for member in list(self._members.alive):
            call, member.measuring = member.measuring, member.actor.measured.remote()
            if call is None:
                continue
            if not ray.wait([call], timeout=0)[0]:
                member.measuring = call
                continue
            try:
                now: Measured = cast(Any, ray.get(call))
            except RayError:
                continue
            self._members.give_up_copies(member, now.failing)
            before, member.newest = member.newest, now
            if before is None or before.at_s == now.at_s:
                continue
            busy = (now.cpu_s - before.cpu_s) / max(1e-3, now.at_s - before.at_s)
            sessions = sum(counts[name] for name in list(member.servers))
            with self._members.lock:
                # the measurement is as old as the call
                while member.placed and member.placed[0] < time.monotonic() - 3 * _MEASURE_S:
                    member.placed.popleft()
                member.load = ServerLoad(
                    self._cpus, busy, sessions, min(sessions, len(member.placed))
                )
            if sessions:
                member.quiet_since = time.monotonic()
        with self._members.lock:
            loads = [member.load for member in self._with_room(counts)]
            self._busy.lasts(loads, time.monotonic())

    def _resize(self) -> None:
        """Between ``fewest`` and ``most`` members: one more where there is little room or one was
        turned away, one less where one had no session for long."""
        members = list(self._members.alive)
        wanted = change([member.load for member in members], self.fewest, self.most)
        turned_away, self._turned_away = self._turned_away, False
        if wanted > 0 or (turned_away and 0 < len(members) < self.most):
            if self._fits():
                self._growing = True
                try:
                    self._members.grow([[self._members.name()]])
                finally:
                    self._growing = False
            return
        limit = time.monotonic() - _QUIET_S
        idle = [m for m in members if m.load.sessions == 0 and m.quiet_since < limit]
        if idle and wanted < 0:
            self._members.retire(idle[0])

    def _fits(self) -> bool:
        """Return whether a member would fit now; otherwise starting one would block."""
        import ray

        free = ray.available_resources()
        return free.get("CPU", 0.0) >= self._cpus and free.get("GPU", 0.0) >= self._gpus

    # ---- for the gateway -----------------------------------------------------------------------

    def _with_room(self, sessions: Counter[str]) -> list[Running]:
        """Members with a server below ``max_sessions``, where each has so many by its name."""
        most = self._settings.max_sessions
        return [
            member
            for member in self._members.alive
            if any(sessions[name] < most for name in member.servers)
        ]

    def _place(self, sessions: Counter[str]) -> Server:
        """The server for a new session, where each has so many by its name."""
        with self._members.lock:
            members = self._with_room(sessions)
            loads = [member.load for member in members]
            chosen = place(loads)
            if chosen is None:
                self._turned_away = True
                count = len(self.servers())
                if self._growing or (len(self._members) < self.most and self._fits()):
                    got = f"{number_of(count, 'full server')}, one more is started"
                    raise ProtocolError("service", expected="ready", got=got)
                if members and not self._busy.lasts(loads, time.monotonic()):
                    got = number_of(count, "busy server")
                    raise ProtocolError("service", expected="ready", got=got)
                raise ProtocolError(
                    "session", expected="room for one more", got=number_of(count, "full server")
                )
            member = members[chosen]
            member.placed.append(time.monotonic())
            load = member.load
            member.load = ServerLoad(load.cores, load.busy, load.sessions + 1, load.placed + 1)
            return min(member.servers.values(), key=lambda server: sessions[server.name])

    def _taken_up(self, name: str, there: bool) -> None:
        """Redirect the clients of a server."""
        if not there:
            self.gateway.forget(name)
            return
        self.gateway.announce(name)

    def _took_up(self, name: str) -> int:
        down, at = self._members.down.get(name, (0.0, 0.0))
        return round(down * 1e9) if time.monotonic() - at < _NEWS_S else 0

    def _served(self, name: str, listed: messages.ModelList, path: str) -> None:
        """Record a change of model, for servers that are taken over later."""
        with self._members.lock:
            for info in listed.models:
                if path and info.role in ("serving", "shadow"):
                    found = (Path(self._settings.models) / path).resolve()
                    self._paths.setdefault(info.model, str(found))
            first = listed.models[0]  # the model of the first slot
            self._serving[name] = first.model
            if {self._serving.get(s.name, self._model) for s in self.servers()} == {first.model}:
                self._model = first.model

    # ---- /metrics ------------------------------------------------------------------------------

    def collect(self) -> list[Metric]:
        """Yield the metrics of the fleet, and those of each server labelled by its name."""
        import ray
        from ray.exceptions import RayError

        members = list(self._members.alive)
        sizes = {
            "members": (len(members), "members that live"),
            "servers": (len(self.servers()), "servers that answer"),
            "copies": (self.copies, "servers whose journal has a copy on a second node"),
            "takeovers": (len(self.takeovers), "servers taken up since the fleet began"),
            "down_seconds": (sum(d for _, d in self.takeovers), "time that servers were down"),
            "busy_cores": (self.busy, "cores that members use"),
        }
        found = {
            f"ilqr_fleet_{name}": cast(Metric, GaugeMetricFamily(f"ilqr_fleet_{name}", text, value))
            for name, (value, text) in sizes.items()
        }
        calls = [member.actor.metrics.remote() for member in members]
        answered = ray.wait(calls, num_returns=len(calls), timeout=_CALL_S)[0] if calls else []
        for call in answered:
            try:
                pages: dict[str, bytes] = cast(Any, ray.get(call))
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
