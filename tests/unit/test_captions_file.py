import json
import re

import pytest

from diffenc.errors import ConfigError
from diffenc.evals import FunctionAnswerer, read_captions
from diffenc.evals.captioning import evaluate_captions, shapes_captions
from diffenc.evals.captions_file import with_captions
from evals_data import write_jsonl

ANSWERS = {"type": "answers", "format": 1, "task": "captions of shapes"}


def answer(item, text, model="m", part="pass 1"):
    line = {"type": "answer", "model": model, "part": part, "item": item, "digest": "0"}
    return {**line, "answer": text}


def written(tmp_path, *lines):
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [ANSWERS, {"type": "model", "name": "m", "description": {}}, *lines])
    return path


def says(model, text):
    return FunctionAnswerer(model, lambda images, questions, **_: [text] * len(questions))


def test_what_a_run_answered_is_what_another_one_reads(tmp_path):
    path = tmp_path / "run.jsonl"
    data = shapes_captions(3)
    counter = iter(range(100))
    model = FunctionAnswerer("m", lambda images, questions, **_: [f" c{next(counter)} "] * 1)
    evaluation = evaluate_captions(
        data, model, passes=2, metrics=(), results=path, batch_size=1, prompts=lambda item: ""
    )
    assert (
        read_captions(path) == evaluation.passes[-1].captions == {"0": "c3", "1": "c4", "2": "c5"}
    )
    other = evaluate_captions(data, says("n", "x"), metrics=(), prompts=read_captions(path))
    assert other.passes[0].prompts == read_captions(path)


def test_the_last_pass_is_read_and_reviews_are_not(tmp_path):
    lines = [answer("1", f"of pass {n}", part=f"pass {n}") for n in (2, 10, 9)]
    path = written(tmp_path, *lines, answer("1", "8 7", model="judge", part="review of m"))
    assert read_captions(path) == {"1": "of pass 10"}


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ('{"7": " a cat ", "x": ""}', {"7": "a cat", "x": ""}),
        (
            '\n [{"image_id": 7, "caption": "a cat"}, {"image_id": "x", "caption": ""}]',
            {"7": "a cat", "x": ""},
        ),
    ],
    ids=["by id", "coco"],
)
def test_captions_of_other_captioners_are_plain_json(tmp_path, content, captions):
    path = tmp_path / "captions.json"
    path.write_text(content)
    assert read_captions(path) == captions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no captions: captions are read from"),
        ("a cat\n", "holds no captions"),
        ('{"7": 3}', "the caption of 7 must be a text"),
        ('{"7": "a", "7": "b"}', "twice"),
        ('[{"image": 7, "caption": "a"}]', "entry 0 has no image_id and caption"),
        (
            '[{"image_id": 7, "caption": "a"}, {"image_id": "7", "caption": "b"}]',
            "entry 1 is a second caption of 7",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_captions(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_captions(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds answers of none"),
        ([answer("1", "a"), answer("2", "b", model="n")], "of several models, m, n"),
        ([answer("1", "a"), answer("1", "b")], "line 4 of answers.jsonl is a second caption of 1"),
        ([answer("1", "a", part="x"), answer("1", "b", part="y")], "of several kinds, x, y"),
        ([{"type": "answer", "model": "m"}], "line 3 of answers.jsonl: part must be a text"),
    ],
)
def test_answers_that_are_no_captions_of_one_model_are_refused(
    tmp_path, monkeypatch, lines, message
):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, *lines)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_captions("answers.jsonl")
    (tmp_path / "answers.jsonl").write_text(json.dumps(ANSWERS) + '\n{"type": "ans')
    with pytest.raises(ConfigError, match=r"line 2 of answers.jsonl is broken"):
        read_captions("answers.jsonl")


def test_items_and_captions_belong_together():
    data = shapes_captions(3)
    every = {"0": "a", "1": "b", "2": "c"}
    assert with_captions(data, every, where="f", part=False) == data
    with pytest.raises(ConfigError, match=r"f has captions of 1 items that .* has not, such as 7"):
        with_captions(data, {**every, "7": "d"}, where="f", part=False)
    assert with_captions(data, {**every, "7": "d"}, where="f", part=True) == data
    lacking = with_captions(data, {"0": "a", "2": "c"}, where="f", part=False)
    with pytest.raises(ConfigError, match=r"1 items without a caption in f \(id 1\)"):
        evaluate_captions(lacking, says("m", "x"), metrics=(), prompts=lambda item: "")
    left = evaluate_captions(
        lacking, says("m", "x"), metrics=(), prompts=lambda item: "", skip_broken=True
    )
    assert [item.id for item in left.items] == ["0", "2"]
    assert any("items without a caption" in note for note in left.notes)
