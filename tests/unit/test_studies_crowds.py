"""Crowded scenes in what studies of language models learn from and are asked."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffenc.errors import ConfigError
from diffenc.evals.choices.miniature import shapes_mmvp
from diffenc.inputs.policies import PromptSample, captions_of, parse_policy
from diffenc.mllm.training import write_miniature
from diffenc.mllm.training.miniature import EDITIONS
from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies.charts import Panel, Series, draw_panels
from diffenc.studies.spreads import Spread
from diffenc.studies.vlm import study as study_module
from diffenc.studies.vlm.estimate import work_of
from diffenc.studies.vlm.measure import ask_questions, measure
from diffenc.studies.vlm.measurements import Measurement
from diffenc.studies.vlm.plan_file import bundled_plan, parse_plan
from diffenc.studies.vlm.tables import training_table
from diffenc.studies.vlm.trainings import LEARNS
from diffenc.studies.vlm.workshop import Workshop

NAMES = {*COLORS, *SHAPES, "object", "small", "large"}

PLAN = """
title = "T"
about = "A"
[data]
scenes = 6
turns = 1
[model]
encoder = "E"
language_model = "L"
template = "chat"
[train.first]
stage = "align"
[measure.answers]
kind = "answers"
"""


def blobs(picture: Image.Image) -> int:
    """Number of hues that saturated pixels have, at least 20 of each."""
    hue, saturation, _ = np.asarray(picture.convert("HSV"), int).transpose(2, 0, 1)
    counts = Counter((hue[saturation > 150] // 20).tolist())
    return sum(count >= 20 for count in counts.values())


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_crowded_data_has_crowded_pictures_and_few_has_few(tmp_path) -> None:
    paths = write_miniature(tmp_path, scenes=12, size=96, crowds=True, turns=1, lettered=0)
    plain = write_miniature(tmp_path / "plain", scenes=12, turns=1)
    pictures = [Image.open(path) for path in sorted(paths["images"].iterdir())]
    few = [Image.open(path) for path in sorted(plain["images"].iterdir())]
    assert {picture.size for picture in pictures} == {(96, 96)}
    assert {picture.size for picture in few} == {(64, 64)}
    assert sum(map(blobs, pictures)) > 1.5 * sum(map(blobs, few))
    talks = json.loads(paths["instruct"].read_text("utf-8"))
    assert {len(talk["conversations"]) for talk in talks} == {2}


def test_crowded_questions_are_asked_about_crowded_pictures() -> None:
    shown: list[Image.Image] = []

    def generate(images, _questions, **_options):
        shown.extend(picture for (picture,) in images)
        return ["red"] * len(images)

    chosen, answers = ask_questions(generate, 42, seed=973_000, crowds=True)
    assert {picture.size for picture in shown} == {(96, 96)}
    assert answers == ["red"] * 42
    assert max(index for question in chosen for index in question.subjects) > 2
    crowded = sum(map(blobs, shown))
    shown.clear()
    chosen, _ = ask_questions(generate, 42, seed=973_000)
    assert {picture.size for picture in shown} == {(64, 64)}
    assert max(index for question in chosen for index in question.subjects) <= 2
    assert crowded > 1.5 * sum(map(blobs, shown))


def test_a_measurement_on_crowds_asks_about_crowds() -> None:
    sizes: set[tuple[int, int]] = set()

    def generate(images, questions, prompts, **_options):
        sizes.update(picture.size for (picture,) in images)
        assert prompts == questions
        return ["red"] * len(images)

    crowded = Measurement(name="m", kind="answers", prompts="question", items=14, crowds=True)
    figures = measure(crowded, generate, seed=0).figures
    assert sizes == {(96, 96)}
    assert figures["color"] in (0.0, 50.0, 100.0)  # two of fourteen questions
    with pytest.raises(ConfigError, match=r'measure\.m\.crowds is for kind = "answers"'):
        Measurement(name="m", kind="captions", crowds=True)
    with pytest.raises(ConfigError, match=r"measure\.m\.crowds must be True or False"):
        Measurement(name="m", kind="answers", crowds=1)  # type: ignore[arg-type]


def test_a_model_that_is_untold_reads_what_is_asked_for_and_not_of_which_object() -> None:
    read: list[str] = []
    looked: list[str] = []

    def generate(images, questions, prompts, **_options):
        read.extend(questions)
        looked.extend(prompts)
        return ["red"] * len(images)

    known, untold = (
        Measurement(name="m", kind="answers", prompts="question", items=14, untold=flag)
        for flag in (False, True)
    )
    figures = measure(known, generate, seed=0).figures
    assert len(set(read)) > 7
    questions = [*read]
    assert looked == questions
    read.clear()
    looked.clear()
    assert measure(untold, generate, seed=0).figures == figures
    assert set(read) == {
        "what color?",
        "what shape?",
        "what size?",
        "how many?",
        "where?",
        "is there?",
        *(text for text in read if text in ("left of?", "right of?", "above?", "below?")),
    }
    assert looked == questions
    with pytest.raises(ConfigError, match=r'measure\.m\.untold is for kind = "answers"'):
        Measurement(name="m", kind="mmvp", untold=True)


def test_what_is_asked_through_the_encoder_stands_in_its_prompt_alone(tmp_path) -> None:
    paths = write_miniature(tmp_path, scenes=8, turns=1, lettered=0)
    talks, untold = (json.loads(paths[name].read_text("utf-8")) for name in ("instruct", "asked"))
    for talk, record in zip(talks, untold, strict=True):
        question, answer = (turn["value"] for turn in talk["conversations"])
        (caption,) = record["captions"]
        sample = PromptSample(record["id"], record["conversations"], captions_of(record))
        assert parse_policy("caption")(sample, epoch=1) == caption
        assert caption.endswith("?") or caption == "describe the picture."
        assert question == f"<image>\n{caption}"
        request, given_answer = (turn["value"] for turn in record["conversations"])
        assert given_answer == answer
        assert request.startswith("<image>\n")
        assert not NAMES & set(request.rstrip("?").split())
        assert not caption.endswith("?") or request.endswith("?")
        assert (record["id"], record["image"]) == (talk["id"], talk["image"])


def test_a_training_that_asks_through_the_encoder_learns_from_data_of_its_own(tmp_path) -> None:
    second = '[train.second]\nstage = "instruct"\nstart = "first"\ndata = "asked"\n'
    shop = Workshop(parse_plan("p", PLAN + second), tmp_path)
    usual = Workshop(parse_plan("p", PLAN + second.replace("asked", "instruct")), tmp_path)
    assert list(LEARNS) == list(EDITIONS)
    assert shop.config("second", 0).data.annotations == str(shop.data()["asked"])
    assert shop.data()["asked"].is_file()
    assert shop.identity("second", 0) != usual.identity("second", 0)
    assert training_table(shop.plan).rows[1][1] == "answers to what the encoder alone is asked"
    with pytest.raises(ConfigError, match=r"train\.second\.data.*'asked'"):
        parse_plan("p", PLAN + second.replace("asked", "ground"))


def test_crowded_data_is_written_and_other_data_stays_what_it_was(tmp_path) -> None:
    def shop(more: str = "") -> Workshop:
        return Workshop(parse_plan("p", PLAN.replace("turns = 1", f"turns = 1\n{more}")), tmp_path)

    usual, crowded, plain = shop(), shop("crowds = true\nlettered = 0"), shop("lettered = 2")
    assert usual.folder_of("first", 0) == plain.folder_of("first", 0)
    assert usual.folder_of("first", 0) != crowded.folder_of("first", 0)
    first, second = usual.data(), crowded.data()
    assert first["images"].parent.name == "shapes-6-0-1-1.2.2"
    assert second["images"].parent.name == "shapes-6-0-1-1.2.2-lettered-0-crowds-True"
    assert size_of(next(second["images"].iterdir())) == (96, 96)
    assert size_of(next(first["images"].iterdir())) == (64, 64)
    for more, said in (("crowds = 1", "crowds"), ("lettered = -1", "lettered must be")):
        with pytest.raises(ConfigError, match=said):
            shop(more)


def test_the_plan_of_tokens_compares_64_cells_with_twelve_tokens() -> None:
    plan = bundled_plan("tokens")
    few, grid, cells = (plan.model(name)["options"] for name in ("few", "grid", "cells"))
    assert (few["tokens"], few["word_count"], few["grid"]) == ("grid+words", 8, 2)
    assert (grid["grid"], cells["grid"]) == (8, 2)
    assert "tokens" not in grid
    assert plan.data.crowds
    assert all(measurement.crowds for measurement in plan.measurements.values())
    for name in ("few", "grid"):
        both = plan.trainings[name], plan.trainings[f"asked-{name}"]
        assert [each.learns_from for each in both] == ["instruct", "asked"]
        assert len({each.start for each in both}) == 1
        assert plan.model(name)["options"] == plan.model(f"asked-{name}")["options"]


def test_an_axis_is_logarithmic_where_a_panel_says_so(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    plain = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), plain(self, *a, **k))[1]
    )
    series = Series("own", [1, 4, 64], [Spread((0.1, 0.2))] * 3)
    for flag in (True, False):
        panel = Panel("t", "u", [series], axis="tokens", logarithmic=flag)
        draw_panels([panel], tmp_path / f"{flag}.png", title="t")
    logarithmic, linear = (figure.axes[0] for figure in drawn)
    assert (logarithmic.get_xscale(), linear.get_xscale()) == ("log", "linear")
    assert [tick.get_text() for tick in logarithmic.get_xticklabels()] == ["1", "4", "64"]
    assert len(linear.get_xticks()) == 64


def test_pairs_are_asked_in_words_and_count_where_both_answers_are_right() -> None:
    texts: list[str] = []
    benchmark = shapes_mmvp(3, seed=974_000)
    true = {item.question: [] for item in benchmark.items}
    for item in benchmark.items:
        true[item.question].append(item.options[item.answer])

    def knowing(images, questions, prompts, **_options):
        texts.extend(questions)
        assert prompts == questions
        turn = [true[question].pop(0) for question in questions]
        return [f" {answer.upper()}." for answer in turn]

    pairs = Measurement(name="m", kind="pairs", prompts="question", items=3)
    figures = measure(pairs, knowing, seed=0).figures
    assert figures == {"pairs": 100.0, "questions": 100.0, "chance": 25.0, "unread": 0.0}
    assert len(texts) == 36
    assert not any("(a)" in question for question in texts)

    def stubborn(images, questions, **_options):
        return ["red" if "color" in question else "a red star" for question in questions]

    figures = measure(pairs, stubborn, seed=0).figures
    color_pairs = [item for item in benchmark.items if item.labels["pattern"] == "color"]
    red = sum(item.options[item.answer] == "red" for item in color_pairs)
    assert figures["pairs"] == 0.0  # both pictures got the same answer
    assert figures["questions"] == pytest.approx(100 * red / 36)
    some_red = any("red" in item.options for item in color_pairs)
    assert figures["unread"] == pytest.approx(100 * (30 + (0 if some_red else 6)) / 36)
    with pytest.raises(ConfigError, match='pairs has no caption for "oracle"'):
        Measurement(name="m", kind="pairs", prompts="oracle")


def test_what_was_measured_by_another_way_of_asking_is_not_found(tmp_path, monkeypatch) -> None:
    plan = parse_plan("p", PLAN)
    run = study_module._Run(plan, Workshop(plan, tmp_path), work_of(plan), None)
    known, untold = (
        Measurement(name="m", kind="answers", prompts="question", untold=flag)
        for flag in (False, True)
    )
    before = [run._path("first", each, 0) for each in (known, untold)]
    monkeypatch.setattr(study_module, "UNTOLD", "another way")
    assert run._path("first", known, 0) == before[0]
    assert run._path("first", untold, 0) != before[1]
