"""`python -m ztna`, and what the `ztna` script calls: the time in which modules are loaded counts,
too, for whoever presses Ctrl-C."""

import sys


def main() -> None:
    """Entry point of the `ztna` program."""
    try:
        from ztna.cli import main as command  # noqa: PLC0415 - within the `try`, that is the point

        command.main()
    except KeyboardInterrupt:
        sys.exit(130)  # `ztna.cli.main.INTERRUPTED`


if __name__ == "__main__":
    main()
