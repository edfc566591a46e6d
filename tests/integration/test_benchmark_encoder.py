"""The benchmark program from end to end, on narrow models: its counts, its refusals, its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# U-Net rows, pictures in the VAE, texts: what one call may cost, whatever the machine.
CFG_FIRST = {"diffenc": (2, 1, 1), "plain diffusers": (2, 1, 2), "bare floor": (2, 1, 1)}
CFG_NEXT = {"diffenc": (1, 0, 1), "plain diffusers": (2, 1, 2), "bare floor": (1, 0, 1)}
COUNTS = {
    "sd2.1-first": CFG_FIRST,
    "sd2.1-next": CFG_NEXT,
    "dift-768": {"diffenc": (8, 1, 1), "DIFT's own way": (8, 8, 1), "bare floor": (8, 1, 1)},
    # The unconditional text of SDXL's pipeline is zeros, and no text encoder runs for it.
    "sdxl-first": {**CFG_FIRST, "plain diffusers": (2, 1, 1)},
    "sdxl-next": {**CFG_NEXT, "plain diffusers": (2, 1, 1)},
}


@pytest.fixture(scope="module")
def program():
    """`benchmarks/encoder.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import encoder

        yield encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where narrow models are built, once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def quick(program, models, tmp_path, capsys):
    """Run one case on narrow models and hand back status, JSON, Markdown and terminal."""

    def run(*options):
        rows, table = tmp_path / "rows.json", tmp_path / "table.md"
        basic = ["--quick", "--no-memory", "--repeats", "1", "--dtype", "float32"]
        files = ["--models", str(models), "--json", str(rows), "--markdown", str(table)]
        status = program.main([*basic, *files, *options])
        told = json.loads(rows.read_text()) if rows.exists() else None
        return status, told, table.read_text() if table.exists() else "", capsys.readouterr()

    return run


@pytest.mark.long
@pytest.mark.parametrize("cases", [["sd2.1-first", "sd2.1-next", "dift-768"],
                                    ["sdxl-first", "sdxl-next"]], ids=["sd", "sdxl"])  # fmt: skip
def test_every_case_costs_what_it_must_and_agrees(quick, cases):
    status, told, table, shown = quick("--cases", *cases)
    assert status == 0
    counts = {name: {} for name in cases}
    for row in told["rows"]:
        found = (row["unet_rows"], row["vae_pictures"], row["texts"])
        counts[row["case"]][row["contender"]] = found
        assert row["difference"] < 1e-4
        assert row["seconds"] > 0
        assert row["contender"] in shown.out
        assert f"| {row['contender']} | 1 |" in table
        assert row["goal"] is None  # times of narrow models mean nothing
    assert counts == {name: COUNTS[name] for name in cases}
    for row in told["rows"]:
        if row["contender"] == "diffenc":
            others = {r["contender"]: r for r in told["rows"] if r["case"] == row["case"]}
            rival = next(r for name, r in others.items() if name not in ("diffenc", "bare floor"))
            assert row["speedup"] == pytest.approx(rival["seconds"] / row["seconds"])
            over = row["seconds"] / others["bare floor"]["seconds"] - 1
            assert row["overhead"] == pytest.approx(over)
            assert row["operations"] == others["bare floor"]["operations"] < rival["operations"]


@pytest.mark.long
def test_batches_and_compiled_code_are_timed_where_asked_for(quick, monkeypatch):
    handed: list[dict[str, object]] = []

    def compile_nothing(module, **options):  # compilation itself has tests of its own
        handed.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile_nothing)
    status, told, _, _ = quick(
        "--cases", "sd2.1-first", "--batches", "2", "--compile", "--backend", "eager"
    )
    assert handed == [{"backend": "eager"}]
    assert status == 0
    compiled = next(row for row in told["rows"] if row["contender"] == "diffenc, compiled")
    eager = next(row for row in told["rows"] if row["contender"] == "diffenc")
    assert len(told["rows"]) == 4
    assert {row["batch"] for row in told["rows"]} == {2}
    assert eager["unet_rows"] == compiled["unet_rows"] == 4
    assert compiled["difference"] < 1e-4
    assert compiled["speedup"] > 0
    assert compiled["goal"] is None
    assert eager["images_per_second"] == pytest.approx(2 / eager["seconds"])


@pytest.mark.long
def test_contenders_that_answer_something_else_are_not_compared(quick, monkeypatch):
    monkeypatch.setattr("speed.floor.Floor._guide", lambda self, uncond, cond: uncond)
    status, told, _, shown = quick("--cases", "sd2.1-first")
    assert status == 1
    assert told is None
    assert "diffenc and bare floor read different features" in shown.err


def test_a_budget_that_is_spent_leaves_notes_in_place_of_rows(quick):
    status, told, table, shown = quick("--cases", "sd2.1-first", "sdxl-next", "--budget", "-1")
    assert status == 0
    assert told["rows"] == []
    left_out = "sdxl-next, batch 1: not run, the time was up"
    assert left_out in told["notes"]
    assert left_out in table
    assert left_out in shown.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:77"], "cannot use device 'cuda:77'"),
        (["--device", "toaster"], "toaster"),
    ],
    ids=str,
)
def test_a_device_that_is_not_there_is_refused(quick, options, message):
    status, told, _, shown = quick(*options)
    assert status == 2
    assert told is None
    assert message in shown.err


@pytest.mark.parametrize(
    "options", [["--cases", "sd3"], ["--batches", "0"], ["--repeats", "-1"], ["--dtype", "int8"]]
)
def test_options_that_mean_nothing_are_refused(program, options, capsys):
    with pytest.raises(SystemExit) as left:
        program.main(options)
    assert left.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.long
def test_peaks_are_read_in_processes_of_their_own(program, models, tmp_path):
    from real_size import build_folder
    from speed.cases import CASES
    from speed.running import EncoderBench, _peak_elsewhere

    folder = models / "float32-narrow" / "sd2.1-base"
    build_folder("sd2.1-base", folder, narrow=True)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    cpu = torch.device("cpu")
    bench = EncoderBench(
        folder=lambda _: folder, device=cpu, dtype=torch.float32, rate=1.0, repeats=1, quick=True
    )
    peak = _peak_elsewhere(bench, CASES["sd2.1-next"], "diffenc", 1)
    assert bench.notes == []
    assert weights < peak < 4e9
    bench.folder = lambda _: tmp_path / "nowhere"
    assert _peak_elsewhere(bench, CASES["sd2.1-next"], "plain diffusers", 1) is None
    assert "no peak memory of plain diffusers" in bench.notes[0]


@pytest.mark.long
def test_without_a_gpu_the_gpu_program_says_so_and_leaves_in_peace(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--out", tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No CUDA device here")
    assert list(tmp_path.iterdir()) == []
