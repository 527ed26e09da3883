"""The command line ``ilqr-vae``: finds the entry point of a verb and imports nothing else.

Each package registers its verbs under the entry-point group ``ilqr_vae.verbs``; an entry is a
``typer.Typer`` application holding one command. ``ilqr-vae replay`` therefore never imports torch.

Exit codes: 0 done; 1 a journal's answers differ, or recordings of an archive failed; 2 the input or
usage is wrong; 3 the service refused, is not reachable or cannot start; 4 training cannot go on;
130 interrupted.
"""

from __future__ import annotations

import _thread
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from inspect import getdoc
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from ilqr_vae.errors import IlqrVaeError, did_you_mean
from ilqr_vae.terminal import any_encoding, console

GROUP = "ilqr_vae.verbs"
COMPLETING = "_ILQR_VAE_COMPLETE"
_AGAIN_S = 0.1
_AS_IT_IS = "\b\n"

# One line per verb, here so that --help need not import their packages.
SUMMARIES = {
    "demo": "run all of it: simulate, train, serve, replay, report",
    "simulate": "simulate a realistic reaching session and write it as NWB",
    "train": "fit a model to a recording and write it as one file",
    "adapt": "fit a model to other units of the same brain, without labels",
    "follow": "keep a served model calibrated to the stream it decodes",
    "evaluate": "score a model's causal decodes on a span of a recording",
    "sweep": "search over settings and seeds for the best model, on Ray",
    "archive": "train on or decode every recording of a folder, on Ray",
    "inspect": "show what is inside a model, a recording or a journal",
    "experiment": "run the paper's experiments, or compare decoders on data",
    "serve": "load a model and answer spike bins over ZeroMQ",
    "fleet": "serve a model by many servers on a Ray cluster",
    "replay": "stream a recording through a running service, and report",
    "verify": "run a journal again and compare every answer, bit for bit",
    "export": "write a session of a service's journal as NWB",
    "record": "write a session as NWB while it runs, from any machine",
    "bridge": "feed a session from LSL, Open Ephys or Synapse",
    "keys": "make the keys of those a service lets in",
    "models": "list, load, swap or roll back a running service's models",
    "load": "load a running service with many sessions and faults",
    "monitor": "watch a running service live in the terminal",
    "dashboard": "show a running service live in a browser",
    "closed-loop": "let a simulated subject reach through a running service",
}


def _help(verbs: dict[str, EntryPoint]) -> str:
    lines = ["Usage: ilqr-vae VERB [OPTIONS]", "", "Verbs:"]
    width = max((len(name) for name in verbs), default=0)
    order = [v for v in SUMMARIES if v in verbs] + sorted(set(verbs) - set(SUMMARIES))
    lines += [f"  {name:<{width}}  {SUMMARIES.get(name, '')}".rstrip() for name in order]
    lines += [
        "",
        "ilqr-vae VERB --help says what a verb takes, with an example.",
        "ilqr-vae --install-completion lets your shell complete verbs and options.",
    ]
    return "\n".join(lines)


def command_of(app: typer.Typer) -> Any:  # typer ships its own copy of click's types
    """Return the command of a verb, with its help as plain text for 80 columns.

    Paragraphs are wrapped to the terminal. Lines of an epilog are kept, since they are examples to
    copy. An option's value is named by its type only; its range is in the help.
    """
    app.rich_markup_mode = None  # boxes would leave too little room for the text
    for info in app.registered_commands:
        text = info.help or getdoc(info.callback) or ""
        info.help = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
        if info.epilog and not info.epilog.startswith(_AS_IT_IS):
            each = re.sub(r"^(\w[^:\n]*:) ", r"\1\n  ", info.epilog, flags=re.MULTILINE)
            info.epilog = _AS_IT_IS + each
    command = get_command(app)
    for one in (command, *getattr(command, "commands", {}).values()):
        context = typer.Context(one)
        for param in one.params:
            if isinstance(param, TyperArgument):
                param.metavar = param.name.upper()
            elif isinstance(param, TyperOption) and not param.is_flag:
                shown = param.metavar or param.display_type(context)
                plain = re.sub(r" range|list\[(.*)\]", r"\1", shown)
                param.metavar = plain.replace("Path", "path")
    return command


def _completion(verbs: dict[str, EntryPoint]) -> int:
    """Complete or install completion: typer's completion over all verbs.

    The module of a verb is imported only once the verb is typed.
    """

    class Verbs(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return sorted(verbs)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return TyperCommand(cmd_name, short_help=SUMMARIES.get(cmd_name, ""))

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            found = verbs.get(args[0])
            return args[0], None if found is None else command_of(found.load()), args[1:]

    app = typer.Typer(cls=Verbs, add_completion=True)
    app.callback()(lambda: None)
    try:
        app(prog_name="ilqr-vae")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _refused(text: str, code: int) -> int:
    """Print what is wrong; return the exit code."""
    console(stderr=True, soft_wrap=True).print(f"error: {text}")
    return code


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return the exit code (see the module's docstring).

    While the verb itself runs, Ctrl-C raises ``KeyboardInterrupt``, whatever the program set.
    """
    try:
        return _run(argv)
    except KeyboardInterrupt:  # also while a verb's packages are imported, which takes seconds
        return _interrupted()


@contextmanager
def _interruptible() -> Generator[None]:
    """Have Ctrl-C raise ``KeyboardInterrupt``, again if a destructor swallowed it."""
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield  # SIGINT is ignored, or not ours to handle
        return

    again = threading.Timer(_AGAIN_S, _thread.interrupt_main)  # not within the hook
    again.daemon = True

    def unraisable(swallowed: sys.UnraisableHookArgs) -> None:
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            hook(swallowed)
        elif again.ident is None:
            again.start()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        again.cancel()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = hook


def _interrupted() -> int:
    console(stderr=True).print("interrupted")
    return 130


def _run(argv: list[str] | None) -> int:
    any_encoding()
    args = list(sys.argv[1:] if argv is None else argv)
    verbs = {entry.name: entry for entry in entry_points(group=GROUP)}
    if COMPLETING in os.environ or args[:1] in (["--install-completion"], ["--show-completion"]):
        return _completion(verbs)
    if not args or args[0] in {"-h", "--help", "help"}:
        print(_help(verbs))
        return 0
    if args[0] == "--version":
        print(version("ilqr-vae"))
        return 0
    verb, rest = args[0], args[1:]
    if verb not in verbs:
        hint = did_you_mean(verb, verbs)
        return _refused(f"verb: expected one of {', '.join(verbs)}, got {verb!r}{hint}", 2)
    try:
        app = verbs[verb].load()
    except ModuleNotFoundError as missing:
        text = f"{verb}: expected the package {missing.name!r} to be installed, got none; "
        return _refused(f"{text}try: pip install '.[engine]'", 2)
    except (ImportError, OSError, MemoryError) as error:
        return _refused(f"{verb}: expected its libraries to load, got {error}", 3)
    try:
        command = command_of(app)
        with _interruptible():
            command(args=rest, prog_name=f"ilqr-vae {verb}")
    except IlqrVaeError as error:
        return _refused(str(error), error.exit_code)
    except MemoryError:
        return _refused(f"{verb}: expected enough memory, got none that is left (ulimit -v)", 3)
    except OSError as error:  # wherever a path was first looked at
        if error.errno != errno.ENAMETOOLONG:
            raise
        length = len(str(error.filename))
        return _refused(
            f"{verb}: expected a path that the system takes, got {length} characters", 2
        )
    except SystemExit as stop:
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            return _interrupted()  # the verb did not handle it
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
