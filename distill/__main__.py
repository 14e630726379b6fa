"""The command line's door: errors of a user's become one line and an exit code."""

from __future__ import annotations

import os
import signal
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
    from distill.progress import tell

    # Newer typers carry a click of their own: its base error is found by way of a name that typer exports.
    click_error: type[Any] = next(
        kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
    )
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("DISTILL_DEBUG"))
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]

    def fail(message: object, code: int) -> None:
        """End with a line, of all processes of the job one."""
        if processes.speaks():
            tell(f"distill: {_line(message)}")
        sys.exit(code)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it stops what Ctrl-C stops, and as well
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
        fail(f"{message[:1].lower()}{message[1:].rstrip('.')}{hint}", 2)
    except (KeyboardInterrupt, typer.Abort) as error:
        lost = processes.loss(error)
        fail(lost or "stopped; `distill runs` shows what can be resumed", Interrupted.exit_code)
    except DistillError as error:
        if debug:
            raise
        fail(error, error.exit_code)
    except Exception as error:
        lost = processes.loss(error)
        if not debug and lost is not None:
            fail(lost, lost.exit_code)
        if not debug and isinstance(error, OSError):  # most of the machine's own say enough: a full disk, …
            fail(error, DistillError.exit_code)
        if debug or processes.speaks():
            raise
        sys.exit(1)
    finally:
        if processes.count() > 1:
            processes.deaf()


if __name__ == "__main__":
    main()
