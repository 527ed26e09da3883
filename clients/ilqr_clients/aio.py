"""The SDK for asyncio: the same objects, each run by its own thread.

>>> async with AsyncServiceClient("tcp://127.0.0.1:5555") as service:  # doctest: +SKIP
...     async with await service.open("rat-7", units=names, bin_width=0.05) as session:
...         answer = await session.step(0, counts, timeout=1.0)

Each method awaits that of ``ServiceClient``, ``Session`` or ``Listener``, with the same arguments,
results and exceptions. Calls on one object run one after another. A cancelled call still runs until
its timeout, and the next one waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from ilqr_clients.answer import Answer
from ilqr_clients.listener import Listener
from ilqr_clients.sdk import ServiceClient
from ilqr_clients.session import Session
from ilqr_vae.errors import SessionEnd, SessionEndedError

T = TypeVar("T", ServiceClient, Session, Listener)
S = TypeVar("S", ServiceClient, Session, Listener)
P = ParamSpec("P")
R = TypeVar("R")

_TURN_S = 0.25


def _awaited(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[_Threaded[S], P], Coroutine[Any, Any, R]]:
    """Wrap a method of the synchronous object to run in its thread."""

    @wraps(method)
    async def call(self: _Threaded[S], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.run(method, *args, **kwargs)

    return call


class _Threaded(Generic[T]):
    """A synchronous object and its thread; an asynchronous context manager that calls ``close``.

    Attributes:
        sync: the synchronous object. Its attributes may be read; only the thread may call its
            methods.
    """

    sync: T

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=type(self).__name__)

    async def run(
        self, method: Callable[Concatenate[T, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run ``method(sync, ...)`` in the thread."""
        call = partial(method, self.sync, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def close(self) -> None:
        """Close the synchronous object and end the thread."""
        try:
            await asyncio.shield(self.run(lambda sync: sync.close()))
        finally:
            self._thread.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncSession(_Threaded[Session]):
    """The asynchronous ``Session``, created by ``AsyncServiceClient.open``.

    Its ``on_error`` is called in the thread of the session.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.sync = session

    send = _awaited(Session.send)
    receive = _awaited(Session.receive)
    step = _awaited(Session.step)


class AsyncListener(_Threaded[Listener]):
    """The asynchronous ``Listener``, created by ``AsyncServiceClient.listen``.

    ``async for`` yields each answer until the feeder closes the session.
    """

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.sync = listener

    receive = _awaited(Listener.receive)

    async def __aiter__(self) -> AsyncIterator[Answer]:
        while True:
            try:
                for answer in await self.receive(_TURN_S):
                    yield answer
            except SessionEndedError as ended:
                if ended.end is SessionEnd.CLOSED:
                    return
                raise


class AsyncServiceClient(_Threaded[ServiceClient]):
    """The asynchronous ``ServiceClient``, with the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.sync = ServiceClient(*args, **kwargs)

    describe = _awaited(ServiceClient.describe)
    sessions = _awaited(ServiceClient.sessions)
    models = _awaited(ServiceClient.models)
    load = _awaited(ServiceClient.load)
    swap = _awaited(ServiceClient.swap)
    roll_back = _awaited(ServiceClient.roll_back)
    clock = _awaited(ServiceClient.clock)
    _open = _awaited(ServiceClient.open)
    _listen = _awaited(ServiceClient.listen)

    async def open(self, *args: Any, **kwargs: Any) -> AsyncSession:
        """As ``ServiceClient.open``."""
        return AsyncSession(await self._open(*args, **kwargs))

    async def listen(self, *args: Any, **kwargs: Any) -> AsyncListener:
        """As ``ServiceClient.listen``."""
        return AsyncListener(await self._listen(*args, **kwargs))
