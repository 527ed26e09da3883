"""What the verbs print: text as it is, whatever the names in it.

Names of units, channels, sessions and files come from recordings. Rich would take ``[cm/s]`` for
markup and ``:x:`` for a picture, and a terminal would act on control characters. Every console of
the project is made here, where none of that happens; styles are given beside the text.
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
"""The signals that ask a process to stop, on this system."""


def visible(text: str) -> str:
    """The text with everything that does not print as an escape: a newline as ``\\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Plain(Console):
    """Takes no string for markup, and prints each on its own line.

    On a terminal, words that do not fit go to the next line, indented; none is broken. Elsewhere
    lines stay as they are, for what reads them.
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
    """A console that prints strings as they are.

    Args:
        width: in characters; None is the terminal's.
        soft_wrap: leave long lines to the terminal, so that what is copied has no breaks.
    """
    return _Plain(
        stderr=stderr, width=width, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False
    )


_ASCII = {"–": "-", "±": "+-", "°": "deg", "²": "2", "…": "...", "×": "x"}


def _plainer(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace what cannot be encoded by what says the same in ASCII, else by an escape."""
    if isinstance(error, UnicodeEncodeError):
        found = error.object[error.start]
        if found in _ASCII:
            return _ASCII[found], error.start + 1
    return codecs.backslashreplace_errors(error)


def any_encoding() -> None:
    """Have standard output and error take any text: what they cannot encode is made plainer."""
    codecs.register_error("ilqr_vae.plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ilqr_vae.plainer")


def has_browser() -> bool:
    """Whether a person sits here who would see a page that is opened: a terminal, a display, and
    no continuous integration."""
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
