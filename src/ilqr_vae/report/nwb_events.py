"""Events of the experiment as NWB: a table of all, and the trials that they delimit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec

from ilqr_vae.protocol.messages import TRIAL_START as START
from ilqr_vae.protocol.messages import TRIAL_STOP as STOP
from ilqr_vae.protocol.messages import Event

_OF_TABLE = ("timestamp", "event", "source", "bin", "id")
_OF_TRIALS = ("start_time", "stop_time", "id", "tags", "timeseries")

Timed = Sequence[tuple[float, Event]]


def trials_of(events: Timed, end_s: float, width_s: float = 0.0) -> list[dict[str, Any]]:
    """Return trials as rows: ``start_time``, ``stop_time`` in seconds, and the payloads.

    The payloads are those of the events that start and end a trial. A trial without an end event
    lasts until the next one starts.

    Args:
        events: events with increasing times in seconds.
        end_s: end of the recording.
        width_s: duration of a trial that starts after the end.
    """
    rows: list[dict[str, Any]] = []
    open_ = False
    for at, event in events:
        if event.name == START:
            if open_:
                rows[-1]["stop_time"] = at
            times = {"start_time": at, "stop_time": max(at + width_s, end_s)}
            rows.append(times | named(event.payload, _OF_TRIALS))
            open_ = True
        elif event.name == STOP and open_:
            rows[-1] |= {"stop_time": at} | named(event.payload, _OF_TRIALS)
            open_ = False
    return rows


def add_events(pynwb: Any, nwb: Any, events: Timed, end_s: float, width_s: float) -> None:
    """Add the table of events, and trials if there are any, to a file."""
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
        ("source", "who said so"),
        ("bin", "the next bin when it was received"),
    ):
        table.add_column(name, what)
    payloads = [named(event.payload, _OF_TABLE) for _, event in events]
    columns = _columns(payloads)
    for name in columns:
        table.add_column(name, f"{name}, of the event's payload")
    for (at, event), payload in zip(events, payloads, strict=True):
        own = {"timestamp": at, "event": event.name, "source": event.source, "bin": event.bin}
        table.add_row(**own, **{name: cell(payload.get(name)) for name, cell in columns.items()})
    module.add(table)
    rows = trials_of(events, end_s, width_s)
    columns = _columns([{k: v for k, v in row.items() if k not in _OF_TRIALS} for row in rows])
    for name in columns:
        nwb.add_trial_column(name, f"{name}, as the events of the trial say")
    for row in rows:
        values = {name: cell(row.get(name)) for name, cell in columns.items()}
        nwb.add_trial(start_time=row["start_time"], stop_time=row["stop_time"], **values)


def named(payload: Mapping[str, Any], reserved: Sequence[str] = ()) -> dict[str, Any]:
    """Flatten a payload by column name: a nested map has a column for each key."""
    found: dict[str, Any] = {}
    for key, value in payload.items():
        name = f"{key}_" if key in reserved else key.replace("/", "_").replace(":", "_") or "_"
        if isinstance(value, dict):
            within = named(cast(dict[str, Any], value))
            found |= {f"{name}.{part}": inner for part, inner in within.items()}
        else:
            found[name] = value
    return found


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[Any], float | str]]:
    """Return the values of each column: numbers if all are, else text."""
    numbers: dict[str, bool] = {}
    for row in rows:
        for name, value in row.items():
            number = value is None or isinstance(value, int | float)
            numbers[name] = numbers.get(name, True) and number
    return {name: _number if all_numbers else _text for name, all_numbers in numbers.items()}


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return msgspec.json.encode(value).decode()
