"""An ezmsg unit: counts of spikes in, decodes out.

>>> decoder = IlqrDecoder(IlqrSettings(endpoint="tcp://127.0.0.1:5555"))     # doctest: +SKIP

``INPUT_SIGNAL`` takes an ``AxisArray`` with the dimensions ``time`` and ``ch``, whose samples are
counts: bins of the model's width, or fractions of them, which are summed. ``OUTPUT_SIGNAL`` emits
    one for each answer, with the dimensions ``time`` (of size one) and ``ch``: the decoded values
    at the bin's time; ``attrs`` holds index, revision, status, standard deviations, latents and
    classes.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import field
from typing import Any

import ezmsg.core as ez
import numpy as np
from ezmsg.util.messages.axisarray import AxisArray

from ilqr_clients.answer import Answer
from ilqr_clients.bridges.core import Bridge, SourceBin
from ilqr_clients.bridges.stamps import MOST, SLACK_S, Gather
from ilqr_clients.session import Session
from ilqr_clients.spike_session import SpikeSession

GONE_S = 1.0
"""Seconds without an array after which the source counts as gone."""


class EzmsgBridge(Bridge):
    """Feeds a session with arrays.

    Attributes:
        arrays: queue of arrays to feed.
        put: called with each answer, and the time of its bin in seconds.
    """

    def __init__(self, endpoint: str, session: str, put: Any, **options: Any) -> None:
        super().__init__(endpoint, session, **options)
        self.arrays: queue.Queue[AxisArray] = queue.Queue()
        self._put = put
        self._gather, self._stamp_s = Gather(1), 0.0
        self._started, self._heard_s = False, 0.0

    def here(self, timeout: float) -> bool:
        return self._started or not self.arrays.empty()

    def spiking(self) -> bool:
        return False

    def pull(self) -> AxisArray | None:
        try:
            came = self.arrays.get(timeout=self.model.bin_width / 4)
        except queue.Empty:
            if self._started and time.monotonic() - self._heard_s > GONE_S:
                self._started = False
                self.say(f"the source is gone: nothing came for {GONE_S:g} s")
            return None
        self._heard_s = time.monotonic()
        if not self._started:
            self._started, self._gather = True, Gather(self._gather.parts)
            self.say("the source is there")
            self.began()
        return came

    def hand_on(self, came: AxisArray) -> None:
        axis: Any = came.axes.get("time")
        if "time" not in came.dims or len(came.dims) != 2 or not getattr(axis, "gain", 0.0) > 0:
            self.unusable(f"an array of {came.dims}; expected time and ch, time with a gain")
            return
        data = np.asarray(came.data)
        if data.dtype.kind not in "biuf" or not abs(axis.offset / axis.gain) < MOST:
            self.unusable(f"an array of {data.dtype} from {axis.offset} s; expected finite numbers")
            return
        parts = self.model.bin_width / axis.gain
        if round(parts) < 1 or abs(parts - round(parts)) > 1e-6:
            self.unusable(f"samples of {axis.gain:g} s; a bin has {self.model.bin_width:g} s")
            return
        if self._gather.parts != round(parts):
            self._gather = Gather(round(parts))
        values = np.moveaxis(data.astype(np.float64), came.dims.index("time"), 0)
        self.count_channels(values.shape[1])
        labels = [str(label) for label in getattr(came.axes.get("ch"), "data", ())]
        columns, now = self.columns(labels, values.shape[1]), self.clock.now_ns()
        for k, row in enumerate(values):
            stamp = axis.offset + k * axis.gain
            if stamp < self._stamp_s - SLACK_S:  # its clock was set back: numbers repeat
                self._gather = Gather(self._gather.parts)
            self._stamp_s, repeated = stamp, self._gather.repeated
            gathered = self._gather.add(round(stamp / axis.gain), row)
            self.tally["repeated"] += self._gather.repeated - repeated
            if gathered is not None:
                self.send_bin(SourceBin(gathered[1][columns], stamp, now))

    def answer(self, session: Session | SpikeSession, answer: Answer) -> None:
        index, at = self.newest
        self._put(answer, at + (answer.index - index) * self.model.bin_width)


class IlqrSettings(ez.Settings):
    """Settings of the unit.

    Attributes:
        endpoint: the service's address.
        session: the session's name.
        options: options of ``ServiceClient.open``.
    """

    endpoint: str = "tcp://127.0.0.1:5555"
    session: str = "ezmsg"
    options: dict[str, Any] = field(default_factory=dict[str, Any])


class IlqrState(ez.State):
    """The bridge and its thread."""

    bridge: EzmsgBridge
    answers: asyncio.Queue[tuple[Answer, float]]
    stop: threading.Event
    thread: threading.Thread


class IlqrDecoder(ez.Unit):
    """Decodes its input by a running service."""

    SETTINGS = IlqrSettings
    STATE = IlqrState
    INPUT_SIGNAL = ez.InputStream(AxisArray)
    OUTPUT_SIGNAL = ez.OutputStream(AxisArray)

    async def initialize(self) -> None:
        """Connect to the service. Raises ServiceError if it is not reachable."""
        state: Any = self.STATE
        settings: Any = self.SETTINGS
        loop = asyncio.get_running_loop()
        state.answers, state.stop = asyncio.Queue(), threading.Event()

        def put(answer: Answer, at: float) -> None:
            loop.call_soon_threadsafe(state.answers.put_nowait, (answer, at))

        say = ez.logger.info
        state.bridge = EzmsgBridge(
            settings.endpoint, settings.session, put, say=say, **settings.options
        )
        state.thread = threading.Thread(target=state.bridge.run, args=(state.stop,), daemon=True)
        state.thread.start()

    async def shutdown(self) -> None:
        """End the session."""
        state: Any = self.STATE
        if hasattr(state, "thread"):
            state.stop.set()
            await asyncio.to_thread(state.thread.join)
            state.bridge.close()

    @ez.subscriber(INPUT_SIGNAL)
    async def take(self, message: AxisArray) -> None:
        """Feed an array."""
        state: Any = self.STATE
        state.bridge.arrays.put(message)

    @ez.publisher(OUTPUT_SIGNAL)
    async def give(self) -> AsyncGenerator[Any]:
        """Emit each answer as an array."""
        state: Any = self.STATE
        names = list(state.bridge.model.kinematic_names)
        width = state.bridge.model.bin_width
        while True:
            answer, at = await state.answers.get()
            yield (
                self.OUTPUT_SIGNAL,
                AxisArray(
                    answer.kinematics[None],
                    dims=["time", "ch"],
                    axes={
                        "time": AxisArray.LinearAxis(unit="s", gain=width, offset=at),
                        "ch": AxisArray.CoordinateAxis(np.array(names), dims=["ch"]),
                    },
                    attrs={
                        "index": answer.index,
                        "revision": answer.revision,
                        "status": answer.status,
                        "kinematics_std": answer.kinematics_std,
                        "latent": answer.latent,
                        "latent_std": answer.latent_std,
                        "classes": answer.classes,
                        "class_name": answer.class_name,
                    },
                ),
            )
