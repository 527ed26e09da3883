"""A load generator that takes as little of a core as it can, in a process of its own.

What is sent is encoded before the first send, what comes is only stamped, and decoded after the
last: it shares the cores with the service that it loads. Open-loop: send times are fixed
beforehand, each stream begins at a time of its own, drawn once, and latency counts from the
intended send.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from ilqr_vae.protocol import messages

WAIT_S = 10.0
"""For answers after the last send, and for sessions to open."""

_POLLIN = int(zmq.POLLIN)  # zmq's own constants are enums, whose arithmetic is slow


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent.

    Attributes:
        ingest, results: where to and where from.
        streams: sessions, each fed a bin every ``interval_ns``.
        bins: of each; the first ``warm`` of them are not measured.
        rate: mean spikes per unit and bin.
        pid: of the process that is loaded, to see what it takes; 0 is none.
    """

    ingest: str
    results: str
    streams: int
    bins: int
    warm: int
    interval_ns: int
    bin_width_ns: int
    units: tuple[str, ...]
    rate: float
    pid: int = 0


class Fed(msgspec.Struct, frozen=True, kw_only=True):
    """Results of the bins that were measured; times in nanoseconds of the machine's clock.

    Attributes:
        intended: when each bin with an answer was to be sent.
        sent, arrived: when it was, and when its first answer was here.
        received, solve_start, solve_end, published: the answer's own stamps.
        statuses: of the answers; ``unanswered`` where none came, ``refused`` of those.
        seconds: from the first of them to the last answer.
        cpu_us: that the loaded process took for each, None where the system does not tell;
            ``own_cpu_us`` that this one took.
    """

    intended: list[int]
    sent: list[int]
    arrived: list[int]
    received: list[int]
    solve_start: list[int]
    solve_end: list[int]
    published: list[int]
    statuses: dict[str, int]
    unanswered: int
    refused: dict[str, int]
    seconds: float
    cpu_us: float | None
    own_cpu_us: float


Came = list[tuple[int, bytes]]


class _Sockets:
    """A feeder's two sockets, and what has come on them: when, and the message."""

    def __init__(self, context: zmq.Context[Any], plan: Plan) -> None:
        self.dealer, self.sub = context.socket(zmq.DEALER), context.socket(zmq.SUB)
        for socket, address in ((self.dealer, plan.ingest), (self.sub, plan.results)):
            socket.sndhwm = socket.rcvhwm = 0
            socket.connect(address)
        self._doors = [int(s.getsockopt(zmq.FD)) for s in (self.dealer, self.sub)]
        self.replies: Came = []
        self.published: Came = []

    def take(self) -> None:
        """All that has come, stamped."""
        while int(self.sub.getsockopt(zmq.EVENTS)) & _POLLIN:
            self.sub.recv()  # the topic
            self.published.append((time.monotonic_ns(), self.sub.recv()))
        while int(self.dealer.getsockopt(zmq.EVENTS)) & _POLLIN:
            self.replies.append((time.monotonic_ns(), self.dealer.recv()))

    def wait(self, seconds: float) -> None:
        """Until something comes, where all that had come was taken."""
        select.select(self._doors, [], [], max(0.0, seconds))


def _name(stream: int) -> str:
    return f"{os.getpid()}-{stream}"  # those of a feeder before may not have ended yet


def _schedule(plan: Plan) -> list[tuple[int, int, int]]:
    """(nanoseconds from the start, stream, index), in order of time."""
    begins = np.random.default_rng(0).integers(0, plan.interval_ns, plan.streams)
    return sorted(
        (int(begin) + index * plan.interval_ns, stream, index)
        for stream, begin in enumerate(begins)
        for index in range(plan.bins)
    )


def _frames(plan: Plan, schedule: list[tuple[int, int, int]], began: int) -> list[bytes]:
    """The bins as they are sent."""
    rng = np.random.default_rng(1)
    drawn = [messages.pack(rng.poisson(plan.rate, len(plan.units)), "<u2") for _ in range(500)]
    same = messages.Offset(0, 0)
    return [
        messages.encode(
            messages.Bin(
                session=_name(stream),
                index=index,
                source_ns=began + at,
                counts=drawn[(7 * stream + index) % len(drawn)],
                clock=same,
            )
        )
        for at, stream, index in schedule
    ]


def _open(plan: Plan, sockets: _Sockets) -> None:
    """Subscribe and open. Raises RuntimeError: a session was refused or nothing came."""
    for stream in range(plan.streams):
        sockets.sub.setsockopt(zmq.SUBSCRIBE, messages.topic(_name(stream)))
        request = messages.Open(
            protocol=messages.PROTOCOL,
            session=_name(stream),
            units=plan.units,
            bin_width_ns=plan.bin_width_ns,
            deadline_ns=plan.bin_width_ns,
        )
        sockets.dealer.send(messages.encode(request))
    opened: set[str] = set()
    seen: set[str] = set()
    end = time.monotonic() + WAIT_S
    while not len(opened) == len(seen) == plan.streams:
        sockets.take()
        replies = [messages.decode_downstream(frame) for _, frame in sockets.replies]
        refused = [reply for reply in replies if isinstance(reply, messages.Refused)]
        if refused or time.monotonic() > end:
            raise RuntimeError(f"{len(opened)} of {plan.streams} sessions opened; {refused[:1]}")
        opened |= {reply.session for reply in replies if isinstance(reply, messages.Opened)}
        seen |= {messages.decode_published(frame).session for _, frame in sockets.published}
        sockets.replies.clear()
        sockets.published.clear()
        sockets.wait(0.1)


def feed(plan: Plan) -> Fed:
    """Open the sessions, send everything at its time, take in what comes, close.

    Raises:
        RuntimeError: a session is refused.
    """
    context: zmq.Context[Any] = zmq.Context()
    sockets = _Sockets(context, plan)
    try:
        _open(plan, sockets)
        return _fed(plan, sockets)
    finally:
        for stream in range(plan.streams):
            sockets.dealer.send(messages.encode(messages.Close(session=_name(stream))))
        context.destroy(linger=1000)


def _cpu_s(pid: int) -> float | None:
    """Of a process, all its threads together; on Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fed(plan: Plan, sockets: _Sockets) -> Fed:
    schedule = _schedule(plan)
    began = time.monotonic_ns() + 200_000_000 + 20_000 * len(schedule)
    frames = _frames(plan, schedule, began)
    due = [began + at for at, _, _ in schedule]
    first = next(k for k, (_, _, index) in enumerate(schedule) if index == plan.warm)
    now_ns, sent = time.monotonic_ns, list[int]()
    took = own = 0.0
    gc.collect()
    gc.disable()  # what comes is kept, and there is nothing else
    for k, frame in enumerate(frames):
        if k == first:
            took, own = _cpu_s(plan.pid) or 0.0, time.process_time()
        while (left := due[k] - now_ns()) > 0:
            sockets.wait(left / 1e9)
            sockets.take()
        sent.append(now_ns())
        sockets.dealer.send(frame)
        sockets.take()  # what came meanwhile may open no door
    end = time.monotonic() + WAIT_S
    while len(sockets.published) < len(frames) and time.monotonic() < end:
        sockets.wait(0.05)
        sockets.take()
    ended = _cpu_s(plan.pid)
    measured = len(frames) - first
    gc.enable()
    return _counted(
        plan,
        schedule,
        (due, sent),
        sockets,
        cpu_us=None if ended is None else (ended - took) / measured * 1e6,
        own_cpu_us=(time.process_time() - own) / measured * 1e6,
    )


def _counted(
    plan: Plan,
    schedule: list[tuple[int, int, int]],
    times: tuple[list[int], list[int]],
    sockets: _Sockets,
    *,
    cpu_us: float | None,
    own_cpu_us: float,
) -> Fed:
    """Match answers and bins."""
    found: dict[tuple[str, int], tuple[int, messages.Result]] = {}
    for at, frame in sockets.published:
        message = messages.decode_published(frame)
        if isinstance(message, messages.Result):
            found.setdefault((message.session, message.index), (at, message))
    replies = [messages.decode_downstream(frame) for _, frame in sockets.replies]
    rows = [
        (intended, sent, *found[key])
        for (_, stream, index), intended, sent in zip(schedule, *times, strict=True)
        if index >= plan.warm and (key := (_name(stream), index)) in found
    ]
    answers = [answer for *_, answer in rows]
    arrived = [row[2] for row in rows]
    return Fed(
        intended=[row[0] for row in rows],
        sent=[row[1] for row in rows],
        arrived=arrived,
        received=[a.received_ns for a in answers],
        solve_start=[a.solve_start_ns for a in answers],
        solve_end=[a.solve_end_ns for a in answers],
        published=[a.published_ns for a in answers],
        statuses=dict(Counter("shed" if a.solver == "shed" else a.status for a in answers)),
        unanswered=plan.streams * (plan.bins - plan.warm) - len(rows),
        refused=dict(Counter(r.field for r in replies if isinstance(r, messages.Refused))),
        seconds=(max(arrived) - rows[0][0]) / 1e9 if rows else 0.0,
        cpu_us=cpu_us,
        own_cpu_us=own_cpu_us,
    )


def main() -> None:
    """``python -m benchmarks.feeder PLAN.json FED.json``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeder", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("fed", type=Path)
    given = parser.parse_args()
    plan = msgspec.json.decode(given.plan.read_bytes(), type=Plan)
    given.fed.write_bytes(msgspec.json.encode(feed(plan)))


if __name__ == "__main__":
    main()
