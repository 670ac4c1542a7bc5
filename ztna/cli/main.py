"""The `ztna` command: its groups, common options, and what an error looks like.

Commands are imported when they are named, so that `ztna version` and completion start fast. An
error of ours ends in one message on stderr and the exit code of its kind (`ztna.errors`);
a stack trace is printed only with -vv. Any other error is a bug of ours, unless it is that the
output cannot be written: a line, too, and the trace with -v. A node's bug always has its trace:
nobody can have it fail once more to see that.
"""

import errno
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import rich_click as click
from click.shell_completion import get_completion_class

from ztna.cli.text import printable
from ztna.core.error_groups import leaves
from ztna.errors import LocalProtocolError, SystemSetupError, ZtnaError

_VERBOSITY = "ztna.verbosity"
# What shells expect of a process that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130
# What writing to a file or device gives that takes no more (write(2)).
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})

F = TypeVar("F", bound=Callable[..., Any])


class ZtnaGroup(click.RichGroup):
    """The root group: commands by name from other modules, errors of ours as messages.

    lazy: command -> "module:object".
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})
        self.verbosity = 0  # of the command that ran last, for who reports how it ended

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted; nothing is imported."""
        return sorted({*super().list_commands(ctx), *self._lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command; its module is imported here."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, _, name = self._lazy[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn errors of ours into a message and an exit code."""
        result, code = None, 0
        try:
            result = super().invoke(ctx)
        except* ZtnaError as group:
            code = _report(group, with_trace=verbosity(ctx) >= 2)
        except* KeyboardInterrupt:
            code = INTERRUPTED
        if code:
            ctx.exit(code)
        return result


def _report(group: BaseExceptionGroup[ZtnaError], *, with_trace: bool) -> int:
    """Print each error once; return the exit code of the first."""
    errors = [error for error in leaves(group) if isinstance(error, ZtnaError)]
    if with_trace:
        click.echo("".join(traceback.format_exception(group)), err=True, nl=False)
    for text in dict.fromkeys(printable(str(error)) for error in errors):
        click.echo(f"ztna: error: {text}", err=True)
    return errors[0].exit_code


def verbosity(ctx: click.Context) -> int:
    """How many -v were given, before and after the command's name."""
    return int(ctx.meta.get(_VERBOSITY, 0))


def keep_trace(ctx: click.Context) -> None:
    """Whatever bug ends this command is told with its trace."""
    group = ctx.find_root().command
    if isinstance(group, ZtnaGroup):
        group.verbosity = max(group.verbosity, 1)


def verbose_option(command: F) -> F:
    """Add -v/--verbose to a command."""

    def count(ctx: click.Context, _: click.Parameter, value: int) -> None:
        ctx.meta[_VERBOSITY] = verbosity(ctx) + value
        group = ctx.find_root().command
        if isinstance(group, ZtnaGroup):
            group.verbosity = verbosity(ctx)

    option = click.option(
        "-v",
        "--verbose",
        count=True,
        metavar=" ",
        expose_value=False,
        callback=count,
        help="Say more; twice: stack traces, and what the libraries say.",
    )
    return option(command)


@click.group(
    cls=ZtnaGroup,
    lazy={
        "run": "ztna.cli.run:run",
        "config": "ztna.cli.config:config",
        "lab": "ztna.cli.lab:lab",
        "nat-probe": "ztna.cli.nat_probe:nat_probe",
        "paths": "ztna.cli.seen:paths",
        "ping": "ztna.cli.seen:ping",
        "pki": "ztna.cli.pki:pki",
        "policy": "ztna.cli.policy:policy",
        "status": "ztna.cli.seen:status",
        "why": "ztna.cli.seen:why",
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
@verbose_option
def cli() -> None:
    """Reach private applications behind NATs, without opening a port.

    Example: ztna run agent --config agent.json
    """


@cli.command()
def version() -> None:
    """Print the version.

    Example: ztna version
    """
    try:
        number = importlib.metadata.version("ztna")
    except importlib.metadata.PackageNotFoundError:
        number = "(not installed, run from its source)"
    click.echo(f"ztna {number}")


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes ztna's commands in a shell.

    Example: ztna completion bash > ~/.local/share/bash-completion/completions/ztna
    """
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(cli, {}, "ztna", "_ZTNA_COMPLETE").source())


def main() -> None:
    """Entry point of the `ztna` program."""
    sys.excepthook = _end
    cli(prog_name="ztna")


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The interpreter's last word on an error that nobody has caught: say it, and end with the
    code of its kind."""
    if not isinstance(error, Exception):
        sys.__excepthook__(kind, error, trace)
        return
    if isinstance(error, OSError) and error.errno in _FULL:
        code = SystemSetupError.exit_code
        text = f"ztna: error: the output cannot be written: {error.strerror}"
    else:
        code = LocalProtocolError.exit_code
        what = "; ".join(dict.fromkeys(_bug(each) for each in leaves(error)))
        text = f"ztna: internal error: {printable(what)}. This is a bug of ours"
        if cli.verbosity:
            text = "".join(traceback.format_exception(error)) + text
        else:
            text += "; -v shows its trace"
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    sys.exit(code)


def _bug(error: BaseException) -> str:
    """What it is, and where of our code it came from."""
    here = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(here)]
    where = f" at {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {error}{where}"
