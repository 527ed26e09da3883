"""A change of model over a fleet: tried on every server, then made on one after the other.

To load a model, each server first takes it as the shadow of its slot: the file is read, checked
against what is served, and warmed up. Where one server refuses, the shadows are dropped and nothing
has changed. Only then each server swaps, and its sessions change over at their next bin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue

from msgspec.structs import replace

from ilqr_service.fleet.member import Server
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages

Ask = Callable[[Server, messages.Message], messages.ModelList]
Served = Callable[[str, messages.ModelList, str], None]


class Rolling:
    """Makes one change at a time, in a thread of its own.

    Args:
        ask: what one server answers to a message. Raises ProtocolError.
        servers: those that answer now.
        served: told what a server has from here on: its name, its list, and the path of the file
            that was loaded ("" where none was).
    """

    def __init__(self, ask: Ask, servers: Callable[[], list[Server]], served: Served) -> None:
        self._ask, self._servers, self._served = ask, servers, served
        self._done: SimpleQueue[tuple[bytes, messages.Message]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, owner: bytes, message: messages.Control) -> None:
        """Begin a change. Raises ProtocolError: another one is under way."""
        if self._thread is not None and self._thread.is_alive():
            raise ProtocolError("model", expected="one change at a time", got="another one")
        self._thread = threading.Thread(
            target=self._work, args=(owner, message), name="rolling", daemon=True
        )
        self._thread.start()

    def done(self) -> Iterator[tuple[bytes, messages.Message]]:
        """Replies to those whose change has ended."""
        while not self._done.empty():
            yield self._done.get()

    def _work(self, owner: bytes, message: messages.Control) -> None:
        try:
            reply: messages.Message = models_of(self._changed(message))
        except ProtocolError as error:
            reply = messages.Refused(field=error.field, expected=error.expected, got=error.got)
        self._done.put((owner, reply))

    def _changed(self, message: messages.Control) -> list[messages.ModelList]:
        if not isinstance(message, messages.Load):
            return self._each(lambda _: message)
        tried = self._try(replace(message, shadow=True))
        if message.shadow:
            return tried
        slot = message.slot or tried[0].models[0].slot
        model = _in(tried[0], slot, "shadow")

        def change(server: Server) -> messages.Control | None:
            listed = self._ask(server, messages.Models())
            if _in(listed, slot, "serving") == model:
                return None
            tried_here = _in(listed, slot, "shadow") == model  # not where it began meanwhile
            return messages.Swap(slot=slot) if tried_here else message

        return self._each(change, message.path)

    def _try(self, message: messages.Load) -> list[messages.ModelList]:
        """Load the shadow on every server that does not serve the model already."""
        tried: list[tuple[Server, messages.ModelList]] = []
        same: ProtocolError | None = None
        for server in self._servers():
            try:
                tried.append((server, self._ask(server, message)))
            except ProtocolError as error:
                if (error.field, error.expected) == ("model", "another than is served"):
                    same = error
                    continue
                for other, _ in tried:
                    with suppress(ProtocolError):
                        self._ask(other, messages.Rollback(slot=message.slot))
                raise _at(server, error, "nothing has changed") from error
        if not tried:
            raise same or ProtocolError("service", expected="ready", got="no server that answers")
        return [listed for _, listed in tried]

    def _each(
        self, change: Callable[[Server], messages.Control | None], path: str = ""
    ) -> list[messages.ModelList]:
        """Change one server after the other; the first that refuses ends it."""
        done: list[messages.ModelList] = []
        servers = self._servers()
        for server in servers:
            try:
                if (message := change(server)) is None:
                    continue
                done.append(self._ask(server, message))
            except ProtocolError as error:
                raise _at(server, error, f"{len(done)} of {len(servers)} changed") from error
            self._served(server.name, done[-1], path)
        return done


def _at(server: Server, error: ProtocolError, so_far: str) -> ProtocolError:
    got = f"{error.got} (server {server.name} at {server.ingest}; {so_far})"
    return ProtocolError(error.field, expected=error.expected, got=got)


def _in(listed: messages.ModelList, slot: str, role: str) -> str:
    """Id of the model that has a role in a slot; "" where none has."""
    return next((m.model for m in listed.models if (m.slot, m.role) == (slot, role)), "")


def models_of(lists: Iterable[messages.ModelList]) -> messages.ModelList:
    """The models of all servers, each once."""
    found = {(m.slot, m.model, m.role): m for listed in lists for m in listed.models}
    return messages.ModelList(models=tuple(found.values()))
