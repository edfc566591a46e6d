"""The benchmark of diffusion transformers from end to end, on narrow models."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = ["--quick", "--repeats", "1", "--threads", "1", "--dtype", "float32"]
ROWS = [
    ("first", "diffenc"),
    ("first", "plain diffusers"),
    ("first", "bare floor"),
    ("next", "diffenc"),
    ("next", "bare floor"),
]


@pytest.fixture(scope="module")
def program():
    """`benchmarks/diffusion_transformers.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import diffusion_transformers

        yield diffusion_transformers


@pytest.mark.long
def test_contenders_agree_and_every_question_is_measured(program, tmp_path, capsys):
    report = tmp_path / "rows.json"
    assert program.main([*QUICK, "--json", str(report)]) == 0
    rows = json.loads(report.read_text())["rows"]
    kinds = [(row["model"], row["question"], row["contender"]) for row in rows]
    assert kinds == [(alias, *row) for alias in program.ALIASES for row in ROWS]
    shown = capsys.readouterr().out
    for row in rows:
        assert row["difference"] < 1e-4
        assert len(row["seconds"]) == 1
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
        assert f"| {row['model']} | {row['question']} | {row['contender']} |" in shown
    by_kind = dict(zip(kinds, rows, strict=True))
    for alias in program.ALIASES:
        taken = {row: by_kind[(alias, *row)]["seconds"][0] for row in ROWS}
        for question in ("first", "next"):
            ours = by_kind[(alias, question, "diffenc")]
            seconds, floor = ours["seconds"][0], taken[question, "bare floor"]
            assert ours["overhead"] == pytest.approx(seconds / floor - 1)
            plain = taken["first", "plain diffusers"]
            assert ours["speedup"] == pytest.approx(plain / seconds)


@pytest.mark.long
def test_contenders_that_read_something_else_end_the_program(program, monkeypatch, capsys):
    answer = program.HookedScript.answer
    monkeypatch.setattr(
        program.HookedScript, "answer", lambda self, question: 1.1 * answer(self, question)
    )
    assert program.main([*QUICK, "--models", "pixart-sigma"]) == 1
    assert "plain diffusers is 0.1 from diffenc" in capsys.readouterr().err
