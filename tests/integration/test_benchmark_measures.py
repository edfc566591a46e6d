"""What the benchmark programs measure with: clocks, peaks, arithmetic, tables, reports."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
HEAD = {"case": "c", "title": "a case", "batch": 1, "calls": [1.0], "images_per_second": 1.0}
COUNTS = {"unet_rows": 1, "vae_pictures": 0, "texts": 1, "operations": 10**12, "share": 0.5}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def row(**values):
    from speed.tables import Row

    return Row(**{**HEAD, **COUNTS, "contender": "diffenc", "seconds": 1.0, **values})


def test_calls_take_turns_and_turn_round():
    from speed.measuring import in_turn

    made, ran = [], []

    def prepared(name):
        def prepare(index):
            made.append((name, index))
            return lambda: ran.append(name)

        return prepare

    seconds = in_turn({name: prepared(name) for name in "ABC"}, CPU, repeats=3, first=5)
    assert "".join(ran) == "ABCCBAABC"
    assert [index for name, index in made if name == "A"] == [5, 6, 7]
    assert {name: len(times) for name, times in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_no_round_begins_after_the_limit_but_the_first_three():
    from speed.measuring import in_turn

    seconds = in_turn({"A": lambda index: lambda: None}, CPU, repeats=9, limit=0.0)
    assert len(seconds["A"]) == 3


@pytest.mark.parametrize(("clock", "most"), [("wall", 9.0), ("cpu", 0.05)])
def test_the_clock_that_was_asked_for_times_every_call(monkeypatch, clock, most):
    """A call that waits takes time on the wall and none of the processor's."""
    from speed import program
    from speed.measuring import in_turn

    options = program.common_options(None, ["case"], most_repeats=3).parse_args(["--clock", clock])
    setting = SimpleNamespace(folder=Path, device=CPU, dtype=torch.float32, rate=1.0, on_gpu=False)
    bench = program.bench_options(options, setting, most_repeats=3, seconds=(1, 1))
    waiting = {"A": lambda index: lambda: time.sleep(0.06)}
    times = in_turn(waiting, CPU, repeats=1, timer=bench["timer"])["A"]
    assert (0.06 if clock == "wall" else 0.0) <= times[0] < most


@pytest.mark.parametrize(
    ("ratio", "expected"), [(9.0, torch.bfloat16), (1.2, torch.float32), (0.1, torch.float32)]
)
def test_a_cpu_takes_bfloat16_where_it_is_measured_to_be_fast(monkeypatch, ratio, expected):
    from speed import measuring

    rates = {torch.float32: 1.0, torch.bfloat16: ratio}
    monkeypatch.setattr(measuring, "matrix_rate", lambda device, dtype, **_: rates[dtype])
    assert measuring.fast_dtype(CPU) == expected
    assert measuring.fast_dtype(torch.device("cuda")) == torch.float16


def test_the_rate_counts_two_operations_per_product(monkeypatch):
    from speed import measuring

    monkeypatch.setattr(measuring, "clock", lambda call, device: (0.5, call()))
    assert measuring.matrix_rate(CPU, torch.float32, side=10) == 2 * 10**3 / 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_a_peak_is_seen_and_forgotten():
    from speed.measuring import forget_peak, peak_memory

    forget_peak(CPU)
    before = peak_memory(CPU)
    large = torch.ones(50_000_000)
    assert peak_memory(CPU) - before > 180e6
    del large
    assert peak_memory(CPU) - before > 180e6
    forget_peak(CPU)
    assert peak_memory(CPU) - before < 100e6


def test_weights_that_are_shared_count_once():
    from speed.measuring import weight_bytes

    first, second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10)
    both = nn.ModuleList([first, second])
    assert weight_bytes(first, both) == 4 * (100 + 110)


@pytest.mark.long
def test_the_arithmetic_of_real_models_is_the_published_one():
    from speed.counting import Counts, arithmetic

    work = arithmetic("sd2.1-base", ("up_blocks.1",), 512)
    assert work.vae == pytest.approx(1.117e12, rel=2e-3)
    assert work.unet == pytest.approx(0.804e12, rel=2e-3)
    assert work.unet_exit == pytest.approx(0.440e12, rel=2e-3)
    assert work.text == pytest.approx(45e9, rel=0.05)
    counts = Counts(unet_rows=2, vae_pictures=1, texts=3)
    assert work.total(counts, exits=False) == 2 * work.unet + work.vae + 3 * work.text
    assert work.total(counts, exits=True) == 2 * work.unet_exit + work.vae + 3 * work.text


@pytest.mark.long
def test_the_arithmetic_of_dift_is_the_published_one():
    """Eight encodings and eight passes to the tap: 29.9 TFLOP; with one encoding 11.6."""
    from speed.counting import Counts, arithmetic

    work = arithmetic("sd2.1-base", ("up_blocks.1",), 768)
    own = work.total(Counts(8, 8, 0), exits=True)
    ours = work.total(Counts(8, 1, 0), exits=True)
    assert own == pytest.approx(29.9e12, rel=5e-3)
    assert ours == pytest.approx(11.6e12, rel=5e-3)


@pytest.mark.parametrize(
    ("speedup", "verdict"), [(1.31, "1.31x (1.3x met)"), (1.29, "1.29x (1.3x missed)")]
)
def test_a_goal_is_met_or_missed(speedup, verdict):
    from speed.tables import COLUMNS, cells

    measured = row(speedup=speedup, goal=1.3, overhead=0.02)
    shown = dict(zip(COLUMNS, cells(measured), strict=True))
    assert shown["speed-up"] == verdict
    assert shown["over floor"] == "+2.0%"
    told = measured.to_dict()
    assert told["goal_met"] is (speedup > 1.3)
    assert told["overhead_met"] is True


def test_a_table_has_a_section_per_case_and_its_notes(tmp_path):
    from speed.tables import COLUMNS, markdown

    rows = [row(), row(contender="bare floor"), row(title="another case", peak_bytes=2 * 10**9)]
    text = markdown(rows, "a processor", ["something was left out"])
    assert text.count("\n## ") == 2
    assert text.count(f"| {' | '.join(COLUMNS)} |") == 2
    assert text.count("| bare floor |") == 1
    assert "2.00 GB" in text
    assert text.rstrip().endswith("* something was left out")


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.a" name="one" time="1.5"/>
<testcase classname="tests.gpu.a" name="two" time="0.5"><skipped message="no"/></testcase>
{more}</testsuite></testsuites>"""
FAILURE = (
    '<testcase classname="tests.gpu.a" name="three" time="1"><failure message="x"/></testcase>'
)


@pytest.mark.parametrize(("more", "status"), [("", "passed"), (FAILURE, "failed")])
def test_results_of_pytest_are_read(tmp_path, more, status):
    from gpu import read_results

    file = tmp_path / "tests.xml"
    file.write_text(JUNIT.format(more=more))
    report = read_results(file)
    assert (report.status, report.passed, report.skipped) == (status, 1, 1)
    assert report.failed == (["tests.gpu.a.three"] if more else [])


def test_no_test_at_all_is_a_failure(tmp_path):
    from gpu import read_results

    file = tmp_path / "tests.xml"
    file.write_text("<testsuites/>")
    assert read_results(file).status == "failed: no test ran"


def test_a_report_holds_tests_and_benchmarks(tmp_path):
    from gpu import TestReport, write_report

    benchmark = {"rows": [{"case": "c"}], "notes": ["n"], "table": "# the table"}
    tests = TestReport("failed", passed=3, failed=["tests.gpu.a.b"], seconds=2.0)
    write_report(tmp_path / "new", tests, benchmark)
    told = json.loads((tmp_path / "new" / "gpu-report.json").read_text())
    assert told["tests"]["failed"] == ["tests.gpu.a.b"]
    assert told["benchmark"] == {"rows": [{"case": "c"}], "notes": ["n"]}
    text = (tmp_path / "new" / "gpu-report.md").read_text()
    assert "failed: 3 passed, 1 failed, 0 skipped" in text
    assert "* failed: `tests.gpu.a.b`" in text
    assert text.rstrip().endswith("# the table")


def test_other_programs_stand_in_the_report_with_what_they_printed(tmp_path, monkeypatch):
    import gpu

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (folder / "fine.py").write_text(
        "import sys; print('a table'); open(sys.argv[-1], 'w').write('{\"x\": 1}')"
    )
    (folder / "broken.py").write_text("raise SystemExit(3)")
    (folder / "slow.py").write_text("import time; time.sleep(60)")
    fine, failed = gpu.run_program(tmp_path, "fine.py", ("--quick",), 60)
    assert (fine, failed) == ({"rows": {"x": 1}, "notes": [], "printed": "a table\n"}, 0)
    broken, failed = gpu.run_program(tmp_path, "broken.py", (), 60)
    assert (broken["notes"], failed) == (["benchmarks/broken.py left with status 3"], 3)
    slow, failed = gpu.run_program(tmp_path, "slow.py", (), 0)
    assert (slow["notes"], failed) == (["benchmarks/slow.py stopped when the time was up"], 0)
    benchmark = {"rows": [], "notes": [], "table": "# the table"}
    others = {"fine.py": fine, "broken.py": broken}
    gpu.write_report(tmp_path, gpu.TestReport("passed"), benchmark, others)
    assert json.loads((tmp_path / "gpu-report.json").read_text())["fine.py"]["rows"] == {"x": 1}
    text = (tmp_path / "gpu-report.md").read_text()
    assert "a table" in text
    assert "* benchmarks/broken.py left with status 3" in text


@pytest.mark.long
def test_a_benchmark_that_fails_or_takes_too_long_is_told_of(tmp_path):
    from gpu import run_benchmark

    found, status = run_benchmark(tmp_path, 60, ["--cases", "sd3"])
    assert status == 2
    assert found["notes"] == ["benchmarks/encoder.py left with status 2"]
    found, status = run_benchmark(tmp_path, 0, [])
    assert status == 0
    assert found["rows"] == []
    assert "stopped when the time was up" in found["table"]
