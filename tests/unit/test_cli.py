# SPDX-License-Identifier: Apache-2.0
"""The command line: fast help, both spellings, data on stdout, words on stderr, one exit code per kind of error."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

from modelslim import __version__, errors
from modelslim.cli import options
from modelslim.cli.errors import EXIT_CODES, describe, exit_code
from modelslim.cli.main import COMMANDS, main
from modelslim.cli.output import Output, pass_output

PROGRAM = [sys.executable, "-m", "modelslim.cli.main"]


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [*PROGRAM, *arguments], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )


class Result(NamedTuple):
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Runs a command by itself, without the program around it."""

    def run_command(command: click.Command, *arguments: str) -> Result:
        with pytest.raises(SystemExit) as stop:
            command.main(list(arguments), prog_name="program")
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return run_command


def test_help_lists_all_commands_in_little_time_and_imports_nothing_heavy() -> None:
    script = """
import sys
from modelslim.cli.main import main
code = main(["--help"])
heavy = {"torch", "transformers", "jsonschema", "rich", "yaml", "pluggy", "packaging", "safetensors"}
commands = {name for name in sys.modules if name.startswith("modelslim.cli.")}
print(code, sorted(heavy & set(sys.modules)), sorted(commands), file=sys.stderr)
"""
    start = os.times()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds = sum(os.times()[2:4]) - sum(start[2:4])  # of processors, which a busy machine hardly changes
    modules = [f"modelslim.cli.{name}" for name in ("errors", "hints", "logs", "main", "output", "signals")]
    assert result.stderr == f"0 [] {modules}\n"
    width = max(map(len, COMMANDS)) + 2
    for name, line in COMMANDS.items():
        assert f"  {name.ljust(width)}{line}\n" in result.stdout
    assert seconds < 1  # 0.1 s on an idle machine; the promise is 0.3 s


def test_no_arguments_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "Commands:" in captured.out
    assert captured.err == ""


def test_the_version_is_printed() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout.split()[-1]) == (0, __version__)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_commands_help_begins_with_its_line_in_the_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert COMMANDS[name] in capsys.readouterr().out
    command = importlib.import_module(f"modelslim.cli.{name}").command
    assert [option.opts for option in command.params if isinstance(option, click.Option) and not option.help] == []


def test_an_unknown_command_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no command is called 'plugin'\nhint: did you mean 'plugins'?\n"


def test_an_unknown_option_offers_the_nearest_and_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--apiversoin", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No such option")
    assert "--apiversion" in error
    assert "schema --help`" in error


def test_a_usage_error_is_json_too_where_json_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--wrong", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    error = json.loads(captured.out)["error"]
    assert (error["kind"], error["diagnostics"]) == ("UsageError", [])
    assert "--wrong" in error["message"]


@click.command()
@options.model_path_option
@options.save_path_option
@options.device_option
@options.model_type_option
@options.config_path_option
@options.trust_remote_code_option
@options.json_option
@options.quiet_option
@pass_output
def everything(output: Output, /, **values: Any) -> None:
    """Take all shared options."""
    output.note("a note")
    output.warn("a warning")
    output.table("numbers", ["n", "text"], [(1, "[bold]one[/bold]"), (22, "two " * 60)])
    output.data({name: str(value) for name, value in values.items()})


def required(folder: Path) -> list[str]:
    """The options that have no default."""
    (folder / "a.yaml").touch()
    return ["--model_path", str(folder), "--save_path", "x", "--config_path", str(folder / "a.yaml")]


@pytest.mark.parametrize("separator", ["_", "-"])
def test_options_take_the_guides_spelling_and_hyphens(separator: str, tmp_path: Path, invoke: Invoke) -> None:
    config = tmp_path / "a.yaml"
    config.touch()
    words = {
        "model path": str(tmp_path),
        "save path": "new",
        "device": "npu:0",
        "model type": "Tiny",
        "config path": str(config),
        "trust remote code": "tRUE",
    }
    arguments = [part for name, value in words.items() for part in (f"--{name.replace(' ', separator)}", value)]
    result = invoke(everything, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {
        **{name.replace(" ", "_"): value for name, value in words.items()},
        "trust_remote_code": "True",
    }


def test_what_is_left_out_has_its_default(tmp_path: Path, invoke: Invoke) -> None:
    values = json.loads(invoke(everything, *required(tmp_path), "--json").stdout)
    assert (values["device"], values["model_type"]) == ("None", "None")
    assert values["trust_remote_code"] == "False"


def test_help_and_messages_show_one_spelling(invoke: Invoke) -> None:
    shown = invoke(everything, "--help").stdout
    assert "--model_path" in shown
    assert "--model-path" not in shown
    missing = invoke(everything).stderr
    assert "'--model_path'" in missing
    assert "--model-path" not in missing


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--model_path", "not/there"], "not/there"),
        (["--trust_remote_code", "yes"], "'yes' is not one of"),
        (["--config_path", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_a_wrong_value_is_a_usage_error(arguments: list[str], wrong: str, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(everything, *required(tmp_path), *arguments)
    assert result.exit_code == 2
    assert wrong in result.stderr


def test_people_read_tables_and_notes_in_human_mode(tmp_path: Path, invoke: Invoke) -> None:
    result = invoke(everything, *required(tmp_path))
    assert result.stderr == "a note\nwarning: a warning\n"
    title, head, first, second = result.stdout.splitlines()
    assert (title, head.split()) == ("numbers", ["n", "text"])
    assert first == "1   [bold]one[/bold]"
    assert second == f"22  {'two ' * 60}".rstrip()  # whole lines for a pipe


def test_a_table_without_column_names_has_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table("facts", ["", ""], [("units", 3)])
    assert capsys.readouterr().out == "facts\nunits  3\n"


def test_quiet_keeps_warnings_and_json_wins_over_quiet(tmp_path: Path, invoke: Invoke) -> None:
    paths = required(tmp_path)
    result = invoke(everything, *paths, "--quiet")
    assert (result.stdout, result.stderr) == ("", "warning: a warning\n")
    for flags in (["--quiet", "--json"], ["--json", "--quiet"]):
        assert json.loads(invoke(everything, *paths, *flags).stdout)["save_path"] == "x"


def test_a_second_document_is_refused_and_a_late_error_is_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output("json")
    output.data([1])
    with pytest.raises(RuntimeError):
        output.data([2])
    output.error(errors.SaveError("disk full"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [1]
    event = json.loads(captured.err)
    assert (event["event"], event["kind"], event["message"]) == ("error", "SaveError", "disk full")


def test_a_number_that_json_does_not_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Output("json").data({"loss": float("nan")})
    assert capsys.readouterr().out == ""


PROTOCOL_ERROR = errors.ProtocolError(
    "the protocol has 2 mistakes",
    hint="see the schema",
    diagnostics=[
        errors.Diagnostic("unknown key 'typ'", "spec.process[0]", "a.yaml", 3, 5, "did you mean 'type'?"),
        errors.Diagnostic("no linear is called so"),
    ],
)


def test_an_error_shows_every_diagnostic_with_its_place_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error(PROTOCOL_ERROR)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: the protocol has 2 mistakes",
        "a.yaml:3:5: spec.process[0]: unknown key 'typ'",
        "    hint: did you mean 'type'?",
        "no linear is called so",
        "hint: see the schema",
    ]


def test_an_error_in_json_mode_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Output("json").error(PROTOCOL_ERROR)
    captured = capsys.readouterr()
    assert captured.err == ""
    error = json.loads(captured.out)["error"]
    assert error["kind"] == "ProtocolError"
    assert (error["message"], error["hint"]) == ("the protocol has 2 mistakes", "see the schema")
    assert error["diagnostics"][0] == {
        "message": "unknown key 'typ'",
        "path": "spec.process[0]",
        "file": "a.yaml",
        "line": 3,
        "column": 5,
        "hint": "did you mean 'type'?",
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.QuantizationError("x"), 1),
        (errors.SaveError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.ProtocolError("x"), 2),
        (errors.CapabilityError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.DatasetError("x"), 2),
        (errors.InvalidDatasetError("x"), 2),
        (click.UsageError("x"), 2),
        (errors.PluginError("x"), 3),
        (RuntimeError("x"), 70),
        (OSError("x"), 70),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_every_error_class_is_in_the_table() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert classes <= {kind for kind, _ in EXIT_CODES}


def test_our_bug_says_how_to_see_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("modelslim.registry.Registry.scan", broken)
    monkeypatch.delenv("MODELSLIM_LOG_LEVEL", raising=False)
    assert main(["plugins"]) == 70
    quiet = capsys.readouterr().err
    assert quiet.splitlines()[0] == "error: internal error: ZeroDivisionError: division by zero"
    assert "MSMODELSLIM_LOG_LEVEL=DEBUG" in quiet
    assert "Traceback" not in quiet
    for variable in ("MODELSLIM_LOG_LEVEL", "MSMODELSLIM_LOG_LEVEL"):
        monkeypatch.setenv(variable, "debug")
        assert main(["plugins"]) == 70
        assert "Traceback (most recent call last)" in capsys.readouterr().err
        monkeypatch.delenv(variable)


def test_an_interrupted_command_gives_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modelslim.registry.Registry.scan", interrupt)
    assert main(["plugins"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_an_exception_without_a_message_has_no_dangling_colon() -> None:
    assert describe(RuntimeError()).message == "internal error: RuntimeError"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB\nand a page more"),
    ],
)
def test_lack_of_memory_is_no_bug_of_ours(error: Exception) -> None:
    report = describe(error)
    assert (exit_code(error), report.kind) == (1, "OutOfMemory")
    assert report.message.startswith("out of memory")
    assert "\n" not in report.message
    assert "block by block" in report.hint


def test_nobody_reading_stdout_ends_the_program_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([*PROGRAM, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals_and_no_color_turns_it_off(environ: dict[str, str], coloured: bool) -> None:
    import pty

    leader, follower = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    arguments = {"stderr": follower, "stdout": follower, "env": {**inherited, "TERM": "xterm-256color", **environ}}
    subprocess.run([*PROGRAM, "nonsense"], check=False, **arguments)  # type: ignore[call-overload]
    os.close(follower)
    text = os.read(leader, 4096).decode()
    os.close(leader)
    assert "no command is called" in text
    assert ("\x1b[" in text) is coloured


def write_plugin(folder: Path, source: str) -> None:
    """A distribution acme-cli with one saver, as pip would have left it."""
    info = folder / "acme_cli-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-cli\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[modelslim.savers]\nacme_saver = acme_cli.saver:Saver\n")
    package = folder / "acme_cli"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "saver.py").write_text(source)
    (package / "acme_saver.schema.json").write_text(
        json.dumps(
            {
                "type": "object",
                "properties": {"type": {"const": "acme_saver"}, "volume": {"type": "integer"}},
                "required": ["type"],
                "additionalProperties": False,
            }
        )
    )


def test_plugins_lists_a_broken_one_with_why_and_keeps_stdout_clean(tmp_path: Path) -> None:
    write_plugin(tmp_path, "print('hello from the plugin')\nraise ImportError('no acme')\n")
    environ = {"PYTHONPATH": str(tmp_path), "MODELSLIM_PLUGINS": "acme-cli"}
    result = run("plugins", "--json", **environ)
    assert result.returncode == 0, result.stderr
    event = json.loads(result.stderr)
    assert (event["event"], event["text"]) == ("print", "hello from the plugin")
    document = json.loads(result.stdout)
    assert document["modelslim"] == __version__
    (row,) = (row for row in document["plugins"] if row["distribution"] == "acme-cli")
    assert row == {
        "kind": "savers",
        "name": "acme_saver",
        "value": "acme_cli.saver:Saver",
        "distribution": "acme-cli",
        "version": "1.0",
        "status": "broken",
        "reason": "ImportError: no acme",
    }
    table = run("plugins", **environ).stdout
    (line,) = (line for line in table.splitlines() if "acme_saver" in line)
    assert line.split(maxsplit=5) == ["savers", "acme_saver", "acme-cli", "1.0", "broken", "ImportError: no acme"]


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [("name", "ok", ""), ("name, report", "broken", "'report'")],
)
def test_plugins_tries_the_hooks_of_a_vendor(arguments: str, status: str, reason: str, tmp_path: Path) -> None:
    write_plugin(tmp_path, "")
    (tmp_path / "acme_cli-1.0.dist-info" / "entry_points.txt").write_text(
        "[modelslim.plugins]\nacme = acme_cli.vendor:Vendor\n"
    )
    (tmp_path / "acme_cli" / "vendor.py").write_text(
        "from modelslim.hookspecs import hookimpl\n"
        f"class Vendor:\n    @hookimpl\n    def unit_finished(self, {arguments}): ...\n"
    )
    result = run("plugins", "--json", PYTHONPATH=str(tmp_path), MODELSLIM_PLUGINS="acme-cli")
    (row,) = (row for row in json.loads(result.stdout)["plugins"] if row["distribution"] == "acme-cli")
    assert row["status"] == status
    assert reason in row["reason"]


def test_plugins_names_a_mistake_in_the_restriction(tmp_path: Path) -> None:
    result = run("plugins", MODELSLIM_PLUGINS="not-installed")
    assert (result.returncode, result.stdout) == (3, "")
    assert "MODELSLIM_PLUGINS names not-installed" in result.stderr


def test_schema_prints_the_composed_schema_without_importing_the_plugin(tmp_path: Path) -> None:
    write_plugin(tmp_path, "raise ImportError('never imported')\n")
    result = run("schema", PYTHONPATH=str(tmp_path), MODELSLIM_PLUGINS="acme-cli")
    assert (result.returncode, result.stderr) == (0, "")
    assert isinstance(json.loads(result.stdout), dict)
    assert "acme_saver" in result.stdout
    assert "volume" in result.stdout


def test_schema_refuses_an_unknown_apiversion() -> None:
    result = run("schema", "--apiversion", "modelslim_v0815", MODELSLIM_PLUGINS="")
    assert (result.returncode, result.stdout) == (2, "")
    assert "modelslim_v0815" in result.stderr
