"""Physical units of kinematics: equality and conversion.

A small table of common notations (``cm/s``, ``meters``, ``deg s^-1``): lengths, angles, times,
masses, forces, voltages and pixels, with metric prefixes. Unknown units are never guessed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.recording import Recording, RecordingWarning

# Symbols and words with their size and the base units they are made of. A word takes a plural.
_SECOND = {"s": 1}
_SYMBOLS: dict[str, tuple[float, dict[str, int]]] = {
    "m": (1.0, {"m": 1}),
    "s": (1.0, _SECOND),
    "g": (1e-3, {"kg": 1}),
    "N": (1.0, {"kg": 1, "m": 1, "s": -2}),
    "V": (1.0, {"V": 1}),
    "Hz": (1.0, {"s": -1}),
    "rad": (1.0, {"rad": 1}),
}
_WORDS: dict[str, tuple[float, dict[str, int]]] = {
    **dict.fromkeys(("meter", "metre"), _SYMBOLS["m"]),
    **dict.fromkeys(("second", "sec"), _SYMBOLS["s"]),
    **dict.fromkeys(("gram", "gramme"), _SYMBOLS["g"]),
    "newton": _SYMBOLS["N"],
    "volt": _SYMBOLS["V"],
    "hertz": _SYMBOLS["Hz"],
    "radian": _SYMBOLS["rad"],
    **dict.fromkeys(("minute", "min"), (60.0, _SECOND)),
    **dict.fromkeys(("hour", "h"), (3600.0, _SECOND)),
    **dict.fromkeys(("degree", "deg", "°"), (math.pi / 180, {"rad": 1})),
    **dict.fromkeys(("revolution", "rev", "turn"), (2 * math.pi, {"rad": 1})),
    **dict.fromkeys(("inch", "inche"), (0.0254, {"m": 1})),
    **dict.fromkeys(("foot", "feet", "ft"), (0.3048, {"m": 1})),
    "micron": (1e-6, {"m": 1}),
    **dict.fromkeys(("pixel", "px"), (1.0, {"px": 1})),
}
_PREFIXES = {"n": 1e-9, "µ": 1e-6, "μ": 1e-6, "u": 1e-6, "m": 1e-3, "c": 1e-2, "d": 0.1, "k": 1e3}
_LONG_PREFIXES = {"nano": 1e-9, "micro": 1e-6, "milli": 1e-3, "centi": 1e-2, "deci": 0.1} | {
    "kilo": 1e3
}
_UNSTATED = {"", "-", "?", "n.a.", "n.a", "n/a", "na", "none", "unknown", "unspecified"}
_POWERS = str.maketrans("⁻⁰¹²³⁴−", "-01234-")
_FACTOR = re.compile(r"([^\W\d_]+|°)(?:\^?(-?\d))?")


def _unit(name: str) -> tuple[float, dict[str, int]] | None:
    """Return size and base units of a unit, including its prefix."""
    word = name.lower() if len(name) > 2 else name
    for table, prefixes, text in ((_SYMBOLS, _PREFIXES, name), (_WORDS, _LONG_PREFIXES, word)):
        for prefix, size in {"": 1.0, **prefixes}.items():
            stem = text.removeprefix(prefix)
            if prefix and stem == text:
                continue
            found = table.get(stem) or (table is _WORDS and table.get(stem.removesuffix("s")))
            if found:
                return size * found[0], found[1]
    return None


def _parsed(text: str) -> tuple[float, Counter[str]] | None:
    """Return size and powers of the base units of an expression; None if any is not known."""
    text = text.strip().translate(_POWERS).replace("**", "^")
    text = re.sub(r"\s*(?:/|\bper\b)\s*", "/", re.sub(r"\(([^()*/\s]+)\)", r"\1", text))
    above, *below = re.sub(r"\s*[*·⋅×.\s]\s*", " ", text).split("/")
    factors = [] if above == "1" and below else [(name, 1) for name in above.split(" ")]
    size, powers = 1.0, Counter[str]()
    # "a/b c" is ambiguous: it may mean a/(b c)
    for factor, sign in factors + [(name, -1) for name in below]:
        match = _FACTOR.fullmatch(factor)
        found = None if match is None else _unit(match[1])
        if match is None or found is None:
            return None
        power = sign * int(match[2] or 1)
        size *= found[0] ** power
        for base, each in found[1].items():
            powers[base] += each * power
    return size, Counter({base: power for base, power in powers.items() if power})


def unstated(unit: str) -> bool:
    """Return whether the text means that no unit is known, also with ``/s``."""
    stem = unit.strip().lower()
    while stem.endswith("/s"):
        stem = stem.removesuffix("/s")
    return stem in _UNSTATED


def conversion(given: str, wanted: str) -> float | None:
    """Return the factor from ``given`` to ``wanted``; None if it is not certain."""
    if given.strip() == wanted.strip():
        return 1.0
    a, b = _parsed(given), _parsed(wanted)
    if a is None or b is None or a[1] != b[1] or not a[1]:
        return None
    factor = a[0] / b[0]
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor


def in_units(recording: Recording, units: tuple[str, ...], whose: str) -> Recording:
    """Convert the kinematics of a recording to these units, one per channel.

    If one side states no unit, values are not changed. Warnings report this, and conversions.

    Args:
        whose: owner of the units for messages, e.g. ``the model``.

    Raises:
        RecordingError: the unit of a channel differs and cannot be converted with certainty.
    """
    if recording.kinematics is None or recording.kinematic_units == units:
        return recording
    factors = np.ones(len(units))
    said: list[RecordingWarning] = []
    each = zip(recording.kinematic_names, recording.kinematic_units, units, strict=True)
    for channel, (name, given, wanted) in enumerate(each):
        factor = conversion(given, wanted)
        if factor is None and (unstated(given) or unstated(wanted)):
            text = f"{name}: the recording's unit is {given or 'not stated'}, {whose}'s is "
            text += f"{wanted or 'not stated'}; the values are taken as they are."
            said.append(RecordingWarning("units-unstated", text))
        elif factor is None:
            raise RecordingError(
                f"recording.kinematic_units of {name}",
                expected=f"{wanted!r}, {whose}'s unit, or one that converts to it",
                got=repr(given),
            )
        elif factor != 1.0:
            factors[channel] = factor
            text = f"{name} converted from {given} to {wanted}, {whose}'s unit."
            said.append(RecordingWarning("units-converted", text))
    same = bool((factors == 1.0).all())
    return replace(
        recording,
        kinematics=recording.kinematics if same else recording.kinematics * factors,
        kinematic_units=units,
        warnings=recording.warnings + tuple(said),
    )
