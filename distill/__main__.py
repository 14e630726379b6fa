"""The command line's door: errors of a user's become one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any


def _line(message: object) -> str:
    """Make a message one line that fits a screen, whatever names are in it."""
    return f"{' '.join(str(message).splitlines()):.1000}"


def main() -> None:
    """Run ``distill``; exit with the code of distill.errors."""
    import typer

    from distill import processes
    from distill.cli import app
    from distill.errors import DistillError, Interrupted
    from distill.progress import say

    # Newer typers carry a click of their own: its base error is found by way of a name that typer exports.
    click_error: type[Any] = next(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    )
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("DISTILL_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    try:
        code = app(arguments, prog_name="distill", standalone_mode=False)
        processes.leave()
        sys.exit(code if isinstance(code, int) else 0)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except click_error as error:
        if debug:
            raise
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        message = error.format_message()
        say(f"distill: {message[:1].lower()}{_line(message)[1:].rstrip('.')}{hint}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        say("distill: stopped; `distill runs` shows what can be resumed")
        sys.exit(Interrupted.exit_code)
    except (
        DistillError,
        OSError,
    ) as error:  # of the machine's errors most say enough: a full disk, a folder not ours
        if debug:
            raise
        say(f"distill: {_line(error)}")
        sys.exit(getattr(error, "exit_code", DistillError.exit_code))


if __name__ == "__main__":
    main()
