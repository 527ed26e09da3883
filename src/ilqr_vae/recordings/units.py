"""Selection of units by columns of the units table (``RecordingSpec.units``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError, number_of
from ilqr_vae.recordings.spec import Label
from ilqr_vae.recordings.trials import words

_LISTED = 20
"""Largest number of values of a column in an error."""


def selected_units(
    wanted: Mapping[str, Label | tuple[Label, ...]],
    column: Callable[[str], NDArray[np.str_]],
    n_units: int,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the rows of units with the wanted values in all columns, and a note.

    Args:
        wanted: a value, or several alternatives, by column.
        column: returns a column as text, one per unit; raises RecordingError if it is absent.

    Raises:
        RecordingError: a column or value is absent, or no unit is left.
    """
    keep = np.ones(n_units, dtype=bool)
    for name, values in wanted.items():
        field, labels = f"data.units.{name}", column(name)
        if labels.shape != (n_units,):
            raise RecordingError(
                field, expected=f"{n_units} values, one a unit", got=str(len(labels))
            )
        match = np.zeros(n_units, dtype=bool)
        for value in values if isinstance(values, tuple) else (values,):
            same = np.isin(labels, _spellings(value))
            if not same.any():
                there = sorted(set(labels.tolist()))
                more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
                raise RecordingError(
                    field,
                    expected=f"a value of that column: {', '.join(there[:_LISTED])}{more}",
                    got=repr(value),
                )
            match |= same
        keep &= match
    if not wanted:
        return np.arange(n_units), ()
    said = ", ".join(
        f"{name} = {' or '.join(map(str, v)) if isinstance(v, tuple) else v}"
        for name, v in wanted.items()
    )
    if not keep.any():
        raise RecordingError(
            "data.units", expected="values that some unit has together", got=f"none with {said}"
        )
    return np.flatnonzero(keep), (
        f"Read are {int(keep.sum())} of {number_of(n_units, 'unit')}: {said}.",
    )


def _spellings(value: Label) -> list[str]:
    """Return the notations of a value in a file."""
    if isinstance(value, bool):
        return ["True", "true", "1"] if value else ["False", "false", "0"]
    return words(np.array([value], dtype=object)).tolist()


def labels_of(values: NDArray[Any]) -> NDArray[np.str_]:
    """Return a column as stripped text."""
    return np.char.strip(words(values))
