import io
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

import diffenc
from diffenc.cli import files, options, tables
from diffenc.cli.main import CommandGroup, app
from diffenc.errors import ConfigError, OutputError

HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers")
IMPORT_CLI_ALONE = f"""
import sys, types
package = types.ModuleType("diffenc")  # stands in for the root, which imports torch
package.__path__ = {list(diffenc.__path__)!r}
sys.modules["diffenc"] = package
import diffenc.cli.app
print(*sys.modules)
"""
WARNS = f"""
import sys, types, warnings
package = types.ModuleType("diffenc")  # stands in for the root, which imports torch
package.__path__ = {list(diffenc.__path__)!r}
sys.modules["diffenc"] = package
from diffenc.cli import app

def info() -> None:
    print("at work")
    for each in ("the picture\\n  is odd", "the text is cut", "the text is cut"):
        warnings.warn(each)
        with warnings.catch_warnings():  # makes the interpreter forget what it has shown
            warnings.simplefilter("ignore")
            warnings.warn("of no use to anybody")

app.app.registered_commands[2].callback = info
sys.argv = ["diffenc", "info"]
from diffenc.cli.main import main
main()
"""


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def run_python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_package_itself_is_the_program():
    done = run_python("-m", "diffenc", "--version")
    assert (done.returncode, done.stdout) == (0, run("--version").stdout)


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_the_commands(option):
    result = run(option)
    assert result.exit_code == 0
    for command in ("demo", "encode", "info"):
        assert f"\n  {command}" in result.output
        assert run(command, option).exit_code == 0


def test_without_a_command_help_is_shown():
    assert run().output == run("-h").output


def test_version():
    assert run("--version").output == f"diffenc {diffenc.__version__}\n"


def test_the_program_itself_imports_nothing_heavy():
    done = run_python("-c", IMPORT_CLI_ALONE)
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.long
def test_an_error_is_one_line_on_standard_error(tmp_path):
    output = tmp_path / "a.safetensors"
    done = run_python("-m", "diffenc.cli.main", "encode", tmp_path / "no.png", "-o", output)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: no such image file: {tmp_path / 'no.png'}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_one_line_on_standard_error_and_said_once(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(WARNS, "utf-8")
    done = run_python(script)
    assert (done.returncode, done.stdout) == (0, "at work\n")
    assert done.stderr == "warning: the picture is odd\nwarning: the text is cut\n"


@pytest.mark.long
def test_a_photograph_under_a_bundled_model_is_warned_of_in_one_line(tmp_path):
    rng = random.Random(0)
    for name in ("one.png", "two.png"):  # no two pixels alike, as in no drawing
        Image.frombytes("RGB", (48, 48), rng.randbytes(48 * 48 * 3)).save(tmp_path / name)
    command = ["-m", "diffenc.cli.main", "score", tmp_path / "one.png", tmp_path / "two.png"]
    done = run_python(*command, "--text", "a red circle", "--timesteps", "50")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ".py" not in done.stderr
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("warning")]
    assert line.startswith("warning: the bundled model 'shapes' knows coloured shapes")
    assert line.endswith("load another model, such as 'sd2.1-base'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode"], "Missing argument 'IMAGE'. See: diffenc encode --help"),
        (["bogus"], "No such command 'bogus'. See: diffenc --help"),
        (["scor"], "No such command 'scor'. Did you mean 'score'? See: diffenc --help"),
        (["info", "--bogus"], "No such option: --bogus. See: diffenc info --help"),
    ],
)
def test_wrong_usage_is_one_line_too(arguments, message):
    result = CliRunner().invoke(app, arguments, prog_name="diffenc")
    assert result.exit_code == 2
    assert result.output == f"error: {message}\n"


@pytest.fixture
def failing():
    program = typer.Typer(cls=CommandGroup)

    @program.callback()
    def root(_debug: options.Debug = False) -> None: ...

    @program.command()
    def fail(how: str, _debug: options.Debug = False) -> None:
        raise {
            "ours": ConfigError("one\n  two"),
            "theirs": RuntimeError("what"),
            "stop": typer.Abort(),
        }[how]

    return program


def test_errors_have_their_exit_code_and_no_line_breaks(failing):
    ours = CliRunner().invoke(failing, ["fail", "ours"])
    assert (ours.exit_code, ours.output) == (2, "error: one two\n")
    theirs = CliRunner().invoke(failing, ["fail", "theirs"])
    assert theirs.exit_code == 1
    assert theirs.output.startswith("error: RuntimeError: what (unforeseen; --debug shows")
    assert CliRunner().invoke(failing, ["fail", "stop"]).exit_code == 130


@pytest.mark.parametrize("arguments", [["--debug", "fail", "ours"], ["fail", "ours", "--debug"]])
def test_debug_raises_wherever_it_stands(failing, arguments):
    result = CliRunner().invoke(failing, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "error:" not in result.output
    assert CliRunner().invoke(failing, ["fail", "ours"]).exit_code == 2  # not the next time


def test_outputs_are_refused_before_work(tmp_path, monkeypatch):
    def check(name, *, force=False):
        files.check_output(tmp_path / name, suffixes=(".png",), force=force)

    check("new.png")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"exists already: .*old.png \(--force replaces it\)"):
        check("old.png")
    check("old.png", force=True)
    with pytest.raises(OutputError, match="no regular file"):
        check("folder.png", force=True)
    with pytest.raises(OutputError, match=r"must end in \.png"):
        check("a.gif")
    with pytest.raises(OutputError, match=r"does not exist: .*missing"):
        check("missing/a.png")
    with pytest.raises(OutputError, match="cannot write"):
        check("a" * 300 + ".png")

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OutputError, match=r"cannot write .*new\.png: Permission denied"):
        check("new.png")
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_files_are_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a.txt"
    files.write_whole(target, lambda path: path.write_text("one"))
    plain = tmp_path / "plain.txt"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode
    plain.unlink()

    def half(path):
        path.write_text("half")
        raise ValueError("disk full")

    with pytest.raises(OutputError, match=r"a\.txt: disk full"):
        files.write_whole(target, half)
    assert target.read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


ROWS = [("[bold]a[/bold]", 1), ("b" * 200, 20)]


def test_tables_are_plain_and_uncut_without_a_terminal(capsys):
    tables.print_table("title", ("name", "n"), ROWS, right=("n",))
    title, *lines, last = capsys.readouterr().out.split("\n")[:-1]
    assert (title, last) == ("title", "")
    assert [line.split() for line in lines] == [["name", "n"], [ROWS[0][0], "1"], ["b" * 200, "20"]]
    assert len({len(line) for line in lines}) == 1


def test_tables_on_a_terminal_fold_and_show_brackets(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    tables.print_table("title", ("name", "n"), ROWS)
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert ROWS[0][0] in shown
    assert shown.count("b") == 200 + ROWS[0][0].count("b")
    assert max(map(len, shown.splitlines())) <= 60


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 kB"), (13_680, "13.7 kB"), (999_999, "1000.0 kB"), (5_136_000_000, "5.1 GB")],
)
def test_sizes_are_readable(count, text):
    assert tables.readable_bytes(count) == text


def test_dtypes_and_devices_by_name():
    assert str(options.to_dtype("bf16")) == "torch.bfloat16"
    assert options.to_device("cpu").type == "cpu"
    assert options.to_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="dtype must be one of"):
        options.to_dtype("int8")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"cannot use device '{name}'"):
            options.to_device(name)
