"""The one command line, ``ilqr-vae``: finds the verb's entry point and imports nothing else.

Each package registers its verbs under the entry-point group ``ilqr_vae.verbs``; an entry is a
``typer.Typer`` application holding one command. ``ilqr-vae replay`` therefore never imports torch.

Exit codes: 0 done; 1 a journal's answers differ, or recordings of an archive failed; 2 the input or
usage is wrong; 3 the service refused, is not reachable or cannot start; 4 training cannot go on;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points, version
from inspect import getdoc
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from ilqr_vae.errors import IlqrVaeError
from ilqr_vae.terminal import any_encoding, visible

GROUP = "ilqr_vae.verbs"
COMPLETING = "_ILQR_VAE_COMPLETE"

# One line a verb, here so that --help need not import the packages that hold them.
SUMMARIES = {
    "demo": "all of it in one go: simulate, train, serve, replay, report",
    "simulate": "simulate a realistic reaching session and write it as NWB",
    "train": "fit a model to a recording and write it as one .safetensors file",
    "adapt": "fit a model to other units of the same brain, without labels",
    "follow": "keep a served model calibrated to the stream it decodes",
    "evaluate": "score a model's causal decodes on a span of a recording, beside a Wiener filter",
    "sweep": "search over settings and seeds for the model that scores best, side by side on Ray",
    "archive": "train on, evaluate or decode every recording of a folder, side by side on Ray",
    "inspect": "show what is inside a model, a recording or a journal",
    "experiment": "run one of the paper's experiments on simulated data",
    "serve": "load a model and answer spike bins over ZeroMQ",
    "fleet": "serve a model by many servers on the nodes of a Ray cluster, behind one address",
    "replay": "stream a recording through a running service and report decodes and latency",
    "verify": "run a service's journal again and compare every answer, bit for bit",
    "export": "write a session of a service's journal as NWB",
    "record": "write a session as NWB while it runs, from any machine that may read it",
    "bridge": "feed a session from the lab streaming layer, Open Ephys or Synapse",
    "keys": "make the keys of those a service lets in",
    "models": "list, load, swap or roll back the models of a running service",
    "load": "load a running service with many sessions and faults, and report latency",
    "monitor": "watch a running service live in the terminal",
    "dashboard": "show a running service live in a browser",
    "closed-loop": "let a simulated subject reach for targets through a running service",
}


def _help(verbs: dict[str, EntryPoint]) -> str:
    lines = ["Usage: ilqr-vae VERB [OPTIONS]", "", "Verbs:"]
    width = max((len(name) for name in verbs), default=0)
    order = [v for v in SUMMARIES if v in verbs] + sorted(set(verbs) - set(SUMMARIES))
    lines += [f"  {name:<{width}}  {SUMMARIES.get(name, '')}".rstrip() for name in order]
    lines += ["", "ilqr-vae VERB --help says what a verb takes, with an example."]
    lines += ["ilqr-vae --install-completion lets your shell complete verbs and options."]
    return "\n".join(lines)


def _rewrap(app: typer.Typer) -> None:
    """Leave the breaking of lines of help to the terminal's width: keep paragraphs alone."""
    for command in app.registered_commands:
        text = command.help or getdoc(command.callback) or ""
        command.help = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _completion(verbs: dict[str, EntryPoint]) -> int:
    """Answer the shell, or install what asks: typer's completion over all verbs.

    A verb's own module is imported only once the verb is typed.
    """

    class Verbs(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return sorted(verbs)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return TyperCommand(cmd_name, short_help=SUMMARIES.get(cmd_name, ""))

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            found = verbs.get(args[0])
            return args[0], None if found is None else get_command(found.load()), args[1:]

    app = typer.Typer(cls=Verbs, add_completion=True)
    app.callback()(lambda: None)
    try:
        app(prog_name="ilqr-vae")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code (see the module's docstring)."""
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
        near = get_close_matches(verb, verbs, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        print(
            f"error: verb: expected one of {', '.join(verbs)}, got {verb!r}{hint}",
            file=sys.stderr,
        )
        return 2
    try:
        app = verbs[verb].load()
    except ModuleNotFoundError as missing:
        print(
            f"error: {verb}: expected the package {missing.name!r} to be installed, got none; "
            "try: pip install '.[engine]'",
            file=sys.stderr,
        )
        return 2
    except (ImportError, OSError, MemoryError) as error:
        print(f"error: {verb}: expected its libraries to load, got {error}", file=sys.stderr)
        return 3
    _rewrap(app)
    try:
        app(args=rest, prog_name=f"ilqr-vae {verb}")
    except IlqrVaeError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
