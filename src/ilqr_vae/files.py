"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from ilqr_vae.errors import ConfigError

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
