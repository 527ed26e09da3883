"""Events of the experiment as NWB: a table of all, and the trials that they begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ilqr_vae.protocol.messages import Event

START, STOP = "trial_start", "trial_stop"
_RESERVED = ("start_time", "stop_time", "id", "tags", "timeseries")

Timed = Sequence[tuple[float, Event]]


def trials_of(events: Timed, end_s: float) -> list[dict[str, Any]]:
    """Trials as rows: ``start_time`` and ``stop_time`` in seconds, and what the payloads of the
    events that begin and end each hold. A trial that no event ends lasts until the next begins.

    Args:
        events: with their times in seconds, rising.
        end_s: when the recording ends.
    """
    rows: list[dict[str, Any]] = []
    open_ = False
    for at, event in events:
        named = {_named(key): value for key, value in event.payload.items()}
        if event.name == START:
            if open_:
                rows[-1]["stop_time"] = at
            rows.append({"start_time": at, "stop_time": max(at, end_s)} | named)
            open_ = True
        elif event.name == STOP and open_:
            rows[-1] |= {"stop_time": at} | named
            open_ = False
    return rows


def add_events(pynwb: Any, nwb: Any, events: Timed, end_s: float) -> None:
    """Add the table of events and, where there are any, trials to a file that is being built."""
    if not events:
        return
    module = nwb.processing.get("behavior") or nwb.create_processing_module(
        "behavior", "what happened in the experiment"
    )
    table = pynwb.core.DynamicTable(
        name="events",
        description="events in the order of their times; seconds from the first answered bin",
    )
    for name, what in (
        ("timestamp", "when it happened, seconds"),
        ("event", "what it is"),
        ("payload", "what is known of it, JSON"),
        ("source", "who said so"),
        ("bin", "the next bin when it was received"),
    ):
        table.add_column(name, what)
    for at, event in events:
        table.add_row(
            timestamp=at,
            event=event.name,
            payload=msgspec.json.encode(event.payload).decode(),
            source=event.source,
            bin=event.bin,
        )
    module.add(table)
    rows = trials_of(events, end_s)
    columns = dict.fromkeys(key for row in rows for key in row if key not in _RESERVED[:2])
    for name in columns:
        nwb.add_trial_column(name, f"{name}, as the events of the trial say")
    for row in rows:
        values = {name: _cell([r.get(name) for r in rows], row.get(name)) for name in columns}
        nwb.add_trial(start_time=row["start_time"], stop_time=row["stop_time"], **values)


def _named(key: str) -> str:
    """A column's name for a key of a payload."""
    return f"{key}_" if key in _RESERVED else key.replace("/", "_").replace(":", "_") or "_"


def _cell(column: list[Any], value: Any) -> float | str:
    """A value as its column holds it: a number where all are, else text."""
    if all(v is None or isinstance(v, int | float) for v in column):
        return float("nan") if value is None else float(value)
    if value is None or isinstance(value, str):
        return value or ""
    return msgspec.json.encode(value).decode()
