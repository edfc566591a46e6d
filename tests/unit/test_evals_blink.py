import json

import pytest

from answers_data import (
    BLINK_SOME,
    Says,
    blink_rows,
    check_all_is_told_before_anything_is_asked,
    encoded_cell,
    write_blink,
)
from diffenc.errors import ConfigError
from diffenc.evals.choices import (
    blink_from_rows,
    choice_table,
    evaluate_choices,
    load_blink,
    shapes_blink,
)
from diffenc.evals.choices.base import LETTER_INSTRUCTION
from diffenc.evals.choices.blink import TASKS

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


class TestLayouts:
    def test_all_tasks_with_one_to_three_pictures(self, tmp_path):
        benchmark = load_blink(write_blink(tmp_path))
        assert benchmark.problems == ()
        assert list(dict.fromkeys(item.group for item in benchmark.items)) == list(TASKS)
        counts = {item.group: len(item.pictures) for item in benchmark.items}
        assert [counts[task] for task in BLINK_SOME] == [1, 2, 3]
        item = next(item for item in benchmark.items if item.id == "val_Multi-view_Reasoning_3")
        tones = [picture.open().getpixel((0, 0))[0] for picture in item.pictures]
        assert tones == [41, 42, 43]
        assert item.text == (
            f"Which one, exactly?\n(A) the first\n(B) the second\n{LETTER_INSTRUCTION}"
        )
        assert (
            "results are not those of the benchmark, Visual_Similarity: 3 of 135"
            in (benchmark.notes[0])
        )

    def test_rows_in_memory_with_and_without_prompts(self):
        rows = {task: blink_rows(task) for task in BLINK_SOME}
        benchmark = blink_from_rows(rows, instruction="")
        assert [len(item.pictures) for item in benchmark.items[::3]] == [1, 2, 3]
        assert benchmark.items[0].text == "Which one, exactly?\n(A) 3\n(B) 4"
        for row in rows["Counting"]:
            del row["prompt"]
        assert blink_from_rows(rows, instruction="").items[0].text == (
            "Which one? (Counting)\nSelect from the following choices.\n(A) 3\n(B) 4\n(C) 5\n(D) 6"
        )

    def test_some_tasks(self, tmp_path):
        benchmark = load_blink(write_blink(tmp_path), tasks=["jigsaw", "Counting"])
        assert [item.group for item in benchmark.items[::3]] == ["Counting", "Jigsaw"]
        assert "12 of 14 tasks are left out of the mean" in benchmark.notes
        for wrong in (["Chess"], [], ["Jigsaw", "jigsaw"]):
            with pytest.raises(ConfigError, match=r"unknown tasks|one or more, each once"):
                load_blink(tmp_path, tasks=wrong)

    def test_hidden_answers(self, tmp_path):
        write_blink(tmp_path, split="test", answer="hidden")
        with pytest.raises(ConfigError, match="answers are hidden"):
            load_blink(tmp_path, split="test")
        with pytest.raises(ConfigError, match=r"no <Task>/val-\*\.parquet"):
            load_blink(tmp_path)

    def test_problems_are_told_together_before_anything_is_asked(self, tmp_path):
        write_blink(tmp_path, [task for task in TASKS if task != "IQ_Test"])
        rows = blink_rows("Jigsaw", 5, picture=encoded_cell)
        rows[0]["image_1"] = rows[0]["image_2"] = None
        rows[1]["answer"] = "(C)"
        rows[2]["choices"] = ["one"]
        rows[3]["image_2"] = {"bytes": b"no picture", "path": None}
        rows[4]["idx"] = rows[3]["idx"]
        path = tmp_path / "Jigsaw/val-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        check_all_is_told_before_anything_is_asked(
            lambda model: evaluate_choices(load_blink(tmp_path), model),
            "1 missing tasks (IQ_Test)",
            "1 missing pictures (val_Jigsaw_1)",
            "1 answers that are no option (val_Jigsaw_2: (C))",
            "1 questions without options (val_Jigsaw_3)",
            "1 ids that occur twice (val_Jigsaw_4",
            "1 unreadable pictures (val_Jigsaw_4, image_2: it is no picture",
        )

    def test_broken_files_and_renamed_columns(self, tmp_path):
        write_blink(tmp_path, ["Counting"])
        path = tmp_path / "Counting/val-00000-of-00001.parquet"
        table = parquet.read_table(path)
        names = ["options" if name == "choices" else name for name in table.column_names]
        parquet.write_table(table.rename_columns(names), path)
        with pytest.raises(ConfigError, match="no column 'choices'; its columns are"):
            load_blink(tmp_path, tasks=["Counting"])
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(ConfigError, match="download it again"):
            load_blink(tmp_path, tasks=["Counting"])
        with pytest.raises(ConfigError, match="hf download BLINK-Benchmark/BLINK"):
            load_blink(tmp_path / "nowhere")


class TestScore:
    def test_the_mean_is_over_tasks_not_over_questions(self):
        rows = {"Counting": blink_rows("Counting", 8), "Jigsaw": blink_rows("Jigsaw", 2)}
        model = Says(lambda images, question, prompt: "(A)" if len(images) == 1 else "(B) or (A)")
        found = evaluate_choices(blink_from_rows(rows), model)
        means = {name: result.mean for name, result in found.by_group().items()}
        assert means == {"Counting": 50, "Jigsaw": 0}
        assert found.overall == 25
        assert found.accuracy == 40
        assert found.unread == 2
        assert found.chance == 100 * (1 / 4 + 1 / 2) / 2

    def test_all_pictures_of_a_question_come_in_order(self):
        model = Says(lambda images, question, prompt: "A")
        evaluate_choices(
            blink_from_rows({"Multi-view_Reasoning": blink_rows(BLINK_SOME[2])}), model
        )
        tones = [[image.getpixel((0, 0))[0] for image in images] for images, _, _ in model.asked]
        assert tones == [[1, 2, 3], [21, 22, 23], [41, 42, 43]]

    def test_the_table_stands_beside_the_papers(self, tmp_path):
        found = evaluate_choices(load_blink(write_blink(tmp_path)), Says(lambda *_: "A"))
        table = choice_table([found])
        assert table.columns == ("model", *TASKS, "questions", "mean of tasks")
        assert table.rows[0][1:] == ("66.7",) * 16
        paper = {row[0]: row for row in table.rows}
        assert paper["paper: CLIP-LLaVA"][-1] == "36.6"
        assert paper["paper: SDXL, GT-Cap."][2] == "39.17"
        json.dumps(found.to_dict(), allow_nan=False)

    def test_the_papers_mean_stands_beside_all_tasks_alone(self, tmp_path):
        benchmark = load_blink(write_blink(tmp_path), tasks=["Counting", "Jigsaw"])
        table = choice_table([evaluate_choices(benchmark, Says(lambda *_: "A"))])
        assert table.rows[-1][1:] == ("38.33", "4.67", "–", "–")


class TestMiniature:
    def test_tasks_with_one_two_and_three_pictures(self):
        benchmark = shapes_blink(8)
        counts = {item.group: len(item.pictures) for item in benchmark.items}
        assert counts == {
            "Counting": 1,
            "Spatial_Relation": 1,
            "Change": 2,
            "Visual_Similarity": 3,
        }
        assert [item.text for item in benchmark.items] == [i.text for i in shapes_blink(8).items]
        for task in counts:
            answers = {item.answer for item in benchmark.items if item.group == task}
            assert len(answers) > 1
        with pytest.raises(ConfigError, match="per_task"):
            shapes_blink(0)

    def test_who_compares_pixels_sees_every_change(self):
        benchmark = shapes_blink(12)

        def says(images, question, prompt):
            if len(images) != 2:
                return "?"
            return "yes" if images[0].tobytes() == images[1].tobytes() else "no"

        found = evaluate_choices(benchmark, Says(says))
        means = {name: result.mean for name, result in found.by_group().items()}
        assert means == {
            "Counting": 0,
            "Spatial_Relation": 0,
            "Change": 100,
            "Visual_Similarity": 0,
        }

    def test_who_counts_colors_finds_the_same_objects(self):
        """The picture whose colours are those of the first one."""

        def colors(image):
            return {c for n, c in image.quantize(16).convert("RGB").getcolors() if n > 25}

        def says(images, question, prompt):
            if len(images) != 3:
                return "?"
            first, *others = map(colors, images)
            shared = [len(first & each) / len(first | each) for each in others]
            return ["the second picture", "the third picture"][shared[1] > shared[0]]

        found = evaluate_choices(shapes_blink(20), Says(says))
        assert found.by_group()["Visual_Similarity"].mean >= 70
