"""The program ``ilqr-vae``, also as ``python -m ilqr_vae``.

Ctrl-C ends the process at once, except while a verb runs (see ``cli.main``). An import must not be
interrupted by an exception: some libraries swallow it, or fail differently.
"""

# ``signal`` itself would take milliseconds to import, in which Ctrl-C shows a traceback.
import _signal  # pyright: ignore
import os
import sys


def _end(*_: object) -> None:
    os._exit(130)


if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not if it is ignored
    _signal.signal(_signal.SIGINT, _end)


def main() -> int:
    """Run the verb in ``sys.argv``; return the exit code."""
    from ilqr_vae.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
