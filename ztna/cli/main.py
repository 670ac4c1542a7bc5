"""The `ztna` command: its groups, common options, and what an error looks like.

Commands are imported when they are named, so that `ztna version` and completion start fast. An
error of ours ends in one message on stderr and the exit code of its kind (`ztna.errors`);
a stack trace is printed only with -vv.
"""

import importlib
import importlib.metadata
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import rich_click as click
from click.shell_completion import get_completion_class

from ztna.cli.text import printable
from ztna.core.error_groups import leaves
from ztna.errors import ZtnaError

_VERBOSITY = "ztna.verbosity"
# What shells expect of a process that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130

F = TypeVar("F", bound=Callable[..., Any])


class ZtnaGroup(click.RichGroup):
    """The root group: commands by name from other modules, errors of ours as messages.

    lazy: command -> "module:object".
    """

    def __init__(self, *args: Any, lazy: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy = dict(lazy or {})

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


def verbose_option(command: F) -> F:
    """Add -v/--verbose to a command."""

    def count(ctx: click.Context, _: click.Parameter, value: int) -> None:
        ctx.meta[_VERBOSITY] = verbosity(ctx) + value

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
    cli(prog_name="ztna")
