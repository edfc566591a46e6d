import shutil

import pytest

from diffenc.errors import ConfigError
from diffenc.evals import evaluate, load_mmvp_vlm
from diffenc.evals.matching.mmvp_vlm import PATTERNS
from evals_data import ColorMatcher, change_questions, encoded, mmvp_vlm, picture


def check(benchmark):
    assert benchmark.problems == ()
    assert [item.id for item in benchmark.items][:2] == ["1-2", "3-4"]
    assert [item.labels["pattern"] for item in benchmark.items] == [(name,) for name in PATTERNS]
    for index, item in enumerate(benchmark.items):
        kind = list(PATTERNS)[index].lower()
        first = 2 * index + 1
        assert item.captions == (f'{kind}, "number" {first}', f'{kind}, "number" {first + 1}')
        assert [picture.open().getpixel((0, 0))[1] > 100 for picture in item.pictures] == [
            False,
            True,
        ]


def underscored(kind):
    return kind.replace(" ", "_")


@pytest.mark.parametrize(
    ("images", "rename"),
    [
        ("MLLM_VLM Images", str),
        ("MMVP_VLM_Images", underscored),
        ("MLLM_VLM Images", str.lower),
        (".", str),
    ],
)
def test_folders_of_the_hub_and_of_the_code(tmp_path, images, rename):
    check(load_mmvp_vlm(mmvp_vlm(tmp_path, images=images, rename=rename)))


def test_in_a_folder_and_in_an_archive(tmp_path):
    mmvp_vlm(tmp_path / "MMVP_VLM")
    check(load_mmvp_vlm(tmp_path))
    check(load_mmvp_vlm(shutil.make_archive(tmp_path / "all", "zip", tmp_path, "MMVP_VLM")))


def test_pairs_are_made_by_number_in_any_order_of_rows(tmp_path):
    mmvp_vlm(tmp_path)
    change_questions(tmp_path, lambda rows: [rows[0], *reversed(rows[1:])])
    check(load_mmvp_vlm(tmp_path))


def test_the_misspelled_index_and_png_files_are_read(tmp_path):
    mmvp_vlm(tmp_path)
    change_questions(tmp_path, lambda rows: [["lndex", "type", "statement"], *rows[1:]])
    path = tmp_path / "MLLM_VLM Images/Orientation/1.jpg"
    path.unlink()
    path.with_suffix(".png").write_bytes(encoded(picture(1, 0), "png"))
    benchmark = load_mmvp_vlm(tmp_path)
    check(benchmark)
    assert "'lndex' is read as 'Question ID'" in "; ".join(benchmark.notes)


def test_an_unknown_type_is_kept_and_told(tmp_path):
    mmvp_vlm(tmp_path)
    shutil.move(tmp_path / "MLLM_VLM Images/Text", tmp_path / "MLLM_VLM Images/Letters")
    change_questions(
        tmp_path, lambda rows: [[c.replace("Text", "Letters") for c in row] for row in rows]
    )
    benchmark = load_mmvp_vlm(tmp_path)
    assert benchmark.problems == ()
    assert "types that the benchmark does not have: ['Letters']" in benchmark.notes


def test_problems_are_collected(tmp_path):
    mmvp_vlm(tmp_path)
    (tmp_path / "MLLM_VLM Images/Presence/3.jpg").unlink()

    def edit(rows):
        rows[1][0] = "one"  # question 1 is gone, its pair incomplete
        rows[5][1] = "Quantity"  # question 5 of State
        rows[8][2] = ""  # question 8
        return [*rows, rows[18]]

    change_questions(tmp_path, edit)
    benchmark = load_mmvp_vlm(tmp_path)
    found = {(problem.kind, problem.where) for problem in benchmark.problems}
    assert found == {
        ("ids that are no number", "Questions.csv, line 2"),
        ("incomplete pairs", "pair 1-2"),
        ("missing pictures", "pair 3-4"),
        ("pairs of two types", "pair 5-6"),
        ("missing captions", "pair 7-8"),
        ("ids that occur twice", "question 18"),
    }
    assert [item.id for item in benchmark.items] == ["9-10", "11-12", "13-14", "15-16", "17-18"]


def test_what_is_no_mmvp_vlm_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no Questions\.csv, which has the statements"):
        load_mmvp_vlm(tmp_path)
    (tmp_path / "Questions.csv").write_text("Question ID,Type\n1,Color\n")
    with pytest.raises(ConfigError, match="no column 'Statement'; its columns are"):
        load_mmvp_vlm(tmp_path)
    with pytest.raises(ConfigError, match="hf download MMVP/MMVP_VLM"):
        load_mmvp_vlm(tmp_path / "nowhere")


def test_statements_are_scored_as_in_the_released_evaluation(tmp_path):
    benchmark = load_mmvp_vlm(mmvp_vlm(tmp_path))
    assert benchmark.texts(benchmark.items[0])[0] == 'a photo of orientation, "number" 1'
    results = evaluate(benchmark, [ColorMatcher("color")]).results("color")
    assert {metric: result.mean for metric, result in results.items()} == {
        "text": 100,
        "image": 100,
        "group": 100,
    }
