"""Safe access to HDF5: any access to any file ends in a value or an error.

The errors name what was found. Only calls into h5py are guarded, so that a mistake of this project
is not reported as a damaged file.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilqr_vae.errors import RecordingError
from ilqr_vae.recordings.checks import MOST_VALUES, Cells, Found, missing_extra

# Raised by h5py on damaged or foreign files, as found by corrupting them; NotImplementedError and
# UnicodeDecodeError are subclasses.
_H5PY = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, OverflowError)


@contextmanager
def guarded(path: Path, expected: str) -> Generator[None]:
    """Guard calls into h5py only. Raises RecordingError if they fail."""
    try:
        yield
    except _H5PY as error:
        reason = str(error).strip("'\"") or type(error).__name__
        raise RecordingError(
            "recording", expected=expected, got=f"{path.name}: {reason.splitlines()[0]}"
        ) from error


class File:
    """An open HDF5 file.

    Args:
        expected: what the file should be, for errors: ``an HDF5 file``.

    Raises:
        RecordingError: it is not an HDF5 file, or h5py is not installed.
    """

    def __init__(self, path: Path, expected: str) -> None:
        try:
            import h5py
        except ModuleNotFoundError as error:
            raise missing_extra("recording", "h5py", "nwb") from error
        self.path, self.expected, self._h5py = path, expected, h5py
        with guarded(path, expected):
            self.root: Any = h5py.File(path, "r")

    def close(self) -> None:
        self.root.close()

    def names(self, node: Any) -> list[str]:
        """Return the names in a group; none for a dataset."""
        with guarded(self.path, self.expected):
            return [str(name) for name in node] if isinstance(node, self._h5py.Group) else []

    def child(self, node: Any, name: str) -> Any:
        """Return the object of this name or path below a group; None if absent or a broken link."""
        if not isinstance(node, self._h5py.Group):
            return None
        try:
            return node.get(name)
        except _H5PY:  # a link to a missing file or object
            return None

    def datasets(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Yield path, type and shape of every dataset."""
        found: list[tuple[str, str, tuple[int, ...]]] = []

        def add(name: str, node: Any) -> None:
            if isinstance(node, self._h5py.Dataset):
                found.append((name, str(node.dtype), tuple(node.shape or ())))

        with guarded(self.path, self.expected):
            self.root.visititems(add)
        return found

    def is_group(self, node: Any) -> bool:
        return isinstance(node, self._h5py.Group)

    def attribute(self, node: Any, name: str) -> Any:
        """Return an attribute, or None."""
        with guarded(self.path, self.expected):
            return node.attrs.get(name)

    def value(self, node: Any) -> NDArray[Any] | list[Any] | Found:
        """Return the value of a dataset: native numbers in the file's shape, or an array of str.

        Returns:
            An array; for references, a list of their targets or None; for arrays of different
            lengths, a list of them; or a description of another type.

        Raises:
            RecordingError: it could not be read, or is larger than any recording.
        """
        if not isinstance(node, self._h5py.Dataset):
            return Found(f"a group of {', '.join(self.names(node)) or 'nothing'}")
        with guarded(self.path, self.expected):
            name, dtype, shape = str(node.name), node.dtype, node.shape
            references = self._h5py.check_ref_dtype(dtype)
            ragged = self._h5py.check_vlen_dtype(dtype)
            text = self._h5py.check_string_dtype(dtype) is not None
        if shape is None:
            return Found("no value (a null dataspace)")
        if float(np.prod(shape, dtype=np.float64)) > MOST_VALUES:
            raise RecordingError(name, expected=f"at most {MOST_VALUES:g} values", got=str(shape))
        if references is self._h5py.RegionReference:
            return Found("references to regions")
        if references is None and not ragged and not text and dtype.kind not in "biuf":
            return Found(_kind(dtype))
        with guarded(self.path, self.expected):
            raw = np.asarray(node.asstr(errors="replace")[()] if text else node[()])
            if references is not None:
                found = [self.root[reference] if reference else None for reference in raw.ravel()]
                return Cells(found, raw.shape)
        if ragged and not text:
            return [np.asarray(each) for each in raw.ravel()]
        return raw.astype(np.str_) if text else raw.astype(raw.dtype.newbyteorder("="))


def _kind(dtype: np.dtype[Any]) -> str:
    """Describe a type that is not numeric."""
    if dtype.names is not None:
        complex_number = set(dtype.names) == {"real", "imag"}
        return "complex numbers" if complex_number else f"records of {', '.join(dtype.names)}"
    kinds = {"c": "complex numbers", "V": "opaque bytes", "S": "text", "U": "text", "O": "objects"}
    return kinds.get(dtype.kind, f"values of type {dtype}")
