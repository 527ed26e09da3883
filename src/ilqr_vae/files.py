"""Files written whole or not at all; settings by their keys."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ilqr_vae.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)

STDOUT = Path("-")
"""As an output path: standard output."""


def check_writable(path: Path | None, field: str) -> None:
    """Refuse an output path before the work begins rather than after.

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
    """Refuse an output folder, which may have to be made, before the work begins.

    Raises:
        ConfigError: there is a file in its place or above it, or it cannot be written.
    """
    there = path.absolute()
    while not os.path.exists(there):  # unlike Path.exists it is False where one may not look
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        raise ConfigError(field, expected="a folder that can be written", got=f"{there} {why}")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside ``path`` and rename: what is at ``path`` is the old file or the new one.

    ``-`` is standard output.

    Raises:
        ConfigError: the folder cannot be written.
    """
    raw = content.encode() if isinstance(content, str) else content
    if path == STDOUT:
        sys.stdout.flush()
        sys.stdout.buffer.write(raw)
        sys.stdout.buffer.flush()
        return
    try:
        handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            str(path), expected="a file that can be written", got=str(error)
        ) from error


def with_settings(base: S, given: Mapping[str, Any]) -> S:
    """A configuration with keys replaced.

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
    try:
        return msgspec.convert(content, type(base), strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError("settings", expected="the right types", got=str(error)) from error


def _replace(content: dict[str, Any], kind: type[msgspec.Struct], given: Mapping[str, Any]) -> None:
    """``with_settings`` on a struct as a dict of dicts."""
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
        if not isinstance(value, Mapping):
            at[last] = value
        elif within is None:
            raise ConfigError(found[0], expected="a value, not a section", got=repr(value))
        else:
            _replace(at[last], within, value)


def _kinds(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """Every key of a struct and of the structs within, by its path; the struct it is, or None."""
    found: dict[str, type[msgspec.Struct] | None] = {}
    for f in msgspec.structs.fields(kind):
        section = isinstance(f.type, type) and issubclass(f.type, msgspec.Struct)
        found[f.name] = f.type if section else None
        if section:
            found |= {f"{f.name}.{path}": within for path, within in _kinds(f.type).items()}
    return found
