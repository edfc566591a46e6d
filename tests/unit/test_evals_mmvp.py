import json
import shutil

import pytest

from answers_data import Says, check_all_is_told_before_anything_is_asked, mmvp, shade
from diffenc.errors import ConfigError
from diffenc.evals.choices import (
    choice_table,
    evaluate_choices,
    extract_choice,
    load_mmvp,
    mmvp_from_rows,
    shapes_mmvp,
)
from diffenc.evals.choices.base import LETTER_INSTRUCTION
from diffenc.evals.choices.mmvp import split_options
from evals_data import change_questions, read_lines


def check(benchmark, count=8):
    assert benchmark.problems == ()
    assert [item.id for item in benchmark.items] == [str(k) for k in range(1, count + 1)]
    for number, item in enumerate(benchmark.items, start=1):
        assert item.options == ("Open", "Closed")
        assert item.answer == (number - 1) % 2
        first = number - 1 + number % 2
        assert item.group == f"{first}-{first + 1}"
        assert item.pictures[0].open().getpixel((0, 0))[0] == pytest.approx(number, abs=3)


class TestExtraction:
    @pytest.mark.parametrize(
        ("answer", "index", "rule"),
        [
            ("a", 0, "letter"),
            (" (B) ", 1, "letter"),
            ("**C.**", 2, "letter"),
            ("Option D:", 3, "letter"),
            ("(B) 4\n\nThere are four.", 1, "brackets"),
            ("There are (a) 3 nuts in the bowl.", 0, "brackets"),
            ("Neither (A) nor (B).\n\nThe correct answer is:\n(C) 5", 2, "brackets"),
            ("(B), as I said: (B)", 1, "brackets"),
            ("B. because there are four", 1, "letter"),
            ("B\nThere are four.", 1, "letter"),
            ("The answer is C.", 2, "phrase"),
            ("Answer: D", 3, "phrase"),
            ("There are 5 of them", 2, "words"),
            ("FIVE: 5!", 2, "words"),
        ],
    )
    def test_what_is_read(self, answer, index, rule):
        assert extract_choice(answer, ["3", "4", "5", "none of these"]) == (index, rule)

    @pytest.mark.parametrize(
        "answer",
        [
            "",
            "e",
            "(Z)",
            "I cannot tell.",
            "(A) or (B)",
            "none of the choices (A) 3, (B) 4 or (C) 5 apply",
            "It is 3 or 4.",
            "There are 35.",
            "A cat is there",
            "the answer is A cat",
        ],
    )
    def test_what_is_not(self, answer):
        assert extract_choice(answer, ["3", "4", "5", "none of these"]) is None

    def test_longer_options_count_before_those_that_they_hold(self):
        options = ["red", "not red"]
        assert extract_choice("it is not red", options) == (1, "words")
        assert extract_choice("it is red", options) == (0, "words")
        assert extract_choice("it is not red but red", options) is None
        assert extract_choice("it is covered", options) is None
        assert extract_choice("yes", ["Yes", "yes"]) is None

    @pytest.mark.parametrize("options", [[], ["one"], ["x"] * 11])
    def test_too_few_or_too_many_options(self, options):
        with pytest.raises(ConfigError, match="2 to 10 options"):
            extract_choice("a", options)

    def test_options_of_a_row(self):
        assert split_options("(a) Open (b) Closed") == ("Open", "Closed")
        assert split_options("(A) In the box, (B) On it; (C) No (one)") == (
            *("In the box", "On it", "No (one)"),
        )
        assert split_options("(a) Circle(s) (b) Square(s)") == ("Circle(s)", "Square(s)")
        assert split_options("(a) f(a) = 1 (b) f(b) = 2") == ("f(a) = 1", "f(b) = 2")
        assert split_options("(a)Open(b)Closed") == ("Open", "Closed")
        for broken in ("(a) x (b) y (d) z", "(a) They (a) are (b) blue", "Well, (a) x (b) y"):
            assert split_options(broken) == ()
        for broken in ("", "Open", "(a) Open", "(b) Open (a) Closed", "(a) (b) Closed"):
            assert split_options(broken) == ()


class TestLayouts:
    @pytest.mark.parametrize("index", ["lndex", "Index", "index", "Question ID"])
    def test_headers_of_the_first_column(self, tmp_path, index):
        benchmark = load_mmvp(mmvp(tmp_path, index=index))
        check(benchmark)
        item = benchmark.items[2]
        assert item.question == "Is the door of house 2 open, or closed?"
        assert item.text == f"{item.question} (a) Open (b) Closed\n{LETTER_INSTRUCTION}"

    def test_the_official_wording(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path), instruction="")
        assert benchmark.items[0].text == (
            "Is the door of house 1 open, or closed? (a) Open (b) Closed"
        )

    def test_in_a_folder_and_in_an_archive(self, tmp_path):
        mmvp(tmp_path / "MMVP")
        check(load_mmvp(tmp_path))
        check(load_mmvp(shutil.make_archive(tmp_path / "all", "zip", tmp_path, "MMVP")))

    def rows(self, count=8, picture=shade):
        return [
            {
                "Index": k,
                "Question": "Is it open?",
                "Options": "(a) Open (b) Closed",
                "Correct Answer": "ab"[(k - 1) % 2],
                "image": picture(k),
            }
            for k in range(1, count + 1)
        ]

    def test_rows_in_memory(self):
        check(mmvp_from_rows(self.rows()))

    def test_parquet_files_of_the_mirror(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        from evals_data import encoded

        rows = self.rows(picture=lambda k: {"bytes": encoded(shade(k), "png"), "path": None})
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-0.parquet")
        check(load_mmvp(tmp_path))
        with pytest.raises(ConfigError, match="put right already"):
            load_mmvp(tmp_path, fix_errata=True)

    def test_errata_are_exchanged_on_request_and_told_always(self, tmp_path):
        mmvp(tmp_path, count=282)
        plain, fixed = load_mmvp(tmp_path), load_mmvp(tmp_path, fix_errata=True)
        changed = [
            one.id
            for one, other in zip(plain.items, fixed.items, strict=True)
            if one.answer != other.answer
        ]
        assert changed == ["99", "100", "279", "280"]
        assert "questions 99, 100, 279, 280 are as in the file" in plain.notes[-1]
        assert "exchanged within their pairs" in fixed.notes[-1]

    def test_problems_are_told_together_before_anything_is_asked(self, tmp_path):
        mmvp(tmp_path)
        (tmp_path / "MMVP Images/3.jpg").unlink()
        (tmp_path / "MMVP Images/7.jpg").write_bytes(b"no picture")

        def edit(rows):
            rows[1][0] = "one"
            rows[5][2] = "Open or closed"
            rows[6][3] = "(c)"
            return [*rows, rows[8]]

        change_questions(tmp_path, edit)
        benchmark = load_mmvp(tmp_path)
        check_all_is_told_before_anything_is_asked(
            lambda model: evaluate_choices(benchmark, model),
            "1 ids that are no number (Questions.csv, line 2: 'one')",
            "1 missing pictures (question 3: 3.jpg)",
            "1 options without letters (question 5",
            "1 answers that are no option (question 6: (c))",
            "1 ids that occur twice (question 8",
            "incomplete pairs (question 2: no question 1",
            "1 unreadable pictures (MMVP Images/7.jpg",
        )
        with pytest.raises(ConfigError, match="no question that can be asked"):
            evaluate_choices(benchmark, Says(lambda *_: "a"), skip_broken=True)

    def test_two_pictures_of_a_question_are_refused_unless_they_are_copies(self, tmp_path):
        mmvp(tmp_path)
        shutil.copy(tmp_path / "MMVP Images/3.jpg", tmp_path / "MMVP Images/003.jpg")
        check(load_mmvp(tmp_path))
        (tmp_path / "MMVP Images/003.jpg").write_bytes(b"another picture")
        with pytest.raises(ConfigError, match="picture 3 may be"):
            load_mmvp(tmp_path)

    def test_what_is_no_mmvp_is_told(self, tmp_path):
        with pytest.raises(ConfigError, match=r"neither Questions\.csv nor a \.parquet"):
            load_mmvp(tmp_path)
        with pytest.raises(ConfigError, match="hf download MMVP/MMVP"):
            load_mmvp(tmp_path / "nowhere")
        (tmp_path / "Questions.csv").write_text("Index,Query,Options,Correct Answer\n1,a,b,c\n")
        with pytest.raises(ConfigError, match="no column 'Question'; its columns are"):
            load_mmvp(tmp_path)


class TestScore:
    def right_about(self, benchmark, numbers):
        counter = iter(benchmark.items)

        def says(images, question, prompt):
            item = next(counter)
            index = item.answer if int(item.id) in numbers else 1 - item.answer
            return f"({'ab'[index]})"

        return Says(says)

    def test_pairs_count_where_both_are_right(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path))
        evaluation = evaluate_choices(benchmark, self.right_about(benchmark, {1, 2, 3, 6, 7, 8}))
        assert evaluation.accuracy == 75
        assert evaluation.overall == 50
        assert evaluation.chance == 25
        assert evaluation.unread == 0

    def test_one_answer_to_all_is_never_a_pair(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path))
        evaluation = evaluate_choices(benchmark, Says(lambda *_: "(a)"))
        assert (evaluation.accuracy, evaluation.overall) == (50, 0)

    def test_unread_answers_are_wrong_and_counted(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path))
        evaluation = evaluate_choices(benchmark, Says(lambda *_: "I cannot tell."))
        assert (evaluation.accuracy, evaluation.overall, evaluation.unread) == (0, 0, 8)
        assert "8 unread, which count as wrong" in evaluation.notes[-1]
        assert "(100.0 percent of 8)" in evaluation.notes[-1]
        assert evaluation.to_dict()["unread_share"] == 1
        table = choice_table([evaluation])
        assert "unread answers: model 8 (100.0 percent)" in table.title
        json.dumps(evaluation.to_dict(), allow_nan=False)

    @pytest.mark.parametrize(("unread", "refused"), [(19, False), (20, False), (21, True)])
    def test_above_a_fifth_of_unread_answers_a_model_is_not_measured(self, unread, refused):
        benchmark, counter = shapes_mmvp(9).limited(100), iter(range(100))

        def say(*_):
            return "?" if next(counter) < unread else "(a)"

        evaluation = evaluate_choices(benchmark, Says(say))
        assert (evaluation.unread, evaluation.unread_share) == (unread, unread / 100)
        reason = f"not measured: {unread} % of answers unread" if refused else None
        assert evaluation.not_measured == evaluation.to_dict()["not_measured"] == reason
        table = choice_table([evaluation])
        assert (table.rows[0][1:] == ("not measured",) * 2) is refused
        assert table.rows[1] == ("chance", "50.0", "25.0")
        assert f"model {unread} ({unread:.1f} percent)" in table.title
        assert evaluation.notes[-1].endswith(f"; model is {reason}") is refused

    def test_broken_pictures_take_their_pair_along(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path))
        (tmp_path / "MMVP Images/4.jpg").write_bytes(b"")
        evaluation = evaluate_choices(benchmark, Says(lambda *_: "a"), skip_broken=True)
        assert [item.id for item in evaluation.items] == ["1", "2", "5", "6", "7", "8"]

    def test_prompts_of_the_encoder(self, tmp_path):
        benchmark = load_mmvp(mmvp(tmp_path))
        model = Says(lambda *_: "a")
        evaluate_choices(benchmark, model, prompts=lambda item: item.question)
        evaluate_choices(benchmark, model)
        assert [row[2] for row in model.asked[7:9]] == [benchmark.items[7].question, None]

    def test_the_table_has_chance_and_the_paper(self, tmp_path):
        evaluation = evaluate_choices(load_mmvp(mmvp(tmp_path)), Says(lambda *_: "a"))
        rows = choice_table([evaluation]).rows
        assert rows[:2] == (("model", "50.0", "0.0"), ("chance", "50.0", "25.0"))
        assert ("paper: CLIP-LLaVA-v1.5-7B, ViT-L14-336", "–", "24.7") in rows
        assert len(choice_table([evaluation], paper=False).rows) == 2

    def test_resumed_answers_are_read_anew(self, tmp_path):
        benchmark, path = load_mmvp(mmvp(tmp_path / "data")), tmp_path / "answers.jsonl"
        options = {"results": path, "batch_size": 3}
        with pytest.raises(KeyboardInterrupt):
            evaluate_choices(benchmark, Says(lambda *_: "open", dies_after=6), **options)
        second = Says(lambda *_: "open")
        evaluation = evaluate_choices(benchmark, second, **options)
        assert len(second.asked) == 2
        assert evaluation.accuracy == 50
        other = evaluate_choices(benchmark, second, reader=lambda *_: None, **options)
        assert (other.accuracy, other.fresh) == (0, 0)
        assert len(read_lines(path)) == 2 + 8


class TestMiniature:
    def test_both_pictures_share_a_question_with_opposite_answers(self):
        benchmark = shapes_mmvp(4)
        assert len(benchmark.items) == 6 * 4 * 2
        for one, two in zip(benchmark.items[::2], benchmark.items[1::2], strict=True):
            assert (one.text, one.group, one.labels) == (two.text, two.group, two.labels)
            assert {one.answer, two.answer} == {0, 1}
            assert one.pictures[0].open().tobytes() != two.pictures[0].open().tobytes()
        first = [item.answer for item in benchmark.items[::2]]
        assert 0 < sum(first) < len(first)

    def test_by_pattern(self):
        benchmark = shapes_mmvp(3)
        answers = {item.pictures[0].open().tobytes(): item for item in benchmark.items}

        def says(images, question, prompt):
            item = answers[images[0].tobytes()]
            return item.options[item.answer if item.labels["pattern"] != "size" else 0]

        evaluation = evaluate_choices(benchmark, Says(says))
        assert evaluation.by_label("pattern") == {
            **dict.fromkeys(("color", "count", "position", "relation", "shape"), 100.0),
            "size": 0.0,
        }
        assert evaluation.overall == pytest.approx(100 * 5 / 6)

    def test_it_depends_on_its_seed_alone(self):
        one, two = shapes_mmvp(2), shapes_mmvp(2, seed=5)
        assert [item.text for item in one.items] == [item.text for item in shapes_mmvp(2).items]
        assert [item.text for item in one.items] != [item.text for item in two.items]
        with pytest.raises(ConfigError, match="per_pattern"):
            shapes_mmvp(0)
