"""Files: atomic writes, checks of output paths, and TOML read into a struct."""

from __future__ import annotations

import codecs
import os
import re
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from ilqr_vae.errors import ConfigError, did_you_mean

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

# Ranges of settings, checked by ``to_struct``. A bound of any kind refuses NaN.
PositiveInt = Annotated[int, msgspec.Meta(ge=1, lt=2**62)]
NonNegativeInt = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0, le=1e300)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0, le=1e300)]
FiniteFloat = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
OpenShare = Annotated[float, msgspec.Meta(gt=0, lt=1)]
ShareBelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]
ShareAboveZero = Annotated[float, msgspec.Meta(gt=0, le=1)]


def unit(name: str) -> msgspec.Meta:
    """The unit of a setting, for the generated reference of all keys."""
    return msgspec.Meta(extra={"unit": name})


STDOUT = Path("-")
"""Output path that means standard output."""

MIB = 2**20

FRAME = struct.Struct("<II")
"""Prefix of each record of an append-only file: its length and CRC-32."""


def check_writable(path: Path | None, field: str) -> None:
    """Check an output path before the work begins.

    Raises:
        ConfigError: its folder does not exist or is not writable, or it is a folder.
    """
    if path is None or path == STDOUT:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise ConfigError(field, expected="a file to write", got=f"{path} is a folder")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(field, expected="a file in a folder that can be written", got=str(path))


def check_folder(path: Path, field: str) -> None:
    """Check an output folder, which may not exist yet, before the work begins.

    Raises:
        ConfigError: it or a parent is a file, or it cannot be written.
    """
    there = path.absolute()
    while not os.path.exists(there):  # unlike Path.exists it is False if access is denied
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise ConfigError(field, expected="a folder that can be written", got=f"{there} {why}")


def check_space(folder: Path, size: int, field: str) -> None:
    """Check the free disk space before the work begins.

    Args:
        size: bytes that will be written in ``folder``.

    Raises:
        ConfigError: there is less free space.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ConfigError(
            field,
            expected=f"{size / MIB:.0f} MiB free on the disk of {folder}",
            got=f"{free / MIB:.0f} MiB",
        )


@contextmanager
def replacing(path: Path, field: str = "", *, mode: int = 0o666) -> Generator[Path]:
    """Yield a new path beside ``path``, to be written by the body of the ``with`` statement.

    It is renamed to ``path`` if the body succeeds, else removed. So ``path`` is always the complete
    old or new file, even after a power failure.

    Args:
        field: name of the output in errors; default: the path.
        mode: permissions of the new file, before the umask.

    Raises:
        ConfigError: the file could not be written (no such folder, no permission, disk full).
    """
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        # HDF5's errors have no file name, but its whole call
        said = os.strerror(error.errno) if error.errno and not error.filename else str(error)
        raise ConfigError(
            field or str(path), expected="a file that can be written", got=said
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, field: str = "", *, mode: int = 0o666) -> None:
    """Write a file, see ``replacing``. ``-`` is standard output; devices and pipes are written to.

    Raises:
        ConfigError: the file cannot be written.
    """
    raw = content.encode() if isinstance(content, str) else content
    if path == STDOUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
    elif path.exists() and not path.is_file():
        try:
            path.write_bytes(raw)
        except OSError as error:
            raise ConfigError(
                field or str(path), expected="something that can be written to", got=str(error)
            ) from error
    else:
        with replacing(path, field, mode=mode) as part:
            part.write_bytes(raw)


def framed(payload: bytes) -> bytes:
    """Return a record of an append-only file, with its length and checksum."""
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def frame_at(data: bytes, at: int, longest: int) -> bytes | None:
    """The record whose frame begins at ``at``; None where it is cut short, longer than ``longest``,
    or its checksum is wrong."""
    if at + FRAME.size > len(data):
        return None
    length, check = FRAME.unpack_from(data, at)
    payload = data[at + FRAME.size : at + FRAME.size + length]
    # a length of 0 is no record: a file may end in zeros after the machine lost power
    good = 0 < length <= longest and len(payload) == length and zlib.crc32(payload) == check
    return payload if good else None


def read_toml(path: Path, kind: type[T], field: str = "config") -> T:
    """Read a TOML file into a struct.

    Args:
        kind: what it holds, see ``to_struct``.
        field: names the file in errors.

    Raises:
        ConfigError: no such file, not TOML, or what ``to_struct`` refuses.
    """
    try:
        values = msgspec.toml.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    # tomllib's own errors are a ValueError; so is a number of thousands of digits
    except (OSError, ValueError, RecursionError, msgspec.DecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{field} {path.name}", expected="a readable TOML file", got=str(got)
        ) from error
    with naming(path):
        return to_struct(values, kind, f"{field} {path.name}")


@contextmanager
def naming(path: str | Path) -> Generator[None]:
    """Name a file in the ConfigErrors that are raised within, unless they already do."""
    name = Path(path).name
    try:
        yield
    except ConfigError as error:
        if name in str(error):
            raise
        got = f"{error.got} (in {name})"
        raise ConfigError(error.field, expected=error.expected, got=got) from error


def to_struct(values: Any, kind: type[T], field: str, *, strict: bool = True) -> T:
    """Convert plain values to a struct, with checks of types and ranges.

    Args:
        values: dicts, lists, strings, numbers; or a struct to be checked again.
        field: names the whole in errors.
        strict: take no text for a number.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range; names the key.
    """
    try:
        plain = msgspec.to_builtins(values)
    except RecursionError as error:
        raise ConfigError(field, expected="keys of a few levels", got="hundreds") from error
    try:
        return msgspec.convert(plain, kind, strict=strict)
    except msgspec.ValidationError as error:
        said, _, where = str(error).partition(" - at `$")
        said, keys = said.replace("`", ""), re.findall(r"[^.\[\]`]+", where)
        field = ".".join(key for key in keys if not key.isdecimal()) or field
        if unknown := re.fullmatch("Object contains unknown field (.*)", said):
            fields = getattr(_type_at(kind, keys), "__struct_fields__", ())
            raise ConfigError(
                f"{field}.{unknown[1]}" if keys else f"{field}: {unknown[1]}",
                expected=f"one of the keys {', '.join(fields)}",
                got="an unknown key" + did_you_mean(unknown[1], fields),
            ) from error
        if own := re.fullmatch(r"(\w+): expected (.+), got (.+)", said):  # a struct's own check
            field = ".".join([key for key in keys if not key.isdecimal()] + [own[1]])
            raise ConfigError(field, expected=own[2], got=own[3]) from error
        expected, _, got = said.removeprefix("Expected ").partition(", got ")
        if said.startswith("Invalid enum value"):
            expected = f"one of {', '.join(map(str, get_args(_type_at(kind, keys))))}"
        value = _at(plain, keys)
        if got == type(value).__name__:  # the type alone does not help to find it
            got = f"{got} {value!r:.60}"
        raise ConfigError(field, expected=expected, got=got or repr(value)) from error


def _type_at(kind: Any, keys: list[str]) -> Any:
    """Return the type at ``keys`` within the struct type ``kind``."""
    for key in keys:
        kind = get_args(kind)[0] if key.isdecimal() else get_type_hints(kind)[key]
    return kind


def _at(values: Any, keys: list[str]) -> Any:
    for key in keys:
        values = values[int(key) if key.isdecimal() else key]
    return values


def with_settings(base: S, given: Mapping[str, Any]) -> S:
    """Return a configuration with keys replaced.

    Args:
        base: a struct, whose fields may be structs.
        given: values by key: its path (``training.steps``), its last part alone where that names
            one key, the one least deep taken (``bin_width``); or a section and a dict of its keys.

    Raises:
        ConfigError: an unknown key, a part that several keys share, a wrong type.
    """
    if not given:
        return base
    content = msgspec.to_builtins(base)
    _replace(content, type(base), given)
    return to_struct(content, type(base), "settings", strict=False)


def _replace(content: dict[str, Any], kind: type[msgspec.Struct], given: Mapping[str, Any]) -> None:
    """Apply ``with_settings`` to a struct in the form of nested dicts."""
    kinds = _kinds(kind)
    for key, value in given.items():
        named = {p: p.count(".") for p in kinds if p == key or p.endswith(f".{key}")}
        found = [p for p, depth in named.items() if depth == min(named.values())]
        if len(found) != 1:
            close = get_close_matches(key, [*kinds, *(p.rpartition(".")[2] for p in kinds)], 1)
            hint = f", did you mean {close[0]}?" if close else ""
            expected = f"one of {', '.join(found)}" if found else f"a known key{hint}"
            raise ConfigError(key, expected=expected, got=f"{key} = {value!r}")
        *sections, last = found[0].split(".")
        at = content
        for section in sections:
            at = at[section]
        within = kinds[found[0]]
        if not isinstance(value, Mapping) or within is dict:
            at[last] = value
        elif within is None:
            raise ConfigError(found[0], expected="a value, not a section", got=repr(value))
        else:
            _replace(at[last], within, value)


def _kinds(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Every key of a struct and of the structs within, by its path; the struct it is, ``dict``, or
    None."""
    found: dict[str, Any] = {}
    for f in msgspec.structs.fields(kind):
        section = isinstance(f.type, type) and issubclass(f.type, msgspec.Struct)
        found[f.name] = f.type if section else dict if get_origin(f.type) is dict else None
        if section:
            found |= {f"{f.name}.{path}": within for path, within in _kinds(f.type).items()}
    return found
