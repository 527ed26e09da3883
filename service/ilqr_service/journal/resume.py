"""Resuming the open sessions of a service that stopped, from its journal."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec.structs import replace

from ilqr_service.journal.live import Live, advance, follow
from ilqr_service.journal.records import (
    Answered,
    Checkpoint,
    Fed,
    Happened,
    Header,
    Queued,
    RunOpened,
    Snapshot,
    frame,
    records,
    survey,
)
from ilqr_service.sessions.checks import check_spikes
from ilqr_service.sessions.session import ServedSession
from ilqr_service.solving.run import Resumed, unpack_work
from ilqr_service.work import EngineInfo, Solve, SwapModel, Work, budget_of
from ilqr_vae.protocol import messages

_HEAD = 8
_snapshot = msgspec.msgpack.Decoder(Snapshot)
_answered = msgspec.msgpack.Decoder(Answered)
_fed = msgspec.msgpack.Decoder(Fed)
_happened = msgspec.msgpack.Decoder(Happened)


def open_runs(folder: Path, odd: list[str] | None = None) -> tuple[int, dict[int, Live]]:
    """Return the next free run number, and the open runs.

    The truncated end of the last segment is ignored. A segment without a complete beginning is
    ignored entirely; the previous one has the same contents.

    Args:
        odd: receives a line for each irregularity.

    Raises:
        JournalError: a segment could not be read, or is of another version.
    """
    odd = [] if odd is None else odd
    paths, words = survey(folder) if folder.is_dir() else ([], [])
    odd += words
    next_run = 0
    live: dict[int, Live] = {}
    staged: dict[int, Live] = {}
    whole = False
    for path in _from_last_whole(paths):
        for record in records(path, odd):
            if isinstance(record, Header):
                next_run = max(next_run, record.next_run)
                staged, whole = {}, False
            elif isinstance(record, Checkpoint):
                live, whole = staged, True
            else:
                if isinstance(record, RunOpened):
                    next_run = max(next_run, record.run + 1)
                follow(live if whole else staged, record, frame(record))
    for run in live.values():
        if lost := _fill(run):
            name, bins = run.opened.request.session, ", ".join(map(str, lost))
            odd.append(f"session {name}: the records of bins {bins} are lost; taken as missing")
    return next_run, live


def _fill(live: Live) -> list[int]:
    """Insert a missing bin for each lost record of a bin. Return their indices.

    Serials of the works in a run are contiguous, and so are the indices of bins, except at a reset
    of the estimate and after a pause. A gap in both is a lost record.
    """
    works: dict[int, tuple[bytes, Queued]] = {}
    lost: list[int] = []
    index, serial = live.opened.next_index, live.opened.serial
    for at, (framed, record) in live.works.items():
        work = record.work
        jumps = work.late or work.restart or work.rewind
        hole = 0 if jumps else min(work.index - index, at - serial)
        for back in range(hole, 0, -1):
            begins = at == back or (back == hole and work.index - hole > index)
            filler = replace(
                work,
                serial=at - back,
                index=work.index - back,
                counts=None,
                mask=None,
                restart=begins,
                rewind=False,
                anytime=False,
                budget=0,
                swap="",
                source_ns=0,
                clock=None,
                lost=True,
            )
            queued = Queued(work=filler)
            works[at - back] = (frame(queued), queued)
            lost.append(filler.index)
        works[at] = (framed, record)
        serial = at + 1
        if not work.late:
            index = work.index + (not work.swap)
    live.works = works
    return lost


def _from_last_whole(paths: list[Path]) -> list[Path]:
    for k in range(len(paths) - 1, -1, -1):
        if any(isinstance(record, Checkpoint) for record in records(paths[k])):
            return paths[k:]
    return paths


def results_of(live: Live) -> list[tuple[Answered, messages.Result]]:
    """Return the newest answers of a run, oldest first."""
    pairs: list[tuple[Answered, messages.Result]] = []
    for framed in live.answers.values():
        record = _answered.decode(framed[_HEAD:])
        result = messages.decode_published(record.frame)
        if isinstance(result, messages.Result):
            pairs.append((record, result))
    return pairs


def models_of(live: Live) -> set[str]:
    """Return the ids of the models needed to resume a run."""
    needed = {live.opened.model}
    if live.snapshot:
        needed.add(_snapshot.decode(live.snapshot[_HEAD:]).packed.model)
    for _, record in live.works.values():
        needed |= {record.work.model, record.work.swap} - {""}
    return needed


def model_of(live: Live) -> str:
    """Return the id of the model with which a run is resumed."""
    return advance(live.opened, [record for _, record in live.works.values()]).model


def _restore(session: ServedSession, live: Live) -> None:
    """Restore the batches of spikes and the events of a session."""
    for k, (_, framed) in enumerate(live.fed):
        batch = _fed.decode(framed[_HEAD:]).batch
        if session.binner is None:
            break
        if k == 0:
            session.binner.begin(batch.index)
        times, units = check_spikes(batch, session.model_info)
        session.binner.add(batch.index, batch.source_ns, times, units, batch.until_ns)
    for framed in live.happened:
        event = _happened.decode(framed[_HEAD:]).event
        session.remember(
            messages.Noted(
                session=session.name,
                epoch=session.epoch,
                source=event.source,
                index=event.index,
                received_ns=event.received_ns,
                bin=event.bin,
            )
        )


def take_up(
    live: Live, model_info: EngineInfo, deadline_ns: int, now_ns: int
) -> tuple[ServedSession, Resumed]:
    """Rebuild a session, without a feeder, and what the solver needs to resume it.

    Args:
        model_info: description of the current model of the run.
        deadline_ns: deadline if the session stated none.
        now_ns: time from which it counts as silent.
    """
    works = [record for _, record in live.works.values()]
    at = advance(live.opened, works)
    results = results_of(live)
    packed = _snapshot.decode(live.snapshot[_HEAD:]).packed if live.snapshot else None
    answered = max((a.serial for a, _ in results if a.settles), default=-1)
    if packed is not None:
        answered = max(answered, packed.serial)
    request = at.request
    session = ServedSession(
        run=at.run,
        name=request.session,
        epoch=request.epoch,
        owner=b"",
        deadline_ns=request.deadline_ns or deadline_ns or model_info.bin_width_ns,
        anytime=request.anytime,
        seen_ns=now_ns,
        slot=at.slot,
        model_info=model_info,
        request=request,
        user=at.user,
        next_index=at.next_index,
        base=at.base,
        serial=at.serial,
        started=at.serial > 0,
        missing=set(at.missing),
    )
    for answer, result in results:
        session.recent.append(result)
        if answer.revision:
            session.revisions[answer.index] = answer.revision
        session.newest = max(session.newest, result.index)
    session.revised_to = at.revision
    session.known_from = min((result.index for _, result in results), default=0)
    session.bins = session.newest + 1
    _restore(session, live)
    # a fixed-lag answer ends as the first one did; one to a late bin is solved without the clock
    cut = {result.index: budget_of(result) for _, result in results}
    to_do: list[Work] = []
    for record in works:
        work = unpack_work(record.work, at.slot)
        if work.serial <= answered:  # with the recorded iterations, not by the clock
            if isinstance(work, Solve):
                work = replace(work, anytime=False, budget=cut.get(work.index, 0))
        elif work.received_ns > now_ns:  # it refers to the clock of an earlier process
            work = replace(work, received_ns=now_ns, due_ns=now_ns)
        to_do.append(work)
    for work in to_do:
        if work.serial > answered and not isinstance(work, SwapModel):
            session.waiting += 1
            session.unanswered += not work.missing
    return session, Resumed(packed, to_do, answered)
