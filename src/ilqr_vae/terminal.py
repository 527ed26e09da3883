"""Console output of the verbs: plain text, safe for any names in it.

Names of units, channels, sessions and files come from recordings. Rich would interpret ``[cm/s]``
as markup and ``:x:`` as an emoji, and a terminal would execute control characters. All consoles of
the project are created here, where none of that happens; styles are passed separately.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import textwrap
import webbrowser
from typing import Any

from rich.console import Console
from rich.text import Text

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""The signals of this system that ask a process to stop."""


def visible(text: str) -> str:
    """The text with everything that does not print as an escape: a newline as ``\\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Plain(Console):
    """A console that does not interpret markup, and prints each string on its own line.

    On a terminal, long lines are wrapped between words and indented. Elsewhere lines are not
    changed, for programs that read them.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        text = visible(text)
        if self.is_terminal and len(text) > self.width:
            lead = " " * (len(text) - len(text.lstrip()) + 2)
            text = textwrap.fill(
                text,
                self.width,
                subsequent_indent=lead,
                break_long_words=False,
                break_on_hyphens=False,
            )
        return super().render_str(text, **options)


def console(*, stderr: bool = False, width: int | None = None, soft_wrap: bool = False) -> Console:
    """Return a console that prints strings unchanged.

    Args:
        width: width in characters; None for the terminal's.
        soft_wrap: let the terminal wrap long lines, so that copied text has no breaks.
    """
    return _Plain(
        stderr=stderr, width=width, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False
    )


_ASCII = {"–": "-", "±": "+-", "°": "deg", "²": "2", "…": "...", "×": "x"}


def _plainer(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that cannot be encoded by ASCII equivalents, or else by escapes."""
    if isinstance(error, UnicodeEncodeError):
        found = error.object[error.start]
        if found in _ASCII:
            return _ASCII[found], error.start + 1
    return codecs.backslashreplace_errors(error)


def any_encoding() -> None:
    """Make standard output and error accept any text, replacing what they cannot encode."""
    codecs.register_error("ilqr_vae.plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ilqr_vae.plainer")


def has_browser() -> bool:
    """Return whether a user would see a browser page: a terminal, a display, and no CI."""
    if os.environ.get("CI") or not (sys.stdout.isatty() and sys.stdin.isatty()):
        return False
    shown = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in shown):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True
