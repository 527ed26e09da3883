"""Checks of messages against the model that serves them. Pure functions."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ilqr_service.work import EngineInfo, Vector
from ilqr_vae.errors import ProtocolError, number_of
from ilqr_vae.protocol import messages

SESSION_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_INDEX = 2**53
MAX_DEADLINE_NS = 3_600_000_000_000
MAX_TIME_NS = 2**62
MAX_PAYLOAD = 65_536


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def check_open(message: messages.Open, model_info: EngineInfo) -> None:
    """Raise ProtocolError naming the field if the model cannot serve the session."""
    if message.protocol != messages.PROTOCOL:
        raise ProtocolError("protocol", expected=str(messages.PROTOCOL), got=str(message.protocol))
    if not SESSION_NAME.fullmatch(message.session):
        raise ProtocolError(
            "session", expected="1-64 of [A-Za-z0-9._-]", got=_short(message.session)
        )
    if message.bin_width_ns != model_info.bin_width_ns:
        raise ProtocolError(
            "bin_width_ns", expected=str(model_info.bin_width_ns), got=str(message.bin_width_ns)
        )
    for field in ("deadline_ns", "grace_ns"):
        ns = getattr(message, field)
        if not 0 <= ns <= MAX_DEADLINE_NS:
            raise ProtocolError(
                field, expected=f"0 (the service's default) to {MAX_DEADLINE_NS}", got=str(ns)
            )
    if not 0 <= message.abstain <= 1:  # also false for NaN
        raise ProtocolError("abstain", expected="0 to 1", got=f"{message.abstain:g}")
    if message.abstain and not model_info.class_names:
        expected = "0: the model has no classes"
        raise ProtocolError("abstain", expected=expected, got=f"{message.abstain:g}")
    if not 0 <= message.lag <= model_info.lags:
        expected = f"0 to {model_info.lags}, the longest lag of the model"
        raise ProtocolError("lag", expected=expected, got=str(message.lag))
    if message.origin_ns is not None and model_info.feature_names:
        expected = "none: batches of spikes carry no features, and the model has some"
        raise ProtocolError("origin_ns", expected=expected, got=str(message.origin_ns))
    names = model_info.unit_names
    if len(message.units) != len(names):
        raise ProtocolError(
            "units",
            expected=f"the model's {number_of(len(names), 'unit')}",
            got=number_of(len(message.units), "unit"),
        )
    for i, (expected, got) in enumerate(zip(names, message.units, strict=True)):
        if expected != got:
            raise ProtocolError(f"units[{i}]", expected=repr(expected), got=_short(got))


def _vector(array: messages.Array, field: str, n_units: int) -> NDArray[Any]:
    if array.shape != (n_units,):
        raise ProtocolError(f"{field}.shape", expected=f"({n_units},)", got=str(array.shape))
    return messages.unpack(array, field)


def check_spikes(
    message: messages.Spikes, model_info: EngineInfo
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return times and units of a batch, each (S,).

    Raises:
        ProtocolError: a number is out of range or not an integer, there is not one time for each
            unit, a unit does not exist, or a time is after the batch was sent.
    """
    for field in ("index", "source_ns", "until_ns"):
        value: int = getattr(message, field) or 0
        lowest, highest = (0, MAX_INDEX) if field == "index" else (-MAX_TIME_NS, MAX_TIME_NS)
        if not lowest <= value <= highest:
            raise ProtocolError(field, expected=f"{lowest} to {highest}", got=str(value))
    if message.until_ns is not None and message.until_ns > message.source_ns:
        expected = f"at most source_ns, {message.source_ns}"
        raise ProtocolError("until_ns", expected=expected, got=str(message.until_ns))
    times, units = message.times_ns, message.units
    if times.dtype != "<i8":
        raise ProtocolError("times_ns.dtype", expected="<i8", got=times.dtype)
    if units.dtype not in ("u1", "<u2", "<u4"):
        raise ProtocolError("units.dtype", expected="u1, <u2 or <u4", got=units.dtype)
    if len(times.shape) != 1 or times.shape != units.shape:
        got = f"{times.shape} and {units.shape}"
        raise ProtocolError("units.shape", expected="that of times_ns, (S,)", got=got)
    at, which = messages.unpack(times, "times_ns"), messages.unpack(units, "units").astype(np.int64)
    n_units = len(model_info.unit_names)
    if which.size and which.max() >= n_units:
        raise ProtocolError("units", expected=f"0 to {n_units - 1}", got=str(which.max()))
    if at.size and at.max() > message.source_ns:
        expected = f"at most source_ns, {message.source_ns}"
        raise ProtocolError("times_ns", expected=expected, got=str(at.max()))
    return at, which


def check_event(event: messages.Event) -> None:
    """Raise ProtocolError if the payload is not JSON, or too long."""
    try:
        size = len(msgspec.json.encode(event.payload))
    except (TypeError, ValueError, RecursionError, UnicodeError) as error:
        raise ProtocolError(
            "payload", expected="numbers, text, lists, maps", got=_short(str(error))
        ) from error
    if size > MAX_PAYLOAD:
        raise ProtocolError("payload", expected=f"{MAX_PAYLOAD} bytes as JSON", got=str(size))


def check_bin(
    message: messages.Bin, model_info: EngineInfo
) -> tuple[Vector, NDArray[np.bool_] | None]:
    """Return counts, with the features after them, and mask of a bin, each (N,).

    Raises:
        ProtocolError: there is not one count per unit, a count is not an integer in [0, 65535], the
            features are not the model's or infinite, the mask is not u1 of zeros and ones, or the
            index is out of range.
    """
    if not 0 <= message.index <= MAX_INDEX:
        raise ProtocolError("index", expected=f"0 to {MAX_INDEX}", got=str(message.index))
    n_units = model_info.counted
    raw = _vector(message.counts, "counts", n_units)
    counts = raw.astype(np.float64)
    if raw.dtype.kind == "f" and not np.isfinite(counts).all():
        bad = counts[~np.isfinite(counts)][0]
        raise ProtocolError("counts", expected="finite numbers", got=str(bad))
    if raw.dtype.kind != "u" or raw.dtype.itemsize > 2:
        wrong = (counts < 0) | (counts > messages.MAX_COUNT) | (counts != np.floor(counts))
        if wrong.any():
            unit = int(np.flatnonzero(wrong)[0])
            raise ProtocolError(
                "counts",
                expected=f"whole numbers from 0 to {messages.MAX_COUNT}",
                got=f"{counts[unit]:g} for unit {model_info.unit_names[unit]!r}",
            )
    there: NDArray[np.bool_] | None = None
    if model_info.feature_names or message.features is not None:
        values = _features(message, model_info)
        known = np.isfinite(values)
        counts = np.concatenate([counts, np.where(known, values, 0.0)])
        there = np.concatenate([np.ones(n_units, dtype=bool), known])
    if message.mask is not None:
        if message.mask.dtype != "u1":
            raise ProtocolError("mask.dtype", expected="u1", got=message.mask.dtype)
        mask = _vector(message.mask, "mask", len(counts))
        if (mask > 1).any():
            raise ProtocolError("mask", expected="zeros and ones", got=str(int(mask.max())))
        there = mask.astype(bool) if there is None else mask.astype(bool) & there
    return counts, None if there is None or bool(there.all()) else there


def _features(message: messages.Bin, model_info: EngineInfo) -> Vector:
    """(F,), NaN where not observed."""
    names, given = model_info.feature_names, message.features
    if given is None:
        return np.full(len(names), np.nan)
    if not names:
        expected = "none: the model has no features"
        raise ProtocolError("features", expected=expected, got=f"shape {given.shape}")
    values = _vector(given, "features", len(names)).astype(np.float64)
    if (wild := np.isinf(values)).any():
        which = names[int(np.argmax(wild))]
        expected = "finite numbers, or NaN where there is none"
        raise ProtocolError("features", expected=expected, got=f"infinity for {which!r}")
    return values
