"""The program that says what each saving is worth, on a narrow model: times, ratios, files."""

import json
import re
from pathlib import Path

import pytest

from diffenc import DiffusionEncoder

COMPILED = ("--compile", "--backend", "eager")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def program():
    """`benchmarks/savings.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import savings

        yield savings


@pytest.fixture
def run(program, tmp_path, monkeypatch):
    """The JSON file and the page that a narrow model at 64 pixels leaves, with no counts."""
    monkeypatch.setattr(program, "TIMED_SIZE", 64)
    row = ("further question, cfg, over the plain script", 'reuse="down"', 12, 4, False)
    monkeypatch.setattr(program, "count", lambda alias, size: [program.Saving(alias, size, *row)])
    monkeypatch.setattr(program, "SIZES", {"sd2.1-base": (64,), "sdxl": (64,)})
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"

    def call(*options):
        basic = ["--quick", "--dtype", "float32", "--device", "cpu", "--models", str(tmp_path)]
        assert program.main([*basic, "--json", str(rows), "--markdown", str(page), *options]) == 0
        return json.loads(rows.read_text()), page.read_text()

    return call


@pytest.mark.long
def test_ratios_are_those_of_the_times_and_times_of_before_stay(run, monkeypatch):
    backends = []  # compiling takes a minute, and is tested elsewhere

    def note(encoder, *, backend):
        backends.append(backend)

    monkeypatch.setattr(DiffusionEncoder, "compile", note)
    report, page = run("--time", "sd2.1-base", "--repeats", "1", *COMPILED)
    times = report["times"]["sd2.1-base"]
    assert times["difference"] < 1e-4
    seconds = {name: each[0] for name, each in times["seconds"].items()}
    assert min(seconds.values()) > 0
    assert {"plain script", "further, exact", "further, without the prefix"} <= set(seconds)
    ratio = seconds["plain script"] / seconds["further, down"]
    assert f"| 66.7 % | 3.00 | {ratio:.2f} |" in page
    ratio = seconds["further, exact"] / seconds["further, compiled"]
    assert f"Compiled, a further question is {ratio:.2f} x as fast." in page
    assert re.search(r"load \d+\.\d before and \d+\.\d after, on \d+ cores; 1 round", page)
    assert backends == ["eager"]
    again, same = run()
    assert (again, same) == (report, page)


@pytest.mark.parametrize(
    "content", ['{"rows": []}', '{"times": {"sdxl": {"speed": 1}}}', "[", "[]"]
)
def test_a_file_of_another_program_is_neither_read_nor_overwritten(program, tmp_path, content):
    other = tmp_path / "other.json"
    other.write_text(content)
    with pytest.raises(SystemExit, match="holds no times of this program; name another file"):
        program.main(["--json", str(other)])
    assert other.read_text() == content
