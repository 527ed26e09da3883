"""A change of model in a fleet: tried on all servers, then applied to one after the other.

To load a model, each server first loads it as the shadow of its slot: the file is read, checked
against the served model, and warmed up. If one server refuses, the shadows are dropped and nothing
has changed. Only then does each server swap, and its sessions switch at their next bin. If a server
refuses to swap, those before it roll back; the refusal says so, or which server serves which model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from queue import SimpleQueue

from msgspec.structs import replace

from ilqr_service.fleet.member import Server
from ilqr_vae.errors import ProtocolError
from ilqr_vae.protocol import messages

Ask = Callable[[Server, messages.Message], messages.ModelList]
Served = Callable[[str, messages.ModelList, str], None]


class Rolling:
    """Applies one change at a time, in its own thread.

    Args:
        ask: sends a message to a server and returns the reply. Raises ProtocolError.
        servers: returns the servers that answer.
        served: called after a change with the server's name, its list of models, and the path of
            the loaded file ("" if none).
        size: lock held during a change, so that no server is added with the old model.
    """

    def __init__(
        self,
        ask: Ask,
        servers: Callable[[], list[Server]],
        served: Served,
        size: AbstractContextManager[object] | None = None,
    ) -> None:
        self._ask, self._servers, self._served = ask, servers, served
        self._size = size or nullcontext()
        self._done: SimpleQueue[tuple[bytes, messages.Message]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, owner: bytes, message: messages.Control) -> None:
        """Start a change. Raises ProtocolError if another one is in progress."""
        if self._thread is not None and self._thread.is_alive():
            raise ProtocolError("model", expected="one change at a time", got="another one")
        self._thread = threading.Thread(
            target=self._work, args=(owner, message), name="rolling", daemon=True
        )
        self._thread.start()

    def done(self) -> Iterator[tuple[bytes, messages.Message]]:
        """Return the replies for changes that have ended."""
        while not self._done.empty():
            yield self._done.get()

    def _work(self, owner: bytes, message: messages.Control) -> None:
        try:
            with self._size:
                reply: messages.Message = models_of(self.changed(message))
        except ProtocolError as error:
            reply = messages.Refused(field=error.field, expected=error.expected, got=error.got)
        self._done.put((owner, reply))

    def changed(self, message: messages.Control) -> list[messages.ModelList]:
        """Make a change. Returns the models of each server that was changed.

        Raises:
            ProtocolError: a server refused; the text says what is served now.
        """
        if not isinstance(message, messages.Load):
            return self._each(message.slot, lambda *_: message)
        tried = self._try(replace(message, shadow=True))
        if message.shadow:
            return tried
        slot = message.slot or tried[0].models[0].slot
        model = _in(tried[0], slot, "shadow")

        def change(server: Server, listed: messages.ModelList) -> messages.Control | None:
            if _in(listed, slot, "serving") == model:
                return None
            if _in(listed, slot, "shadow") != model:  # it was not there yet, or lost it since
                self._ask(server, replace(message, shadow=True))
            return messages.Swap(slot=slot)

        return self._each(slot, change, message.path, shadow=model)

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
        self,
        slot: str,
        change: Callable[[Server, messages.ModelList], messages.Control | None],
        path: str = "",
        shadow: str = "",
    ) -> list[messages.ModelList]:
        """Change one server after the other; the first that refuses ends it, and the others go
        back. ``shadow`` is what was loaded for this change, and goes where it fails."""
        done: list[messages.ModelList] = []
        before: dict[str, str] = {}
        for server in self._servers():
            try:
                listed = self._ask(server, messages.Models())
                before[server.name] = _in(listed, slot, "serving")
                if (message := change(server, listed)) is None:
                    continue
                done.append(self._ask(server, message))
            except ProtocolError as error:
                raise _at(server, error, self._back(slot, before, shadow)) from error
            self._served(server.name, done[-1], path)
        return done

    def _back(self, slot: str, before: dict[str, str], shadow: str) -> str:
        """Have servers serve what they did before. Returns what is served now."""
        now: dict[str, str] = {}
        for server in self._servers():
            with suppress(ProtocolError):
                listed = self._ask(server, messages.Models())
                if shadow and _in(listed, slot, "shadow") == shadow:
                    listed = self._ask(server, messages.Rollback(slot=slot))
                serving = _in(listed, slot, "serving")
                if serving != before.get(server.name, serving):
                    listed = self._ask(server, messages.Rollback(slot=slot))
                    self._served(server.name, listed, "")
                now[server.name] = _in(listed, slot, "serving")
        if all(now.get(name) == model for name, model in before.items()):
            return "every server serves what it did before"
        silent = [f"{name} does not answer" for name in sorted(before.keys() - now.keys())]
        return "now " + ", ".join([*(f"{n} serves {model}" for n, model in now.items()), *silent])


def _at(server: Server, error: ProtocolError, so_far: str) -> ProtocolError:
    got = f"{error.got} (server {server.name} at {server.ingest}; {so_far})"
    return ProtocolError(error.field, expected=error.expected, got=got)


def _in(listed: messages.ModelList, slot: str, role: str) -> str:
    """Id of the model that has a role in a slot; "" where none has, and "" is the first slot."""
    slot = slot or listed.models[0].slot
    return next((m.model for m in listed.models if (m.slot, m.role) == (slot, role)), "")


def models_of(lists: Iterable[messages.ModelList]) -> messages.ModelList:
    """Return the models of all servers, each once."""
    found = {(m.slot, m.model, m.role): m for listed in lists for m in listed.models}
    return messages.ModelList(models=tuple(found.values()))
