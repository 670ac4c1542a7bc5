"""Commands are there, errors are one message, exit codes tell the kind."""

import subprocess
import sys
from pathlib import Path

import pytest
import rich_click as click
from click.testing import CliRunner

from ztna.cli.main import ZtnaGroup, cli, verbose_option
from ztna.errors import IdentityError, RefusedError, UnreachableError, ZtnaError

PROGRAM = [sys.executable, "-c", "from ztna.cli.main import main; main()"]


def group_that_raises(error: BaseException) -> click.Group:
    @click.group(cls=ZtnaGroup)
    @verbose_option
    def root() -> None:
        pass

    @root.command()
    @verbose_option
    def fail() -> None:
        raise error

    return root


@pytest.mark.parametrize("kind", [IdentityError, RefusedError, UnreachableError])
def test_error_is_one_line_and_an_exit_code(kind: type[ZtnaError]) -> None:
    result = CliRunner().invoke(group_that_raises(kind("what and where")), ["fail"])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "ztna: error: what and where\n"
    assert result.stdout == ""


def test_groups_are_looked_into_and_each_message_is_told_once() -> None:
    error = ExceptionGroup(
        "nursery",
        [
            ExceptionGroup("inner", [RefusedError("no")]),
            UnreachableError("gone"),
            RefusedError("no"),
        ],
    )
    result = CliRunner().invoke(group_that_raises(error), ["fail"])
    assert result.stderr == "ztna: error: no\nztna: error: gone\n"
    assert result.exit_code == RefusedError.exit_code


def test_messages_cannot_steer_the_terminal() -> None:
    result = CliRunner().invoke(group_that_raises(RefusedError("a\x1b[2J")), ["fail"])
    assert result.stderr == "ztna: error: a\\x1b[2J\n"


def test_other_errors_keep_their_trace() -> None:
    error = ExceptionGroup("nursery", [RefusedError("no"), LookupError("a bug")])
    result = CliRunner().invoke(group_that_raises(error), ["fail"])
    assert isinstance(result.exception, ExceptionGroup)
    assert result.exception.subgroup(LookupError)
    assert result.exception.subgroup(ZtnaError) is None


def test_ctrl_c_ends_with_130() -> None:
    error = BaseExceptionGroup("nursery", [KeyboardInterrupt()])
    assert CliRunner().invoke(group_that_raises(error), ["fail"]).exit_code == 130
    assert CliRunner().invoke(group_that_raises(KeyboardInterrupt()), ["fail"]).exit_code == 130


@pytest.mark.parametrize("arguments", [["fail", "-vv"], ["-vv", "fail"], ["-v", "fail", "-v"]])
def test_trace_only_on_demand(arguments: list[str]) -> None:
    error = RefusedError("no")
    assert "Traceback" not in CliRunner().invoke(group_that_raises(error), ["fail", "-v"]).stderr
    assert "Traceback" in CliRunner().invoke(group_that_raises(error), arguments).stderr


def walk(
    command: click.Command, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], click.Command]:
    found = {path: command}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found |= walk(inner, (*path, name))
    return found


def test_every_command_is_there() -> None:
    paths = {" ".join(path) for path in walk(cli)}
    assert paths >= {
        "run agent",
        "run connector",
        "run intermediate",
        "config check",
        "config schema",
        "pki",
        "version",
        "completion",
    }


def test_every_help_text_holds_an_example() -> None:
    for path, command in walk(cli).items():
        assert command.help is not None
        words = " ".join(("ztna", *path))
        assert "Example" in command.help, words
        assert words in command.help, words
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), words


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(cli, ["runn"])
    assert result.exit_code == 2
    assert "No such command" in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(cli, ["version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("ztna ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_ZTNA_COMPLETE" in result.stdout


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    """The start's time is the imports' time, and counting them does not flicker."""
    code = (
        "import sys; from click.testing import CliRunner; from ztna.cli.main import cli;"
        "assert CliRunner().invoke(cli, ['version']).exit_code == 0;"
        "print(sorted({'trio', 'aioquic', 'cryptography', 'cattrs', 'structlog', 'rich.console'}"
        " & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_real_process_ends_with_a_message_and_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "agent.json"
    file.write_text('{"tun": 5,\n "services": []}')
    arguments = [*PROGRAM, "run", "agent", "--config", str(file)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("ztna: error: 3 problems in the configuration:\n")
    assert f"{file}:1: $.tun: 5 is wrong; expected an object" in done.stderr
    assert "Traceback" not in done.stderr


def test_who_asks_a_role_does_not_load_what_the_role_is_made_of() -> None:
    """That takes a second, and a person waits."""
    program = "import sys, ztna.cli.seen; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert "ztna" in loaded
    assert not loaded & {"aioquic", "service_identity"}


@pytest.mark.parametrize("words", [["version"], ["--help"], ["config", "schema", "agent"]])
def test_output_that_cannot_be_written(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == ("ztna: error: the output cannot be written: No space left on device\n")
    assert done.returncode == 7


CRASH = """
from ztna.cli import main

@main.cli.command("crash")
@main.verbose_option
def crash():
    raise ExceptionGroup("nursery", [main.ZtnaError("words"), LookupError("a \\x1b[2J bug")])

@main.cli.command("node")
@main.verbose_option
@main.click.pass_context
def node(ctx):
    main.keep_trace(ctx)
    raise LookupError("a bug")

main.main()
"""


def test_a_bug_that_ends_a_node_leaves_its_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "node"], capture_output=True, text=True, check=False
    )
    first, *_, last = done.stderr.splitlines()
    assert (done.returncode, first[:9]) == (70, "Traceback")
    assert last.startswith("ztna: internal error: LookupError: a bug at ")
    assert last.endswith(". This is a bug of ours")


@pytest.mark.parametrize(("option", "trace"), [([], False), (["-v"], True)])
def test_a_bug_is_a_line_and_exit_code_70(option: list[str], trace: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "crash", *option],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 70
    first, *_, last = done.stderr.splitlines()
    assert first == "ztna: error: words"
    assert last.startswith("ztna: internal error: LookupError: a \\x1b[2J bug")
    assert ("Traceback" in done.stderr) == trace
