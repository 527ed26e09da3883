"""Variables of a MAT file by name, including struct fields; version 5 (scipy) and 7.3 (h5py)."""

from __future__ import annotations

import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import io, sparse

from ilqr_vae.errors import RecordingError, did_you_mean
from ilqr_vae.recordings.checks import MOST_VALUES, Cells, Found

if TYPE_CHECKING:  # h5py is not part of the base install
    from ilqr_vae.recordings.h5 import File

_DEEPEST = 8
"""Of cells within cells."""
_HDF5 = b"\x89HDF\r\n\x1a\n"

# Version 5: types of elements, and classes of matrices whose parts are numbers.
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS, _TEXTS = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13}, {16, 17, 18}
_CHARS, _SPARSE = 4, 5
_ARRAYS = range(_CHARS, 16)

# Raised by scipy's reader on bytes that are not a complete MAT file, as found by truncating and
# corrupting files: it does not wrap the errors of its parser.
_UNREADABLE = (
    ValueError,
    TypeError,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    UnicodeDecodeError,
    zlib.error,
    io.matlab.MatReadError,
)


def read_variables(path: Path, wanted: dict[str, str]) -> dict[str, Any]:
    """Return the wanted variables by name, in MATLAB's axis order.

    A name may lead into structs: ``session.data.spikes``. A field of a struct array is a list of
    its elements' values, as a cell array is of its cells, column by column as MATLAB counts them.

    Args:
        wanted: names by the setting that asks for them, for errors.
    """
    names = {part for name in wanted.values() for part in (name, name.split(".")[0])}
    with _opened(path, sorted(names)) as tree:
        return tree.all(wanted)


def variables_of(path: Path) -> list[tuple[str, str]]:
    """Return all variables of a file, with descriptions."""
    with _opened(path, None) as tree:
        return [(n, described(tree.value(tree.child(None, n)))) for n in tree.children(None)]


@contextmanager
def _opened(path: Path, names: list[str] | None) -> Generator[_Tree]:
    """Open the variables of these names, or all."""
    with path.open("rb") as file:
        head = file.read(1024)
    # A version 7.3 file is HDF5 behind a block of 512 bytes; Octave and others leave that out.
    if _HDF5 in (head[:8], head[512:520]):
        from ilqr_vae.recordings.h5 import File

        with closing(File(path, "a MAT file of version 7.3")) as opened:
            yield _V73(opened, path.name)
        return
    try:
        _check_elements(path, head)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about variables that are not wanted
            present = [str(name) for name, _, _ in io.whosmat(path)]
            found = io.loadmat(path, variable_names=names)
    except _UNREADABLE as error:
        raise RecordingError(
            "recording", expected="a MAT file (version 5 or 7.3)", got=f"{path.name}: {error}"
        ) from error
    yield _V5(present, found, path.name)


def _check_elements(path: Path, head: bytes) -> None:
    """Walk the elements of a version 5 file. Raises ValueError if one is invalid.

    Scipy looks up types in a table without a bounds check, and reads beyond a matrix that has fewer
    parts than its class requires: either can crash the process.
    """
    if len(head) < 128 or 0 in head[:4]:  # version 4, which has no types
        return
    order = "<" if head[126:128] == b"IM" else ">"

    def walk(raw: memoryview) -> list[int]:
        """The types of the elements, checked below too."""
        at, kinds = 0, list[int]()
        while at + 8 <= len(raw):
            kind, size = struct.unpack_from(f"{order}II", raw, at)
            if kind >> 16:  # type and size in one word, the data in the next
                kind, size = kind & 0xFFFF, 0
            at += 8
            body = raw[at : at + size]
            if kind == _COMPRESSED:
                walk(memoryview(zlib.decompress(body)))
            elif kind == _MATRIX and size:
                check(body)
            elif kind not in _NUMBERS | _TEXTS | {_MATRIX}:
                raise ValueError(f"an element of unknown type {kind}")
            at += size if kind in (_COMPRESSED, _MATRIX) else -(-size // 8) * 8
            kinds.append(kind)
        return kinds

    def check(matrix: memoryview) -> None:
        parts = walk(matrix)[3:]  # after flags, dimensions and name
        flags = struct.unpack_from(f"{order}I", matrix, 8)[0] if len(matrix) >= 12 else 0
        what, imaginary = flags & 0xFF, bool(flags & 0x800)
        needs = {_CHARS: 1, _SPARSE: 3 + imaginary}.get(what, 1 + imaginary)
        known = _NUMBERS | (_TEXTS if what == _CHARS else set())
        numbers = what in _ARRAYS
        if not 1 <= what <= 17 or (
            numbers and (len(parts) < needs or not known.issuperset(parts[:needs]))
        ):
            raise ValueError(f"a matrix of class {what} with parts of types {parts[:4]}")

    walk(np.memmap(path, dtype=np.uint8, mode="r", offset=128).data)


class _Tree(ABC):
    """Values by dotted names, whatever the version of the file."""

    def __init__(self, file_name: str) -> None:
        self._file_name = file_name

    @abstractmethod
    def children(self, node: Any) -> list[str]:
        """Return the field names of a struct; none for other values."""

    @abstractmethod
    def child(self, node: Any, name: str) -> Any:
        """Return a field of a struct."""

    @abstractmethod
    def value(self, node: Any) -> Any:
        """Return an array, a list for a cell array, or ``Found``."""

    def all(self, wanted: dict[str, str]) -> dict[str, Any]:
        """See ``read_variables``."""
        return {name: self._find(name, field) for field, name in wanted.items()}

    def _find(self, name: str, field: str) -> Any:
        """Find a variable. Raises RecordingError naming ``field`` and the existing variables."""
        node: Any = None
        parts = [name] if name in self.children(None) else name.split(".")
        for i, part in enumerate(parts):
            node = self._into(node, part, field, ".".join(parts[:i]))
        return self.value(node)

    def _into(self, node: Any, part: str, field: str, above: str) -> Any:
        if isinstance(node, list):  # the elements of a struct array
            each = [self._into(element, part, field, above) for element in node]
            return each[0] if len(each) == 1 else each
        known = self.children(node)
        if part not in known:
            place = f"{above}'s fields" if above else f"{self._file_name}'s variables"
            there = ", ".join(sorted(known)) or f"none, {above} is {described(self.value(node))}"
            raise RecordingError(
                field,
                expected=f"one of {place}: {there}",
                got=repr(part) + did_you_mean(part, known),
            )
        return self.child(node, part)


class _V5(_Tree):
    """Variables that scipy has read."""

    def __init__(self, present: list[str], found: dict[str, Any], file_name: str) -> None:
        super().__init__(file_name)
        self._present, self._found = present, found

    def children(self, node: Any) -> list[str]:
        if node is None:
            return self._present
        # objects of MATLAB's own come as subclasses
        return list(node.dtype.names or ()) if type(node) is np.ndarray else []

    def child(self, node: Any, name: str) -> Any:
        if node is None:
            return self._found.get(name)
        each = list(node[name].ravel(order="F"))
        return each[0] if len(each) == 1 else each

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return Cells([self.value(each) for each in node], (len(node), 1))
        if sparse.issparse(node):
            return _dense(node)
        if not isinstance(node, np.ndarray) or type(node) is not np.ndarray:
            return Found("an object of MATLAB's own (a table, string or function)")
        if node.dtype == object:
            return Cells([self.value(cell) for cell in node.ravel(order="F")], node.shape)
        if node.dtype.names is not None:
            return Found(f"a struct of {', '.join(node.dtype.names)}")
        return Found("complex numbers") if node.dtype.kind == "c" else node


class _V73(_Tree):
    """An HDF5 file as MATLAB writes it: axes reversed, structs as groups, cells as references."""

    def __init__(self, file: File, file_name: str) -> None:
        super().__init__(file_name)
        self._file = file

    def children(self, node: Any) -> list[str]:
        root = self._file.root
        return [n for n in self._file.names(root if node is None else node) if n[:1] != "#"]

    def child(self, node: Any, name: str) -> Any:
        found = self._file.child(self._file.root if node is None else node, name)
        if found is None:
            return Found("a broken link")
        # each field of a struct array is a dataset of references
        if node is not None and isinstance(each := self._content(found), list):
            return each[0] if len(each) == 1 else each
        return found

    def _content(self, node: Any) -> Any:
        return node if isinstance(node, Found) else self._file.value(node)

    def value(self, node: Any, within: tuple[str, ...] = ()) -> Any:
        """``within``: names of the cell arrays that it is a cell of."""
        if isinstance(node, list):
            shape = node.shape[::-1] if isinstance(node, Cells) else (len(node), 1)
            return Cells([self.value(each, within) for each in node], shape)
        if node is None or isinstance(node, np.ndarray):
            return np.zeros(0) if node is None else node
        if isinstance(node, Found):
            return node
        kind = self._file.attribute(node, "MATLAB_class")
        kind = kind.decode(errors="replace") if isinstance(kind, bytes) else str(kind)
        if self._file.attribute(node, "MATLAB_object_decode") is not None:
            return Found(f"an object of MATLAB's own (class {kind})")
        if self._file.is_group(node):
            rows = self._file.attribute(node, "MATLAB_sparse")
            fields = ", ".join(self.children(node)) or "nothing"
            return Found(f"a struct of {fields}") if rows is None else self._sparse(node, rows)
        # an empty array is stored as its size
        if np.any(self._file.attribute(node, "MATLAB_empty") or 0):
            return [] if kind == "cell" else np.zeros(0)
        found = self._content(node)
        if isinstance(found, list):
            name = str(node.name)
            if name in within or len(within) == _DEEPEST:  # it may hold itself
                return Found(f"a cell array of {len(found)}")
            return self.value(found, (*within, name))
        if kind == "char" and isinstance(found, np.ndarray) and found.dtype.kind in "iu":
            return _text(found)
        return found if isinstance(found, Found) else found.T

    def _sparse(self, node: Any, rows: Any) -> Any:
        columns, *parts = (self._content(self.child(node, name)) for name in ("jc", "ir", "data"))
        if not all(isinstance(part, np.ndarray) for part in parts):
            parts = [np.zeros(0, dtype=np.int64), np.zeros(0)]  # of zeros only
        try:
            shape = int(np.ravel(rows)[0]), len(columns) - 1
            return _dense(sparse.csc_matrix((parts[1], parts[0], columns), shape=shape))
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            return Found(f"a damaged sparse matrix ({error})")


def _text(codes: NDArray[Any]) -> NDArray[np.str_]:
    """Decode MATLAB characters (UTF-16, one text per row, stored by columns)."""
    rows = codes.astype(np.uint16).reshape(len(codes), -1).T
    return np.array([row.tobytes().decode("utf-16-le", "replace") for row in rows], dtype=np.str_)


def _dense(matrix: Any) -> Any:
    if float(matrix.shape[0]) * matrix.shape[1] > MOST_VALUES:
        return Found(f"a sparse matrix of shape {matrix.shape}")
    try:
        matrix.check_format(full_check=True)  # indices out of range would write to arbitrary memory
    except ValueError as error:
        return Found(f"a damaged sparse matrix ({error})")
    return matrix.toarray()


def described(value: Any) -> str:
    """Describe a value for errors."""
    if isinstance(value, Found):
        return value.what
    if isinstance(value, list):
        return f"a cell array of {len(value)}"
    if value.dtype.kind in "US":
        return "text"
    numbers = value.dtype.kind in "biuf"
    return f"numbers of shape {value.shape}" if numbers else f"values of type {value.dtype}"
