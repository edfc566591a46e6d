import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffenc.errors import BackboneError, ConfigError, OutputError
from diffenc.studies import charts
from diffenc.studies.charts import Panel, Series, draw_panels
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm import page as vlm_page
from diffenc.studies.vlm import study_vlm
from diffenc.studies.vlm.estimate import measure_costs, work_of
from diffenc.studies.vlm.page import draw_study, to_markdown
from diffenc.studies.vlm.plan_file import parse_plan
from diffenc.studies.vlm.tables import figure_tables
from diffenc.studies.vlm.workshop import Workshop, fingerprint
from vlm_builders import save_tiny_lm, save_tiny_vision

# The tiny tokenizer spells captions letter by letter.
pytestmark = pytest.mark.filterwarnings("ignore:prompts are longer than the 77 tokens")

PLAN = """
title = "Tiny"
about = "Whether it runs."
paper = ["leakage"]
plots = ["captions/named", "leakage/read"]
seeds = 2

[data]
scenes = 8

[model]
encoder = "SD"
language_model = "LM"
template = "chat"
options = { conditioning = "cfg", grid = 2 }

[align]
learning_rate = 1e-2
batch_size = 4
device_batch_size = 4
epochs = 2
precision = "fp32"
gradient_checkpointing = false

[instruct]
batch_size = 4
device_batch_size = 4
precision = "fp32"
gradient_checkpointing = false

[train.writer]
label = "the writer"
stage = "align"
model = { kind = "vision", encoder = "VISION", layer = -1 }

[train.first]
stage = "align"
prompts = "caption(first)"

[train.second]
stage = "instruct"
start = "first"
prompts = "question"

[measure.own]
kind = "captions"
prompts = "by writer"
of = ["first"]
items = 3
passes = 2

[measure.mismatched]
kind = "leakage"
of = ["first"]
items = 3

[measure.answers]
kind = "answers"
prompts = "question + by writer"
of = ["second"]
items = 7

[[finding]]
statement = "A second pass is better."
paper = "Not in the paper."
holds_if = ["first/own/named.2 > first/own/named.1"]
if_not = "A random model says nothing."

[[finding]]
statement = "The prompt is not said."
paper = "Table 6."
holds_if = ["first/mismatched/read < 50"]
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_sd_folder):
    folder = tmp_path_factory.mktemp("parts")
    return {
        "SD": str(tiny_sd_folder),
        "LM": str(save_tiny_lm(folder / "lm")),
        "VISION": str(save_tiny_vision(folder / "vision")),
    }


@pytest.fixture
def plan(parts):
    return made(parts)


def made(parts, *changes, text=PLAN):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    for name, folder in parts.items():
        text = text.replace(f'"{name}"', f'"{folder}"')
    return parse_plan("tiny", text)


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    told = []
    found = study_vlm(made(parts), work=work, progress=lambda *each: told.append(each))
    return found, work, told


@pytest.mark.long
def test_everything_is_trained_and_measured(run):
    found, _, told = run
    assert (found.trained, found.fresh, found.missing) == (6, 6, {})
    assert {(cell.training, cell.measurement) for cell in found.cells} == {
        ("first", "own"),
        ("first", "mismatched"),
        ("second", "answers"),
    }
    assert len(found.figure(("first", "own", "named")).values) == 2
    assert found.figure(("first", "own", "named")) == found.figure(("first", "own", "named.2"))
    answers = found.cell("second", "answers").figures
    assert 0 <= answers["all"].mean <= 100
    assert answers["guess"].mean > 0
    done, total, _ = told[-1]
    assert done == pytest.approx(total)
    assert all(before[0] <= after[0] + 1e-9 for before, after in pairwise(told))
    assert any("training second, seed 1" in what for _, _, what in told)


@pytest.mark.long
def test_findings_are_decided_by_figures(run):
    found, _, _ = run
    first, second = found.findings
    excess = first.decisions[0].excess
    two, one = (found.figure(("first", "own", f"named.{k}")) for k in (2, 1))
    assert excess.values == tuple(a - b for a, b in zip(two.values, one.values, strict=True))
    assert second.verdict == "holds"


def test_again_is_read_from_the_folder(run, plan, monkeypatch):
    found, work, _ = run
    monkeypatch.setattr("diffenc.studies.vlm.workshop.train", None)
    monkeypatch.setattr("diffenc.studies.vlm.study.measure", None)
    again = study_vlm(plan, work=work)
    assert again.cells == found.cells
    assert (again.trained, again.fresh) == (6, 0)


def test_another_study_shares_a_training_by_what_it_is(run, parts):
    _, work, _ = run
    renamed = made(parts, ("[train.first]", "[train.renamed]"), *_uses("first", "renamed"))
    shop = Workshop(renamed, work)
    assert shop.is_trained("renamed", 0)
    assert shop.is_trained("second", 1)
    assert shop.count_trained() == 6


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("learning_rate = 1e-2", "learning_rate = 2e-2"),
        ("grid = 2", "grid = 4"),
        ("caption(first)", "caption"),
        ("scenes = 8", "scenes = 9"),
    ],
)
def test_what_differs_is_trained_anew_with_all_that_starts_from_it(run, parts, old, new):
    _, work, _ = run
    shop = Workshop(made(parts, (old, new)), work)
    assert not shop.is_trained("first", 0)
    assert not shop.is_trained("second", 0)


def test_an_option_that_is_as_usual_makes_no_training_another(plan, parts, tmp_path):
    written = ("layer = -1 }", "layer = -1, pad = false }")
    free = ('precision = "fp32"', 'precision = "fp32"\nshard = "zero2"')
    other = ("layer = -1 }", "layer = -1, pad = true }")
    folders = [
        Workshop(each, tmp_path).folder_of("writer", 0)
        for each in (plan, made(parts, written), made(parts, free), made(parts, other))
    ]
    assert folders[0] == folders[1] == folders[2] != folders[3]


def test_another_language_model_in_the_same_folder_is_another_training(parts, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(parts["LM"], folder)
    before = fingerprint(str(folder))
    assert before == fingerprint(parts["LM"])
    save_tiny_lm(folder, hidden_size=8)
    assert fingerprint(str(folder)) != before
    assert fingerprint("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"


@pytest.mark.long
def test_killed_within_a_training_and_resumed_is_as_uninterrupted(parts, tmp_path):
    """The kill comes after the checkpoint of step 50."""
    long = made(parts, ("epochs = 2", "epochs = 30"), text=_only_first())
    what = "training first, seed 0"

    def kill(done, total, told):
        if told == what and kill.steps > 54:
            raise KeyboardInterrupt
        kill.steps += told == what

    kill.steps = 0
    with pytest.raises(KeyboardInterrupt):
        study_vlm(long, work=tmp_path / "killed", progress=kill)
    shop = Workshop(long, tmp_path / "killed")
    assert shop.count_trained() == 0
    assert list(shop.folder_of("first", 0).glob("checkpoint-50"))
    steps = []
    resumed = study_vlm(
        long, work=tmp_path / "killed", progress=lambda _done, _total, told: steps.append(told)
    )
    assert steps.count(what) < 15  # not from the beginning
    assert not list(shop.folder_of("first", 0).glob("checkpoint-*"))
    whole = study_vlm(long, work=tmp_path / "whole")
    assert resumed.cells == whole.cells
    models = (Workshop(long, tmp_path / name).trained("first", 0) for name in ("killed", "whole"))
    one, other = (load_file(model / "projector" / "projector.safetensors") for model in models)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.long
def test_a_clip_that_is_missing_leaves_out_what_needs_it(parts, tmp_path):
    told = made(
        {**parts, "VISION": "no/such-clip"},
        ("seeds = 2", "seeds = 1"),
        ("question + by writer", "question"),
    )
    found = study_vlm(told, work=tmp_path)
    assert list(found.missing) == ["writer"]
    assert "no/such-clip" in found.missing["writer"]
    assert {cell.measurement for cell in found.cells} == {"mismatched", "answers"}
    assert [each.verdict for each in found.findings] == ["not run", "undecided"]
    page = to_markdown(found, command="c", made_with="m", picture=None)
    assert "**Not run:** “the writer”" in page


def test_nothing_that_can_be_trained_is_an_error(parts, tmp_path):
    told = made({**parts, "VISION": "no/such-clip"}, text=_only_writer())
    with pytest.raises(ConfigError, match="no training of the study 'tiny' can be done"):
        study_vlm(told, work=tmp_path)


def test_a_language_model_that_is_missing_is_an_error_before_anything_runs(parts, tmp_path):
    with pytest.raises(BackboneError, match="no/such-lm"):
        study_vlm(made({**parts, "LM": "no/such-lm"}), work=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_work_folder_that_cannot_be_made_is_an_error(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder"):
        study_vlm(plan, work=tmp_path / "file")


@pytest.mark.parametrize(
    ("there", "words"), [(0, ""), (1, ", 1 of which was there"), (2, ", 2 of which were there")]
)
def test_a_page_tells_how_many_trainings_were_there(run, there, words):
    study = replace(run[0], fresh=run[0].trained - there)
    page = " ".join(to_markdown(study, command="c", made_with="m", picture=None).split())
    assert f"{study.trained} trainings{words}{' already' * bool(there)}. m" in page


def test_a_page_tells_what_was_found_and_what_the_paper_has(run, tmp_path):
    found, _, _ = run
    page = to_markdown(found, command="diffenc study tiny", made_with="Here.", picture="t.png")
    for words in (
        *("# Tiny", "`diffenc study tiny`", "![", "t.png", "one-sided 5 %", "Here."),
        *("### A second pass is better: ", "In the paper: Not in the paper.", "CFG=4.5 | 49.58"),
        *("the caption by the writer", "a caption of another picture", "2 seeds"),
        "| second | conversations | projector, language model | first | question |",
    ):
        assert words in page, words
    first = found.findings[0]
    assert first.verdict == "not measured"  # a random model says nothing that can be read
    assert f"### A second pass is better: {first.outcome}" in page
    assert "not measured: 100 % of answers unread" in page
    assert "A random model says nothing." not in page  # no reason for what was not seen
    assert "| The prompt is not said. | holds | – |" in page  # words are counted, read or not
    assert max(map(len, (line for line in page.splitlines() if not line.startswith("|")))) <= 120


def test_numbers_in_tables_are_means_with_deviations(run):
    found, _, _ = run
    tables = figure_tables(found)
    table = tables["answers"]
    spread = found.figure(("second", "answers", "all"))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["all"] == f"{spread.mean:.1f} ± {spread.deviation:.1f}"
    assert [row[1] for row in tables["captions"].rows] == ["own, pass 1", "own, pass 2"]


def test_numbers_are_json(run):
    found, _, _ = run
    told = json.loads(json.dumps(found.to_dict()))
    assert told["plan"]["name"] == "tiny"
    assert {cell["training"] for cell in told["cells"]} == {"first", "second"}
    assert [each["verdict"] for each in told["findings"]] == ["not measured", "holds"]
    assert told["findings"][0]["decisions"][0]["unread"] == 100


def test_a_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    found, _, _ = run
    draw_study(found, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > picture.height > 300


def test_answers_are_drawn_with_what_guessing_reaches_and_captions_without(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(vlm_page, "draw_panels", lambda panels, *_, **__: drawn.extend(panels))
    study, _, _ = run
    plan = replace(study.plan, plots=("answers/all", *study.plan.plots))
    draw_study(replace(study, plan=plan), "unused.png")
    guessing = {panel.title: panel.guessing for panel in drawn}
    answered = study.figure(("second", "answers", "guess"))
    assert guessing["answers: all"] == pytest.approx(answered.mean)
    assert {title for title, level in guessing.items() if level is None} == set(guessing) - {
        "answers: all"
    }


def test_what_guessing_reaches_is_a_line_across_the_panel(tmp_path):
    pytest.importorskip("matplotlib")
    series = Series("own", [0, 1], [Spread((10.0, 12.0)), Spread((30.0, 32.0))])
    for name, guessing in (("with", 25.0), ("without", None)):
        panel = Panel("pairs", "percent", [series], names=["a", "b"], guessing=guessing)
        draw_panels([panel], tmp_path / f"{name}.png", title="t")
    pixels = [
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), dtype=int)
        for name in ("with", "without")
    ]
    grey = [(abs(each - (0x8A, 0x8A, 0x94)).max(-1) < 6).sum(1).max() for each in pixels]
    assert grey[0] > pixels[0].shape[1] / 3 > 10 * grey[1]


@pytest.mark.parametrize("names", [["a", "b"], []], ids=["trainings", "passes"])
def test_a_legend_lies_beside_the_bars(tmp_path, monkeypatch, names):
    figure = pytest.importorskip("matplotlib.figure").Figure((6, 5), layout="constrained")
    monkeypatch.setattr(charts, "_figure", lambda *_: figure)
    series = [
        Series(f"series {k}", [0, 1], [Spread((k, 90.0)), Spread((30.0, k))]) for k in range(6)
    ]
    draw_panels([Panel("named", "percent", series, names=names)], tmp_path / "t.png", title="t")
    (place,) = figure.axes
    assert not place.get_legend().get_window_extent().overlaps(place.get_window_extent())


def test_bars_of_passes_stand_side_by_side():
    study = SimpleNamespace(
        plan=SimpleNamespace(trainings={k: SimpleNamespace(name=k, label=k) for k in "ab"}),
        figure=lambda _: Spread((1.0, 2.0)),
    )
    asked = [SimpleNamespace(name="own", label="own", passes=3)]
    panel = vlm_page._over_passes(study, asked, "named", title="t", unit="percent")
    places = [tuple(series.places) for series in panel.series]
    assert len(places) == 2
    assert not set(places[0]) & set(places[1])
    assert [round(place) for place in places[0]] == [1, 2, 3]


def test_costs_are_measured_with_the_first_training_that_can_be_done(parts, tmp_path):
    told = made({**parts, "VISION": "no/such-clip"})
    shop = Workshop(told, tmp_path)
    costs = measure_costs(shop)
    assert costs.encode > 0 < costs.learn
    assert costs.answer > 0
    assert work_of(told, shop.missing(), costs).total > 0
    assert shop.count_trained() == 0


def _uses(old, new):
    return (
        (f'start = "{old}"', f'start = "{new}"'),
        (f'of = ["{old}"]', f'of = ["{new}"]'),
        (f"{old}/", f"{new}/"),
    )


def _only_writer():
    head = PLAN[: PLAN.index("[train.first]")]
    measure = '[measure.own]\nkind = "captions"\nitems = 3\n'
    return head.replace(', "leakage/read"', "") + measure


def _only_first():
    head = PLAN[: PLAN.index("[train.writer]")].replace("seeds = 2", "seeds = 1")
    first = PLAN[PLAN.index("[train.first]") : PLAN.index("[train.second]")]
    measure = '[measure.own]\nkind = "captions"\nprompts = "oracle"\nitems = 3\n'
    return head.replace(', "leakage/read"', "") + first + measure
