"""The program that times scores, from end to end on narrow models: counts, agreement, refusals."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# U-Net rows, pictures in the VAE, texts, for all pairs: what it costs, whatever the machine.
UNIT = {
    "released way": (40, 20, 8),
    "diffenc, paper": (20, 2, 2),
    "diffenc, discffusion": (30, 2, 2),  # the empty text is remembered, its passes are not
    "diffenc, shared-query": (10, 2, 2),
}
MATRIX = {"released way": (2560, 1280, 512), "diffenc, shared-query": (40, 8, 32)}


@pytest.fixture(scope="module")
def program():
    """`benchmarks/scorer.py` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import scorer

        yield scorer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where narrow models are built, once."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def quick(program, models, tmp_path, capsys):
    """Run cases on narrow models and hand back status, JSON, Markdown and terminal."""

    def run(*options):
        rows, table = tmp_path / "rows.json", tmp_path / "table.md"
        basic = ["--quick", "--repeats", "1", "--dtype", "float32", "--pairs", "1"]
        files = ["--models", str(models), "--json", str(rows), "--markdown", str(table)]
        status = program.main([*basic, *files, *options])
        told = json.loads(rows.read_text()) if rows.exists() else None
        return status, told, table.read_text() if table.exists() else "", capsys.readouterr()

    return run


@pytest.mark.long
@pytest.mark.parametrize(
    "cases",
    [{"sd2.1-unit": UNIT, "sd2.1-matrix": MATRIX}, {"sdxl-unit": UNIT}],
    ids=["sd", "sdxl"],
)
def test_every_case_costs_what_it_must_and_agrees(quick, cases):
    status, told, table, shown = quick("--cases", *cases)
    assert status == 0
    counts = {name: {} for name in cases}
    for row in told["rows"]:
        found = (row["unet_rows"], row["vae_pictures"], row["texts"])
        counts[row["case"]][row["contender"]] = found
        assert row["seconds"] > 0
        assert row["contender"] in shown.out
        assert row["goal"] is None  # times of narrow models mean nothing
        if row["contender"] == "released way":
            assert f"| released way, 1 of {row['pairs']} pairs |" in table
            assert row["seconds"] == pytest.approx(row["calls"][0] * row["pairs"])
        else:
            assert row["difference"] < 1e-5
            assert 0 < row["passes"] < row["floor"]
    assert counts == cases


@pytest.mark.long
def test_ratios_are_of_the_times_that_are_shown(quick):
    _, told, _, _ = quick("--cases", "sd2.1-unit", "--pairs", "2")
    released, *ours = told["rows"]
    assert released["timed_pairs"] == 2
    for row in ours:
        assert row["speedup"] == pytest.approx(released["seconds"] / row["seconds"])
        assert row["operations"] < released["operations"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["paper", "discffusion", "shared-query"])
def test_scores_that_differ_are_not_compared(quick, monkeypatch, kind):
    """Keys of another text give another score: 16 layers of 64 pixels tell them apart."""
    from speed.score_contenders import ReleasedWay

    own = ReleasedWay._score

    def other(self, output, read, noise):
        wrong = {name: (query, 4.0 * key) for name, (query, key) in read.items()}
        return own(self, output, wrong if self.kind == kind else read, noise)

    monkeypatch.setattr(ReleasedWay, "_score", other)
    monkeypatch.setattr("speed.score_running.AGREEMENT", {torch.float32: 5e-6})
    status, told, _, shown = quick("--cases", "sd2.1-unit")
    assert status == 1
    assert told is None
    assert f"different scores of kind '{kind}'" in shown.err


def test_a_budget_that_is_spent_leaves_notes_in_place_of_rows(quick):
    status, told, table, shown = quick("--budget", "-1")
    assert status == 0
    assert told["rows"] == []
    assert "sdxl-matrix: not run, the time was up" in told["notes"]
    assert "sdxl-matrix: not run, the time was up" in table
    assert "sdxl-matrix: not run, the time was up" in shown.out


@pytest.mark.parametrize(
    "options", [["--cases", "sd3"], ["--pairs", "0"], ["--batch-size", "-1"], ["--dtype", "int8"]]
)
def test_options_that_mean_nothing_are_refused(program, options, capsys):
    with pytest.raises(SystemExit) as left:
        program.main(options)
    assert left.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(quick):
    status, told, _, shown = quick("--device", "cuda:77")
    assert status == 2
    assert told is None
    assert "cannot use device 'cuda:77'" in shown.err


def test_no_two_questions_share_a_picture_or_a_text(program):
    from speed.score_cases import SCORE_CASES, ask_scores

    cases = [SCORE_CASES["sd2.1-unit"], SCORE_CASES["sd2.1-matrix"]]
    asked = [ask_scores(case, index, size=8) for case in cases for index in (-1, 0, 1, 13)]
    pictures = [tuple(image.flatten().tolist()) for question in asked for image in question.images]
    texts = [text for question in asked for text in question.texts]
    assert len(set(pictures)) == len(pictures) == 4 * (2 + 8)
    assert len(set(texts)) == len(texts) == 4 * (2 + 32)


@pytest.mark.long
def test_the_arithmetic_of_scores_is_the_published_one(program):
    """A pass to the last cross-attention is 98.5 % of a whole one of SD 2.1, 92.2 % of SDXL's."""
    from speed.counting import Counts, score_arithmetic

    for alias, whole, share in (("sd2.1-base", 0.804e12, 0.985), ("sdxl", 1.589e12, 0.922)):
        work = score_arithmetic(alias, 512)
        assert work.unet == pytest.approx(whole, rel=2e-3)
        assert work.unet_exit / work.unet == pytest.approx(share, abs=3e-3)
        released = work.total(Counts(40, 20, 8), exits=False)
        paper = work.total(Counts(20, 2, 2), exits=True)
        assert 2.7 < released / paper < 3.1
