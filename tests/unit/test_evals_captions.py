import json
import math
import shutil
import sys
from types import ModuleType

import pytest

from answers_data import (
    COCO,
    Says,
    check_all_is_told_before_anything_is_asked,
    coco,
    karpathy,
    shade,
    write_picture,
)
from diffenc.errors import ConfigError, MissingExtraError, ShapeError
from diffenc.evals.answerers import FunctionAnswerer
from diffenc.evals.captioning import (
    CaptionItem,
    CaptionSet,
    evaluate_captions,
    load_coco_captions,
    load_karpathy,
    score_captions,
    shapes_captions,
)
from diffenc.evals.captioning.evaluate import QUESTION, caption_table
from diffenc.evals.captioning.metrics import METRICS, require_metrics
from diffenc.evals.captioning.tokens import tokenize
from diffenc.evals.choices.blink import TASKS
from diffenc.evals.items import Picture
from diffenc.evals.paper import published_table, published_tables
from evals_data import read_lines


def three(**changes):
    items = tuple(
        CaptionItem(str(k), Picture(f"picture {k}", shade(k)), (f"reference {k}",))
        for k in range(3)
    )
    return CaptionSet(name="three", source="memory", items=items, **changes)


def number_of(images):
    return images[0].getpixel((0, 0))[0]


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def coco_scorers():
    pytest.importorskip("pycocoevalcap.bleu.bleu")


class TestLayouts:
    def test_annotations_of_coco(self, tmp_path):
        data = load_coco_captions(*coco(tmp_path))
        assert data.problems == ()
        found = {item.id: list(item.references) for item in data.items}
        assert found == {str(k): texts for k, texts in COCO.items()}
        for item in data.items:
            assert item.picture.open().getpixel((0, 0))[0] == pytest.approx(
                int(item.id) % 250, abs=3
            )
        assert data.published

    @pytest.mark.parametrize("ids", [[391895, 42], ["391895", "42"]])
    def test_any_image_ids_as_numbers_or_text(self, tmp_path, ids):
        data = load_coco_captions(*coco(tmp_path), image_ids=ids)
        assert [item.id for item in data.items] == ["42", "391895"]
        assert not data.published
        assert "CIDEr depends on which ones" in data.notes[0]

    def test_karpathy_parts_with_pictures_of_two_folders(self, tmp_path):
        path, images = karpathy(tmp_path)
        write_picture(tmp_path / "a_copy/COCO_train2014_000000000007.jpg", 200)
        data = load_karpathy(path, images)
        assert data.items[1].picture.name == "train2014/COCO_train2014_000000000007.jpg"
        assert [item.id for item in data.items] == ["42", "7"]
        assert data.items[1].references == tuple(COCO[7])
        assert "2 images where Karpathy's test has 5000" in data.notes
        assert [i.id for i in load_karpathy(path, images, split="restval").items] == ["391895"]
        with pytest.raises(ConfigError, match=r"no split 'dev'; it has \['restval', 'test'\]"):
            load_karpathy(path, images, split="dev")

    def test_pictures_in_an_archive(self, tmp_path):
        path, _ = coco(tmp_path / "data")
        archive = shutil.make_archive(tmp_path / "val2014", "zip", tmp_path / "data/val2014")
        assert len(load_coco_captions(path, archive).items) == 3

    def test_what_is_broken_is_told_together_before_anything_is_asked(self, tmp_path):
        path, images = coco(tmp_path)
        (tmp_path / "val2014/COCO_val2014_000000000042.jpg").unlink()
        (tmp_path / "val2014/COCO_val2014_000000000007.jpg").write_bytes(b"no picture")
        content = json.loads(path.read_text())
        content["annotations"].append({"image_id": 5})
        content["annotations"].append({"image_id": 77, "caption": "of nothing"})
        path.write_text(json.dumps(content))
        data = load_coco_captions(path, images)
        check_all_is_told_before_anything_is_asked(
            lambda model: evaluate_captions(data, model, metrics=()),
            "has 4 problems",
            "1 broken annotations (annotation 5)",
            "1 captions of unknown images (image 77)",
            "1 missing pictures (image 42",
            "1 unreadable pictures (val2014/COCO_val2014_000000000007.jpg: it is no picture",
        )
        found = evaluate_captions(data, Says(lambda *_: "a"), metrics=(), skip_broken=True)
        assert [item.id for item in found.items] == ["391895"]
        assert "4 problems, left out" in found.notes[0]

    def test_ids_that_are_not_there(self, tmp_path):
        path, images = coco(tmp_path)
        with pytest.raises(ConfigError, match=r"2 of 3 image ids are not in .*: 1, 2; its ids"):
            load_coco_captions(path, images, image_ids=[1, 2, 42])
        with pytest.raises(ConfigError, match="holds 42 twice"):
            load_coco_captions(path, images, image_ids=[42, "42"])
        with pytest.raises(ConfigError, match="is empty"):
            load_coco_captions(path, images).select([])

    @pytest.mark.parametrize("content", ["", "[]", '{"images": 1}', '{"images": []}'])
    def test_files_of_another_form(self, tmp_path, content):
        path = tmp_path / "file.json"
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"is no JSON|must hold the lists"):
            load_coco_captions(path, tmp_path)
        with pytest.raises(ConfigError, match="there is no file"):
            load_karpathy(tmp_path / "other.json", tmp_path)

    def test_images_without_captions(self, tmp_path):
        path, images = coco(tmp_path)
        content = json.loads(path.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 42]
        path.write_text(json.dumps(content))
        data = load_coco_captions(path, images)
        assert len(data.items) == 2
        assert "1 images have no captions and are left out" in data.notes
        assert load_coco_captions(path, images, image_ids=[42]).problems[0].where == "image 42"


class TestWords:
    def test_simple_words(self):
        found = tokenize({"a": ["A man's\nT-shirt, RED -- 'very' (2) café!"]}, "simple")
        assert found == {"a": ["a man's t-shirt red very 2 café"]}

    def test_the_published_tokenizer_needs_java(self, without_java):
        with pytest.raises(ConfigError, match=r"'ptb' runs in Java.*or pass tokenizer='simple'"):
            tokenize({"a": ["b"]}, "ptb")

    def test_both_agree_on_plain_captions(self, coco_scorers):
        if shutil.which("java") is None:
            pytest.skip("no Java")
        data = shapes_captions(4)
        captions = {item.id: [*item.references, "Odd\u2028line, twice."] for item in data.items}
        assert tokenize(captions, "ptb") == tokenize(captions, "simple")


class TestMetrics:
    """Against numbers worked out by hand from the papers' definitions."""

    def score(self, references, captions, **options):
        return score_captions(references, captions, tokenizer="simple", **options)

    def test_bleu_of_four_of_five_words(self, coco_scorers):
        found = self.score({"x": ["a b c d f"]}, {"x": "A b c d, e."}, metrics=["bleu-4"])
        by_hand = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
        assert found.values["bleu-4"] == pytest.approx(100 * by_hand, rel=1e-6)

    def test_bleu_counts_over_all_images_and_punishes_brevity(self, coco_scorers):
        references = {"x": ["a b c d e f g h"], "y": ["p q r s"]}
        found = self.score(references, {"x": "a b c d", "y": "p q r s"}, metrics=["bleu-4"])
        assert found.values["bleu-4"] == pytest.approx(100 * math.exp(1 - 12 / 8), rel=1e-6)

    def test_rouge_takes_the_best_precision_and_the_best_recall(self, coco_scorers):
        references = {"x": ["a c d e", "a b"]}
        found = self.score(references, {"x": "a b c d"}, metrics=["rouge-l"])
        precision, recall, beta = 3 / 4, 1.0, 1.2
        by_hand = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
        assert found.values["rouge-l"] == pytest.approx(100 * by_hand)

    def test_cider_of_equal_captions_is_ten(self, coco_scorers):
        texts = {"x": "one two three four", "y": "five six seven eight"}
        references = {key: [text] for key, text in texts.items()}
        assert self.score(references, texts, metrics=["cider"]).values["cider"] == (
            pytest.approx(1000)
        )
        swapped = {"x": texts["y"], "y": texts["x"]}
        assert self.score(references, swapped, metrics=["cider"]).values["cider"] == 0

    def test_values_per_image_are_those_of_their_image(self, coco_scorers):
        references = {"10": ["a b"], "9": ["c d"], "2": ["e f"]}
        captions = {"2": "", "9": "c d", "10": "x"}
        found = self.score(references, captions, metrics=["rouge-l"])
        assert found.images["rouge-l"] == {"10": 0, "9": 100, "2": 0}
        assert found.values["rouge-l"] == pytest.approx(100 / 3)
        assert found.empty == 1

    def test_cider_of_one_image_is_refused(self, coco_scorers):
        with pytest.raises(ConfigError, match="a single image always gets 0"):
            self.score({"x": ["a"]}, {"x": "a"})

    @pytest.mark.parametrize(
        ("references", "captions", "told"),
        [
            ({"x": ["a"], "y": ["b"]}, {"x": "a", "z": "b"}, "2 images have either .*'y', 'z'"),
            ({"x": []}, {"x": "a"}, "1 images have no list of references"),
            ({"x": "a"}, {"x": "a"}, "1 images have no list of references"),
            ({}, {}, "no image to score"),
        ],
    )
    def test_captions_of_other_images(self, references, captions, told):
        with pytest.raises(ConfigError, match=told):
            self.score(references, captions, metrics=())

    @pytest.mark.wrong_type
    def test_unknown_metrics_are_refused_with_the_known_ones(self):
        with pytest.raises(ConfigError, match=r"metrics must be one of .*'meteor'"):
            require_metrics(["meteor"], "simple")

    def test_metrics_are_refused_before_work_starts(self, monkeypatch, without_java):
        with pytest.raises(ConfigError, match="once each"):
            require_metrics(["cider", "cider"], "simple")
        monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
        model = Says(lambda *_: "a")
        with pytest.raises(MissingExtraError, match=r"diffenc\[caption\]"):
            evaluate_captions(three(), model, metrics=["cider"], tokenizer="simple")
        assert model.asked == []

    def spice(self, monkeypatch, folder, run):
        module = ModuleType("spice")
        module.__file__, module.Spice = str(folder / "spice.py"), lambda: run
        monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", module)
        (folder / "lib").mkdir()

    def test_nothing_is_downloaded_for_spice(self, monkeypatch, tmp_path):
        self.spice(monkeypatch, tmp_path, None)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
        with pytest.raises(ConfigError, match="get_stanford_models"):
            require_metrics(["spice"], "simple")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(ConfigError, match="SPICE runs in Java"):
            require_metrics(["spice"], "simple")

    def test_spice_is_given_to_its_images(self, monkeypatch, tmp_path):
        class Spice:
            def compute_score(self, references, said):
                keys = sorted(references)
                rows = [1.0 if said[key][0] in references[key] else 0.0 for key in keys]
                rows[-1] = math.nan
                return math.nan, [{"All": {"f": row}} for row in rows]

        self.spice(monkeypatch, tmp_path, Spice())
        (tmp_path / "lib/stanford-corenlp-3.6.0.jar").touch()
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/java")
        references = {"10": ["a"], "9": ["b"], "3": ["c"]}
        captions = {"10": "x", "9": "b", "3": "c"}
        found = self.score(references, captions, metrics=["spice"])
        assert found.images["spice"] == {"10": 0, "9": 100, "3": 0}
        assert found.values["spice"] == pytest.approx(100 / 3)


class TestRefinement:
    def test_each_caption_is_the_next_prompt(self):
        model = Says(lambda images, question, prompt: f" {prompt or ''}{number_of(images)} ")
        found = evaluate_captions(three(), model, passes=3, metrics=())
        assert [p.captions for p in found.passes] == [
            {"0": "0", "1": "1", "2": "2"},
            {"0": "00", "1": "11", "2": "22"},
            {"0": "000", "1": "111", "2": "222"},
        ]
        assert [prompt for _, _, prompt in model.asked[:4]] == [None, None, None, "0"]
        assert {question for _, question, _ in model.asked} == {QUESTION}
        assert found.fresh == 9

    def test_prompts_of_the_first_pass(self):
        model = Says(lambda images, question, prompt: prompt)
        oracle = evaluate_captions(three(), model, prompts=lambda i: i.references[0], metrics=())
        assert oracle.passes[0].captions["2"] == "reference 2"
        given = {"0": "", "1": "b", "2": "c"}
        assert (
            evaluate_captions(three(), model, prompts=given, metrics=()).passes[0].prompts == given
        )
        with pytest.raises(ConfigError, match="1 of 3 images have no prompt: 2"):
            evaluate_captions(three(), model, prompts={"0": "", "1": ""}, metrics=())

    def test_metrics_per_pass(self, coco_scorers):
        model = Says(lambda images, q, prompt: f"reference {number_of(images)}" if prompt else "x")
        options = {"passes": 2, "metrics": ["rouge-l"], "tokenizer": "simple"}
        found = evaluate_captions(three(), model, **options)
        assert [p.scores.values["rouge-l"] for p in found.passes] == [0, 100]
        table = caption_table([found])
        assert table.rows == (("model, pass 1", "0.00"), ("model, pass 2", "100.00"))
        beside = caption_table([found], paper=True).rows
        assert ("paper: FT-LLaVA (CLIP)", "52.28") in beside
        json.dumps(found.to_dict(), allow_nan=False)

    @pytest.mark.parametrize("batch_size", [1, 2, 7])
    def test_batches_change_nothing(self, batch_size):
        model = Says(lambda images, question, prompt: f"{number_of(images)}")
        found = evaluate_captions(three(), model, metrics=(), batch_size=batch_size)
        assert found.passes[0].captions == {"0": "0", "1": "1", "2": "2"}

    @pytest.mark.parametrize(
        "wrong", [["a"], "abc", pytest.param(["a", "b", None], marks=pytest.mark.wrong_type)]
    )
    def test_models_that_do_not_answer_each_question(self, wrong):
        model = FunctionAnswerer("bad", lambda images, questions: wrong)
        with pytest.raises(ShapeError, match=r"one answer per question, 3|answer in text"):
            evaluate_captions(three(), model, metrics=())


class TestResume:
    def run(self, path, model, data=None, **options):
        options = {"passes": 2, "metrics": (), "batch_size": 1, **options}
        return evaluate_captions(data or three(), model, results=path, **options)

    def says(self, images, question, prompt):
        return f"{prompt}/{number_of(images)}"

    def test_nothing_is_asked_twice_after_a_kill(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        whole = self.run(tmp_path / "whole.jsonl", Says(self.says))
        with pytest.raises(KeyboardInterrupt):
            self.run(path, Says(self.says, dies_after=4))
        path.write_bytes(path.read_bytes() + b'{"type": "answer", "model": "mo')
        second = Says(self.says)
        found = self.run(path, second)
        assert len(second.asked) == found.fresh == 2
        assert found == whole
        third = Says(self.says)
        assert self.run(path, third) == whole
        assert third.asked == []
        lines = read_lines(path)
        assert [line["type"] for line in lines] == ["answers", "model", *["answer"] * 6]
        assert lines[5]["prompt"] == "None/0"

    def test_answers_to_something_else_are_never_taken(self, tmp_path):
        path = tmp_path / "answers.jsonl"
        self.run(path, Says(self.says))
        with pytest.raises(
            ConfigError, match="the question, prompt or pictures of item '0' differ"
        ):
            self.run(path, Says(self.says), question="What?")
        with pytest.raises(ConfigError, match="prompt or pictures of item '0' differ"):
            self.run(path, Says(self.says), prompts=lambda item: "a prompt")
        with pytest.raises(ConfigError, match="another configuration: layers is 3, was null"):
            self.run(path, Says(self.says, layers=3))
        items = (CaptionItem("0", Picture("picture 0", shade(9)), ("r",)),)
        with pytest.raises(ConfigError, match="made from other data"):
            self.run(path, Says(self.says), CaptionSet(name="three", source="memory", items=items))
        with pytest.raises(ConfigError, match=r"task is .*captions of four"):
            self.run(path, Says(self.says), CaptionSet(name="four", source="memory", items=items))

    def test_other_files_are_left_alone(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("my notes")
        with pytest.raises(ConfigError, match="is no file of answers of diffenc"):
            self.run(path, Says(self.says))
        assert path.read_text() == "my notes"
        self.run(path := tmp_path / "answers.jsonl", Says(self.says))
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
        with pytest.raises(ConfigError, match=r"line 4 of .* is broken"):
            self.run(path, Says(self.says))


class TestMiniature:
    def test_references_are_true_of_their_scene_and_differ(self):
        data = shapes_captions(12, references=3)
        assert data.items == shapes_captions(20, references=3).items[:12]
        for item in data.items:
            assert 1 <= len(item.references) == len(set(item.references)) <= 3
        assert any(len(item.references) == 3 for item in data.items)
        assert not data.published

    @pytest.mark.parametrize("options", [{"count": 0}, {"references": 0}, {"seed": -1}])
    def test_numbers_that_are_none(self, options):
        with pytest.raises(ConfigError):
            shapes_captions(**options)


class TestPaper:
    def test_every_row_has_every_column(self):
        for name in published_tables():
            table = published_table(name)
            for row in table.rows:
                assert len(row.labels) == len(table.labels)
                assert len(row.values) == len(table.columns)
                assert set(row.doubtful) <= set(table.columns)
            assert len(table.to_table().rows) == len(table.rows)

    def test_cells_of_blink_are_shares_of_its_questions_but_for_the_doubtful(self):
        table = published_table("blink")
        assert table.columns == tuple(TASKS)
        for row in table.rows:
            for task, value in zip(table.columns, row.values, strict=True):
                right = round(value * TASKS[task] / 100)
                share = 100 * right / TASKS[task]
                assert (abs(share - value) < 0.0051) != (task in row.doubtful), (row.labels, task)

    def test_means_of_blink_are_those_of_the_other_table(self):
        means = [sum(row.values) / 14 for row in published_table("blink").rows]
        vqa = [row.values[5] for row in published_table("vqa").rows if row.values[5] is not None]
        assert means == pytest.approx(vqa, abs=0.015)

    def test_pairs_of_mmvp_are_shares_of_150(self):
        for row in published_table("vqa").rows:
            right = row.values[4] * 1.5
            assert abs(right - round(right)) < 0.1

    def test_guidance_repeats_rows_of_captions(self):
        captions = {row.values for row in published_table("captions").rows}
        assert {row.values for row in published_table("guidance").rows[:2]} <= captions
        with pytest.raises(ConfigError, match="no table 'nine'; known are"):
            published_table("nine")

    def test_titles_are_those_of_the_tables(self):
        assert METRICS == ("rouge-l", "cider", "bleu-4", "spice")
        assert published_table("leakage").columns == ("ROUGE-L", "CIDEr", "BLEU-4", "SPICE")
