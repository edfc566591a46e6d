"""NaturalBench: four answers of a group, counted by question, by picture and by group."""

import json
from pathlib import Path

import pytest
from PIL import Image

from answers_data import Says
from diffenc.errors import ConfigError
from diffenc.evals.choices import (
    choice_table,
    evaluate_choices,
    load_naturalbench,
    naturalbench_from_rows,
    shapes_naturalbench,
)
from diffenc.evals.paper import published_table
from evals_data import encoded

RELEASED = Path(__file__).parents[1] / "golden/peers/naturalbench.json"
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
QUESTIONS = {
    "yes_no": ("Is the door open?", "Is the door closed?"),
    "multiple_choice": (
        "What is on the table? Option: A: a cup of tea; B: a book;",
        "Which way does it look? Options: A. left, B. right",
    ),
}
WORDS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}


def picture(number):
    return Image.new("RGB", (24, 16), (number, 0, 0))


def row(index, kind="yes_no", cell=picture, **changes):
    """A row of the Hub's file, whose pictures' red channel is their number."""
    first, second = QUESTIONS[kind]
    yes, no = WORDS[kind]
    made = {
        "Index": index,
        "Image_0": cell(2 * index),
        "Image_1": cell(2 * index + 1),
        "Question_0": first,
        "Question_1": second,
        "Image_0_Question_0": yes,
        "Image_1_Question_0": no,
        "Image_0_Question_1": no,
        "Image_1_Question_1": yes,
        "Question_Type": kind,
        "Source": "DOCCI",
    }
    return {**made, **changes}


def answers_of(item):
    """Right and wrong option as a model would say them."""
    words = WORDS[item.labels["type"]]
    return words[item.answer], words[1 - item.answer]


def test_rows_become_four_questions_of_a_group():
    benchmark = naturalbench_from_rows([row(0), row(1, "multiple_choice")])
    assert benchmark.problems == ()
    assert [item.id for item in benchmark.items[:4]] == [f"0-q{q}-i{i}" for q, i in PLACES]
    assert [item.answer for item in benchmark.items] == [0, 1, 1, 0] * 2
    assert benchmark.items[0].text == "Is the door open? Please answer Yes or No."
    last = benchmark.items[-1]
    assert last.options == ("left", "right")
    assert benchmark.items[4].options == ("a cup of tea", "a book")
    assert last.text.endswith(
        "B. right Please output the letter corresponding to the correct option."
    )
    assert last.pictures[0].open().getpixel((0, 0))[0] == 3
    assert "2 groups where NaturalBench has 1900" in benchmark.notes[0]


def test_another_instruction_or_none():
    plain = naturalbench_from_rows([row(0)], instruction="")
    assert plain.items[0].text == "Is the door open?"
    other = naturalbench_from_rows([row(0)], instruction="Say it.")
    assert other.items[0].text == "Is the door open? Say it."


def stored(number):
    """A picture as the Hub's files have it."""
    return {"bytes": encoded(picture(number), "png")}


def test_the_hubs_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part, indices in enumerate(((0, 1), (2,))):
        rows = [row(index, cell=stored) for index in indices]
        path = tmp_path / f"data/train-0000{part}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    benchmark = load_naturalbench(tmp_path)
    assert [item.group for item in benchmark.items[::4]] == ["0", "1", "2"]
    assert benchmark.items[-1].pictures[0].open().getpixel((0, 0))[0] == 5


def test_the_released_program_counts_the_same():
    """Questions are read and counted as by the released evaluation, on its kinds of reply."""
    frozen = json.loads(RELEASED.read_text(encoding="utf-8"))
    groups = frozen["groups"]
    benchmark = naturalbench_from_rows([row(int(k), each["type"]) for k, each in groups.items()])
    replies = {
        f"{name}-q{q}-i{i}": each["replies"][f"q{q}_i{i}"]
        for name, each in groups.items()
        for q, i in PLACES
    }
    order = iter([replies[item.id] for item in benchmark.items])
    evaluation = evaluate_choices(benchmark, Says(lambda *_: next(order)), batch_size=1)
    assert evaluation.accuracy / 100 == pytest.approx(frozen["scores"]["Acc"])
    assert evaluation.all_right("question") / 100 == pytest.approx(frozen["scores"]["Q_Acc"])
    assert evaluation.all_right("image") / 100 == pytest.approx(frozen["scores"]["I_Acc"])
    assert evaluation.overall / 100 == pytest.approx(frozen["scores"]["G_Acc"])
    assert evaluation.unread == sum(
        reply in ("C", "I cannot tell.")
        for each in groups.values()
        for reply in each["replies"].values()
    )


@pytest.mark.parametrize(
    ("wrong", "numbers"),
    [
        ([], (100, 100, 100, 100)),
        ([(0, 0)], (75, 50, 50, 0)),
        ([(0, 0), (0, 1)], (50, 50, 0, 0)),
        ([(0, 0), (1, 0)], (50, 0, 50, 0)),
        ([(0, 0), (1, 1)], (50, 0, 0, 0)),
    ],
)
def test_answers_questions_pictures_and_groups(wrong, numbers):
    benchmark = naturalbench_from_rows([row(0)])
    order = iter(
        [
            answers_of(item)[place in wrong]
            for item, place in zip(benchmark.items, PLACES, strict=True)
        ]
    )
    evaluation = evaluate_choices(benchmark, Says(lambda *_: next(order)), batch_size=1)
    shown = (
        evaluation.accuracy,
        evaluation.all_right("question"),
        evaluation.all_right("image"),
        evaluation.overall,
    )
    assert shown == numbers
    content = evaluation.to_dict()
    assert (content["question_accuracy"], content["image_accuracy"]) == numbers[1:3]
    table = choice_table([evaluation], paper=False)
    assert table.columns == ("model", "answers", "questions", "images", "groups")
    assert table.rows[0][1:] == tuple(f"{number:.1f}" for number in numbers)
    assert table.rows[1] == ("chance", "50.0", "25.0", "25.0", "6.2")


def test_the_later_versions_rows_stand_beside():
    evaluation = evaluate_choices(naturalbench_from_rows([row(0)]), Says(lambda *_: "yes"))
    rows = choice_table([evaluation]).rows
    best = "paper: later version, cross-attention, s = 4"
    assert (best, "–", "40.71", "46.21", "15.26") in rows
    assert published_table("later-fusion").rows[-1].values[1] == 30.7


def test_a_group_with_a_broken_picture_leaves_whole():
    rows = [row(0), row(1, Image_1={"bytes": b"no picture"})]
    benchmark = naturalbench_from_rows(rows)
    with pytest.raises(ConfigError, match="unreadable pictures"):
        evaluate_choices(benchmark, Says(lambda *_: "yes"))
    evaluation = evaluate_choices(benchmark, Says(lambda *_: "yes"), skip_broken=True)
    assert {item.group for item in evaluation.items} == {"0"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"Index": ""}, "rows without an id"),
        ({"Question_0": ""}, "missing questions"),
        ({"Image_0": None}, "missing pictures"),
        ({"Question_Type": "open"}, "unknown types of question"),
        ({"Image_1_Question_1": "maybe"}, "answers that are no option"),
        ({"Question_Type": "multiple_choice"}, "questions without options"),
        ({"Index": 0}, "ids that occur twice"),
    ],
    ids=str,
)
def test_broken_rows_are_told_and_left_out(change, kind):
    benchmark = naturalbench_from_rows([row(0), row(1, **change)])
    assert [problem.kind for problem in benchmark.problems] == [kind]
    assert {item.group for item in benchmark.items} == {"0"}


@pytest.mark.parametrize(
    ("rows", "message"), [([{"Index": 1}], "Image_0"), ({"Index": 1}, "must be a list of tables")]
)
def test_what_is_no_table_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        naturalbench_from_rows(rows)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no NaturalBench"):
        load_naturalbench(tmp_path)


class TestMiniature:
    def test_each_question_is_true_of_one_picture_alone(self):
        benchmark = shapes_naturalbench(6, seed=3)
        assert len(benchmark.items) == 2 * 6 * 4
        assert not benchmark.published
        groups = {}
        for item in benchmark.items:
            groups.setdefault(item.group, {})[item.labels["question"], item.labels["image"]] = item
        for group in groups.values():
            assert {place: item.answer for place, item in group.items()} == {
                (str(q), str(i)): int(q != i) for q, i in PLACES
            }
            assert group["0", "0"].text == group["0", "1"].text != group["1", "0"].text
            same = group["0", "0"].pictures[0], group["1", "0"].pictures[0]
            assert same[0].open().tobytes() == same[1].open().tobytes()
            assert isinstance(same[0].open(), Image.Image)

    def test_seeds_differ_and_repeat(self):
        texts = [[item.text for item in shapes_naturalbench(4, seed=s).items] for s in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    def test_a_number_below_one_is_refused(self):
        with pytest.raises(ConfigError):
            shapes_naturalbench(0)


@pytest.mark.parametrize(
    "question",
    [
        "Which? (A) dog (B) cat",
        "Which? (A) dog, (B) cat.",
        "Which? Option A: dog; Option B: cat;",
    ],
)
def test_options_are_words_without_marks(question):
    rows = [row(0, "multiple_choice", Question_0=question)]
    assert naturalbench_from_rows(rows).items[0].options == ("dog", "cat")


@pytest.mark.parametrize(
    "question", ["Which? A: dog; B: cat; C: cow", "Which? A: B: cat", "Which? A: ; B: ;", "A: dog"]
)
def test_questions_of_other_than_two_options_are_left_out(question):
    benchmark = naturalbench_from_rows([row(0), row(1, "multiple_choice", Question_0=question)])
    assert [problem.kind for problem in benchmark.problems] == ["questions without options"]
