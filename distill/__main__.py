"""The command line's door: errors of a user's become one line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


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
            tell(f"distill: {message}")
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
        if debug or (lost is None and processes.speaks()):
            raise
        if lost is None:
            sys.exit(1)
        fail(lost, lost.exit_code)
    finally:
        if processes.count() > 1:
            processes.deaf()


if __name__ == "__main__":
    main()
