"""The program is interrupted, terminated, or nobody reads what it prints."""

import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from diffenc.cli import signals
from diffenc.cli.app import app

PROGRAM = [sys.executable, "-m", "diffenc.cli.main"]
WORDS = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n"}
# Stops in the middle of an import, or of the work behind it, until the signal has come.
WAITING = """
import sys, time, types

def wait(*_):
    print("ready", flush=True)
    time.sleep(60)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {stop!r}:
            {action}

sys.argv = ["diffenc", "info", "shapes"]
sys.meta_path.insert(0, Finder())
from diffenc.cli.main import main
main()
"""
SWALLOWED = """
            try:
                wait()
            except BaseException:
                pass
"""
AT_WORK = """
import os, sys, time
from diffenc.cli import app

def info() -> None:
    open("partial", "w").close()
    try:
        print("ready", flush=True)
        {wait}
    finally:
        os.remove("partial")

app.app.registered_commands[2].callback = info
sys.argv = ["diffenc", "info"]
from diffenc.cli.main import main
main()
"""
WRITES = """
import sys
from diffenc.cli import app

def info() -> None:
    with open("out.txt", "w") as file:
        print("to standard output", flush=True)
        print("to standard error", file=sys.stderr, flush=True)
        file.write("of the file")

app.app.registered_commands[2].callback = info
sys.argv = ["diffenc", "info"]
from diffenc.cli.main import main
main()
"""


def stopped(code, number, folder):
    """Exit code and both outputs of a program that gets a signal once it says that it is ready."""
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    with program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(number)
        out, err = program.communicate(timeout=60)
    return program.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("stop", ["diffenc.cli.app", "torch"])
@pytest.mark.parametrize("action", ["wait()", SWALLOWED], ids=["plain", "swallowed"])
def test_an_import_is_interrupted_in_one_line(number, stop, action, tmp_path):
    code, out, err = stopped(WAITING.format(stop=stop, action=action), number, tmp_path)
    assert (code, out, err) == (128 + number, "", WORDS[number])


@pytest.mark.parametrize(
    "wait",
    [
        "time.sleep(60)",
        # what other code makes of it
        "try:\n            time.sleep(60)\n        except BaseException:\n            int('x')",
    ],
    ids=["plain", "turned"],
)
def test_work_is_interrupted_without_a_traceback_and_cleaned_up(wait, tmp_path):
    code, out, err = stopped(AT_WORK.format(wait=wait), signal.SIGINT, tmp_path)
    assert (code, out) == (130, "")
    assert err.count("\n") <= 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("twentieths", [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 30, 40, 60, 80])
def test_at_any_time(number, twentieths, tmp_path):
    # From its first line on: what comes before is the interpreter's.
    code = "from diffenc.cli.main import main; print('up', flush=True); main()"
    program = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "-o", str(tmp_path / "demo.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout.readline() == "up\n"
        time.sleep(twentieths / 20)
        program.send_signal(number)
        _, err = program.communicate(timeout=60)
    assert program.returncode in (0, 128 + number)
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    assert not [path for path in tmp_path.iterdir() if path.name != "demo.png"]


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&- <&-"])
def test_a_closed_stream_takes_no_file_of_the_program(closed, tmp_path):
    (tmp_path / "program.py").write_text(WRITES)
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} program.py {closed}"], cwd=tmp_path, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "out.txt").read_text() == "of the file"


def test_a_reader_that_goes_away_ends_it_without_a_word():
    program = subprocess.Popen(
        [*PROGRAM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    err = program.stderr.read()
    program.stderr.close()
    assert (program.wait(60), err) == (signals.BROKEN_PIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_behind_standard_output_is_told():
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        done = subprocess.run(
            [*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_that_ends_too_early_is_no_interruption(monkeypatch):
    def info() -> None:
        raise EOFError("the file ends too early")

    monkeypatch.setattr(app.registered_commands[2], "callback", info)
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 1
    assert "EOFError: the file ends too early" in result.output
