"""The members of a fleet: start, watch and replace them, and hand over their servers.

A member that dies or does not answer is killed, so that it cannot answer later. Each of its servers
is restarted on its journal by the living member with the most free room. So its sessions continue
as after a restart: from the newest snapshot, the bins since, and the answers given.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ilqr_service import logs
from ilqr_service.fleet.health import Health
from ilqr_service.fleet.member import Measured, Place, Server, actor, end
from ilqr_service.fleet.placement import ServerLoad, cost, room
from ilqr_service.settings import ServiceSettings
from ilqr_vae.errors import ServiceError

_TICK_S = 0.05
_CALL_S, _START_S = 5.0, 300.0
_RUNS_S = 1.0
_AGAIN_S = 0.5
_COPIED_S = 30.0
_HOLDS_AGAIN_S = 60.0
"""After this time a member that could not write a copy is tried again."""


@dataclass(eq=False)
class Running:
    """A running member: its actor, a call that ends when it dies, its servers, measurements."""

    actor: Any
    lives: Any
    place: Place
    load: ServerLoad
    servers: dict[str, Server] = field(default_factory=dict[str, Server])
    newest: Measured | None = None
    measuring: Any = None
    asked: Any = None
    placed: deque[float] = field(default_factory=deque[float])
    quiet_since: float = field(default_factory=time.monotonic)
    holds_again: float = 0.0


@dataclass(eq=False)
class _Lost:
    """A server that no member runs: since when, and which member restarts it."""

    since: float
    heir: Running | None = None
    start: Any = None
    not_before: float = 0.0


@dataclass(eq=False)
class _Copy:
    """The copy of a server's journal: which member has it, and whether it was ever complete."""

    holder: Running
    in_step: bool = False


class Members:
    """Runs servers as Ray actors.

    Args:
        settings: settings of every server.
        root: folder of the journals, visible to every node.
        cpus, gpus: resources of each member.
        models: returns the files of all models by id, and the id that a server is to serve.
        health: detects servers that do not answer.
        taken_up: called with the name of a server once it runs again, or (False) if it never will.
        replicate: journals are on local disks and copied to a second node.

    Attributes:
        alive: living members.
        lost: servers that no member runs now.
        takeovers: servers that were taken over, and their seconds of downtime.
        down: by server, the seconds of its last downtime, and when that ended.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        root: Path,
        cpus: float,
        gpus: float,
        models: Callable[[str], tuple[dict[str, str], str]],
        health: Health,
        taken_up: Callable[[str, bool], None],
        replicate: bool = False,
    ) -> None:
        self._settings, self._root = settings, root
        self._cpus, self._gpus = cpus, gpus
        self._models, self._health, self._taken_up = models, health, taken_up
        self.lock = threading.RLock()
        self.alive: list[Running] = []
        self.lost: dict[str, _Lost] = {}
        self.takeovers: list[tuple[str, float]] = []
        self.down: dict[str, tuple[float, float]] = {}
        self.copies: dict[str, _Copy] = {}
        self._secret = secrets.token_bytes(32) if replicate else b""
        self._found, self._stop = threading.Condition(self.lock), threading.Event()
        root.mkdir(parents=True, exist_ok=True)
        folders = [] if replicate else root.iterdir()
        self.left = sorted(p.name for p in folders if p.is_dir())
        self._number = max((int(n) for n in self.left if n.isdigit()), default=0)
        self._thread = threading.Thread(target=self._watch, name="members", daemon=True)

    def __len__(self) -> int:
        return len(self.alive)

    @property
    def watched(self) -> bool:
        """Whether members are watched."""
        return self._thread.is_alive()

    @property
    def in_step(self) -> int:
        """Servers with a complete copy of their journal on a second node."""
        return sum(copy.in_step for copy in list(self.copies.values()))

    def watch(self) -> None:
        """Start to watch members."""
        self._thread.start()

    def stop(self) -> None:
        """Stop starting, replacing and waiting for members."""
        self._stop.set()

    def close(self) -> None:
        """Answer queued bins, end all sessions and members."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._health.close()
        self._let_go(self.alive)
        self._end(self.alive)
        self.alive = []

    def servers(self) -> list[Server]:
        """Servers that answer."""
        with self.lock:
            return [server for member in self.alive for server in member.servers.values()]

    def name(self) -> str:
        self._number += 1
        return f"{self._number:04d}"

    def _start(self, made: Any, name: str) -> Any:
        """Call a member to start a server on the journal of this name, with its last model."""
        return made.start.remote(name, *self._models(name))

    def grow(self, journals: list[list[str]]) -> None:
        """Start a member for each list of journals. Raises ServiceError."""
        import ray
        from ray.exceptions import RayError

        kind = actor(self._cpus, self._gpus)
        made = [kind.remote(self._settings, str(self._root), self._secret) for _ in journals]
        starts = [
            [one.place.remote(), *(self._start(one, name) for name in mine)]
            for one, mine in zip(made, journals, strict=True)
        ]
        calls = [call for mine in starts for call in mine]
        members: list[Running] = []
        try:
            limit = time.monotonic() + _START_S
            while ray.wait(calls, num_returns=len(calls), timeout=0.1)[1]:
                if self._stop.is_set() or time.monotonic() > limit:
                    raise ServiceError("--servers", expected="room for as many", got="none so far")
            for one, mine in zip(made, starts, strict=True):
                where, *servers = cast(Any, ray.get(mine))
                member = Running(one, one.lives.remote(), where, ServerLoad(self._cpus, 0.0, 0))
                member.servers = {server.name: server for server in servers}
                members.append(member)
        except (RayError, ServiceError) as error:
            for one in made:
                ray.kill(one)
            cause = getattr(error, "cause", None) or error
            if isinstance(cause, ServiceError):
                raise cause from error
            raise ServiceError(
                "--servers",
                expected=f"a cluster with room for {len(journals)} of {self._cpus:g} cores",
                got=str(error).splitlines()[0],
            ) from error
        with self.lock:
            self.alive += members

    def _let_go(self, members: list[Running]) -> None:
        """Stop copying journals, since servers and stores are about to end."""
        import ray

        names = [(member, name) for member in members for name in member.servers]
        if self._secret and names:
            calls = [member.actor.aim.remote(name, "") for member, name in names]
            ray.wait(calls, num_returns=len(calls), timeout=_CALL_S)

    def _end(self, members: list[Running]) -> None:
        import ray

        if calls := [member.actor.close.remote() for member in members]:
            _, late = ray.wait(
                calls, num_returns=len(calls), timeout=_CALL_S + self._settings.drain_s
            )
            if late:
                logs.warning("members did not end by themselves", members=len(late))
        for member in members:
            ray.kill(member.actor)

    def retire(self, member: Running) -> None:
        """Hand a member's servers over to others, and end it."""
        import ray
        from ray.exceptions import RayError

        with self._found:
            c = self.copies
            copied = self._found.wait_for(
                lambda: not self._secret or all(n in c and c[n].in_step for n in member.servers),
                _COPIED_S,
            )
            if not copied:
                raise ServiceError("--servers", expected="copies of its journals", got="none yet")
            self.alive.remove(member)
            names, member.servers = list(member.servers), {}
            self.lost |= {name: _Lost(time.monotonic(), not_before=float("inf")) for name in names}
        stops = [member.actor.stop.remote(name, leave=True) for name in names]
        try:
            ray.get(stops, timeout=_CALL_S + self._settings.drain_s)
        except RayError as error:
            logs.warning("a member did not hand over", error=str(error).splitlines()[0])
            ray.kill(member.actor)
        with self._found:
            for name in names:
                self.lost[name].not_before = 0.0
            self._found.wait_for(
                lambda: self._stop.is_set() or not self.lost.keys() & set(names), _START_S
            )
        self._end([member])

    # ---- what watches them ---------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.wait(_TICK_S):
            try:
                self._bury()
                self._take_up()
                if self._secret:
                    self._replicate()
            except ServiceError as error:  # no member could be started
                if not self._stop.is_set():
                    logs.warning("servers wait for a member", error=str(error))
            except Exception:
                logs.exception("the fleet goes on")

    def _bury(self) -> None:
        """Detect members that died or hang; kill those that hang."""
        import ray

        silent = self._health.look(self.servers())
        calls = {member.lives: member for member in list(self.alive)}
        ended = ray.wait(list(calls), num_returns=len(calls), timeout=0)[0] if calls else []
        for call, member in calls.items():
            quiet = [s for s in list(member.servers.values()) if s in silent]
            heard = [silent[s] for s in quiet]
            if call not in ended and (not quiet or self._out_of_reach(member, quiet)):
                continue
            with self.lock:
                if member not in self.alive:
                    continue  # retired
                self.alive.remove(member)
                since = min(heard, default=time.monotonic())
                self.lost |= {name: _Lost(since) for name in member.servers}
                for lost in self.lost.values():
                    if lost.heir is member:
                        lost.heir = lost.start = None
            end(member.actor, member.place)
            logs.warning("a member died", servers=", ".join(member.servers))

    def _out_of_reach(self, member: Running, quiet: list[Server]) -> bool:
        """Return whether servers never answered, but their process does: clients may reach it."""
        import ray

        if member.measuring is None or any(map(self._health.answered, quiet)):
            return False
        return bool(ray.wait([member.measuring], timeout=_RUNS_S)[0])

    def _take_up(self) -> None:
        """Restart the servers that no member runs, on the members with the most room."""
        import ray
        from ray.exceptions import RayError

        now = time.monotonic()
        for name, lost in list(self.lost.items()):
            if lost.start is None and now >= lost.not_before:
                if (heir := self._heir(name)) is None:
                    logs.error("a server is lost: no copy of its journal is in step", server=name)
                    with self._found:
                        del self.lost[name]
                        self._found.notify_all()
                    self._taken_up(name, False)
                    continue
                lost.heir, lost.start = heir, self._start(heir.actor, name)
            if lost.heir is None or not ray.wait([lost.start], timeout=0)[0]:
                continue
            try:
                server: Server = cast(Any, ray.get(cast(Any, lost.start)))
            except RayError as error:
                logs.warning("a server could not be taken up", server=name, error=str(error))
                lost.heir, lost.start, lost.not_before = None, None, now + _AGAIN_S
                continue
            ended = time.monotonic()
            down = ended - lost.since
            with self._found:
                self.down[name] = (down, ended)
                lost.heir.servers[name] = server
                del self.lost[name]
                self.copies.pop(name, None)
                self.takeovers.append((name, down))
                self._found.notify_all()
            self._taken_up(name, True)
            logs.info("server taken up", server=name, ingest=server.ingest, down_s=round(down, 2))

    def _heir(self, name: str) -> Running | None:
        """Return the member for a lost server: the one with its copy, else with the most room."""
        if self._secret:
            copy = self.copies.get(name)
            usable = copy is not None and copy.in_step and copy.holder in self.alive
            return copy.holder if copy is not None and usable else None
        if not self.alive:
            self.grow([[]])
        each = cost([member.load for member in self.alive])
        taking = [other.heir for other in self.lost.values()]
        return max(self.alive, key=lambda m: (-taking.count(m), room(m.load, each)))

    def _replicate(self) -> None:
        """Ensure that each server's journal is copied to a member on another node."""
        import ray
        from ray.exceptions import RayError

        with self.lock:
            pairs = [(member, name) for member in self.alive for name in member.servers]
            for member, name in pairs:
                copy = self.copies.get(name)
                if copy is not None and copy.holder in self.alive and copy.holder is not member:
                    continue
                holders = [copy.holder for copy in self.copies.values()]
                now = time.monotonic()
                others = [
                    other
                    for other in self.alive
                    if other.place.node != member.place.node and other.holds_again < now
                ]
                if others:
                    holder = min(others, key=holders.count)
                    self.copies[name] = _Copy(holder)
                    member.actor.aim.remote(name, holder.actor.hold.remote(name))
                elif self.copies.pop(name, None) is not None:
                    member.actor.aim.remote(name, "")  # it then waits for no copy
        for member in {member for member, name in pairs if not self._in_step(name)}:
            call, member.asked = member.asked, member.asked or member.actor.in_step.remote()
            if call is None or not ray.wait([call], timeout=0)[0]:
                continue
            member.asked = None
            with suppress(RayError):
                for name, store in cast(dict[str, str], ray.get(call)).items():
                    copy = self.copies.get(name)
                    if copy is not None and copy.holder.place.store == store:
                        with self._found:
                            copy.in_step = True
                            self._found.notify_all()

    def give_up_copies(self, holder: Running, names: Iterable[str]) -> None:
        """Copy journals elsewhere that this member cannot write; if nowhere, they have no copy."""
        with self.lock:
            for member in self.alive:
                for name in member.servers.keys() & set(names):
                    copy = self.copies.get(name)
                    if copy is None or copy.holder is not holder:
                        continue
                    logs.warning("a copy is given up, it cannot be written", server=name)
                    del self.copies[name]
                    holder.holds_again = time.monotonic() + _HOLDS_AGAIN_S
                    member.actor.aim.remote(name, "")
                    holder.actor.release.remote(name)

    def _in_step(self, name: str) -> bool:
        copy = self.copies.get(name)
        return copy is None or copy.in_step
