"""Which units of a file are read: by the columns of its units table (``RecordingSpec.units``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.spec import Label
from ilqr_vae.recordings.trials import words

_LISTED = 20
"""Values of a column that an error lists."""


def selected_units(
    wanted: Mapping[str, Label | tuple[Label, ...]],
    column: Callable[[str], NDArray[np.str_]],
    n_units: int,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Rows of the units that have the values wanted in every column, and a note of the choice.

    Args:
        wanted: a value, or several of which one is enough, by column.
        column: gives a column as words, one a unit; raises RecordingError for one that is not
            there.

    Raises:
        RecordingError: a column or a value is not there, or no unit is left.
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
    return np.flatnonzero(keep), (f"Read are {int(keep.sum())} of {n_units} units: {said}.",)


def _spellings(value: Label) -> list[str]:
    """How a file may write a value."""
    if isinstance(value, bool):
        return ["True", "true", "1"] if value else ["False", "false", "0"]
    return words(np.array([value], dtype=object)).tolist()


def labels_of(values: NDArray[Any]) -> NDArray[np.str_]:
    """A column as words, without blanks at the ends."""
    return np.char.strip(words(values))
