"""Events of the experiment as NWB: a table of all, and the trials that they delimit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from ilqr_vae.protocol.messages import TRIAL_START as START
from ilqr_vae.protocol.messages import TRIAL_STOP as STOP
from ilqr_vae.protocol.messages import Event

_OF_NWB = {"namespace", "neurodata_type", "tags_index", "timeseries_index", ".", ".."}
"""Names that no column may have, beside those of the table's attributes."""
_MOST_COLUMNS, _LONGEST_NAME = 256, 128

Timed = Sequence[tuple[float, Event]]
Payload = dict[str, Any]


def trials_of(
    events: Timed, end_s: float, width_s: float = 0.0
) -> list[tuple[float, float, Payload]]:
    """Return start and stop of each trial in seconds, and its payload.

    The payload is that of the events that start and end the trial. A trial without an end event
    lasts until the next one starts.

    Args:
        events: events with increasing times in seconds.
        end_s: end of the recording.
        width_s: duration of a trial that starts after the end.
    """
    rows: list[tuple[float, float, Payload]] = []
    open_ = False
    for at, event in events:
        if event.name == START:
            if open_:
                rows[-1] = (rows[-1][0], at, rows[-1][2])
            rows.append((at, max(at + width_s, end_s), dict(event.payload)))
            open_ = True
        elif event.name == STOP and open_:
            rows[-1] = (rows[-1][0], at, rows[-1][2] | event.payload)
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
    for at, event in events:
        who = {"event": _text(event.name), "source": _text(event.source)}
        table.add_row(timestamp=at, bin=event.bin, **who)
    _add_columns(table, [event.payload for _, event in events], "{}, of the event's payload")
    module.add(table)
    rows = trials_of(events, end_s, width_s)
    for start, stop, _ in rows:
        nwb.add_trial(start_time=start, stop_time=stop)
    if rows:
        _add_columns(nwb.trials, [p for _, _, p in rows], "{}, as the events of the trial say")


def _add_columns(table: Any, payloads: Sequence[Mapping[str, Any]], what: str) -> None:
    """Add a column for each key of the payloads, one for each row of the table.

    Keys are names of no file: a column is named by its key with ``_`` for what NWB cannot hold, and
    with a further ``_`` where the table has the name. Keys too many or too long for columns share
    the last one, ``payload``, as JSON.
    """
    flat = [_flat(payload) for payload in payloads]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    own = dict.fromkeys([key for key in keys if len(key) <= _LONGEST_NAME][:_MOST_COLUMNS])
    if len(own) < len(keys):
        own.pop("payload", None)
        rest = [{key: value for key, value in row.items() if key not in own} for row in flat]
        flat = [row | {"payload": more or None} for row, more in zip(flat, rest, strict=True)]
        own["payload"] = None
    for key in own:
        name = "".join("_" if c in "/:" or not c.isprintable() else c for c in key) or "_"
        while name in _OF_NWB or name in table.colnames or hasattr(table, name):
            name += "_"
        values = [row.get(key) for row in flat]
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        cell = _number if numbers else _text
        table.add_column(name=name, description=what.format(name), data=list(map(cell, values)))


def _flat(payload: Mapping[str, Any]) -> Payload:
    """Flatten a payload: a nested map has an entry for each key, as ``target.x``."""
    found: Payload = {}
    for key, value in payload.items():
        if isinstance(value, dict):
            within = _flat(cast(Payload, value))
            found |= {f"{key}.{part}": inner for part, inner in within.items()}
        else:
            found[key] = value
    return found


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _text(value: Any) -> str:
    """Return a value as text; NUL, which HDF5 cannot hold, as an escape."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return text.replace("\0", "\\0")
