"""Where the machine code of compiled kernels is kept between runs."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from numba import config
from numba.core.caching import FunctionCache

_log = logging.getLogger(__name__)
_ROOM = 64 << 20
_UNUSED_S = 30 * 86400


def cache_folder(sources: Path) -> Path | None:
    """Where machine code is kept: a folder named by a digest of all files that kernels are in.

    numba itself compares the file of an entry point alone. The folder lies in NUMBA_CACHE_DIR,
    beside the sources, or in the user's cache: the first of them that can be written and has room.
    Folders beside it that are named so and have been unused for 30 days are removed.

    Returns:
        The folder, which exists; None, with a warning, where there is none.
    """
    files = sorted(sources.glob("*.py"))
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    stated: str = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]  # of NUMBA_*
    own = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    tried = [*filter(None, [stated]), str(sources / "__pycache__"), f"{own}/ilqr-vae"]
    for name in tried:
        folder = Path(name) / f"kernels-{digest[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            if shutil.disk_usage(folder).free >= _ROOM:
                _remove_unused(folder)
                return folder
        except OSError:
            continue
    _log.warning(
        "kernels are compiled anew by each process: none of %s can be written and has %d MB free "
        "(NUMBA_CACHE_DIR names a folder to keep them in)",
        ", ".join(tried),
        _ROOM >> 20,
    )
    return None


def _remove_unused(used: Path) -> None:
    with suppress(OSError):
        os.utime(used)
    for folder in used.parent.glob("kernels-" + 16 * "[0-9a-f]"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - folder.stat().st_mtime > _UNUSED_S:
                shutil.rmtree(folder)


class KernelCache(FunctionCache):
    """A function's machine code on disk. Files that fail cost a compilation and one warning."""

    _warned = False

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Generator[None]:  # around each load and save
        try:
            yield
        except Exception as error:  # unpickling a damaged file may raise any
            self.disable()
            if not KernelCache._warned:
                KernelCache._warned = True
                _log.warning(
                    "kernels are compiled anew by each process: %s cannot be used (%s: %s)",
                    self.cache_path,
                    type(error).__name__,
                    error,
                )
