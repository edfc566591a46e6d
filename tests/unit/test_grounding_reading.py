"""Phrases from every layout, in small folders that are written here."""

import json
import os
import pickle
from pathlib import Path

import pytest

from diffenc.errors import ConfigError
from diffenc.grounding import Area, GroundedText, Phrase, RunLengths, read_phrases
from diffenc.grounding.naming import head_spans, naming_spans
from diffenc.grounding.reading import find_phrases
from phrases_data import LINE, REFS, REGIONS, TABLES, pictures, write


def words(text):
    """Words that a text's phrases name things by."""
    return [[text.text[start:stop] for start, stop in phrase.spans] for phrase in text.phrases]


# COCO


def test_names_of_cocos_categories_name_all_their_instances(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    first, second = read_phrases(write(tmp_path / "i.json", TABLES), images)
    assert (first.key, first.image, first.size) == ("7", images / "a.jpg", (30, 40))
    dogs = (Area((1, 2, 4, 6)), Area((0, 0, 2, 2), runs=RunLengths((30, 40), (1, 2, 1197))))
    light = Area((5, 6, 12, 14), ((5, 6, 12, 6, 12, 14),))
    assert first.texts == (
        GroundedText("dog", (Phrase(((0, 3),), dogs),)),
        GroundedText("traffic light", (Phrase(((0, 7), (8, 13)), (light,)),)),
    )
    assert [text.text for text in second.texts] == ["traffic light"]  # the dog has no extent


def test_letters_of_a_caption_name_boxes_as_in_mdetrs_files(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    caption = "the man in a red shirt holds a ball"
    table = {
        "images": [{"id": 1, "file_name": "a.jpg", "caption": caption}],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4], "tokens_positive": [[0, 7]]},
            {"id": 2, "image_id": 1, "bbox": [1, 1, 2, 2], "tokens_positive": [[13, 22], [0, 7]]},
        ],
        "categories": [],
    }
    (sample,) = read_phrases(write(tmp_path / "m.json", table), images)
    (text,) = sample.texts
    assert text.text == caption
    assert words(text) == [["man"], ["red", "shirt"]]
    assert [len(phrase.areas) for phrase in text.phrases] == [2, 1]


def test_boxes_of_a_caption_without_extent_name_nothing(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    boxes = {1: [[20, 10, 0, 0], [4, 4, 8, 8]], 2: [[20, 10, 0, 5], [3, 4, 2, 0]]}
    table = {
        "images": [{"id": key, "file_name": "a.jpg", "caption": "a man, a dog"} for key in boxes],
        "annotations": [
            {"id": 10 * key + place, "image_id": key, "bbox": box, "tokens_positive": [span]}
            for key, some in boxes.items()
            for place, (box, span) in enumerate(zip(some, ([2, 5], [9, 12]), strict=True))
        ],
        "categories": [],
    }
    path = write(tmp_path / "m.json", table)
    with pytest.raises(ConfigError, match=r"1 of 2 .*broken annotations .*no box has an extent"):
        read_phrases(path, images)
    (sample,) = read_phrases(path, images, skip_broken=True)
    assert words(sample.texts[0]) == [["dog"]]
    assert sample.texts[0].phrases[0].areas == (Area((4, 4, 12, 12)),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), "four numbers"),
        (lambda t: t["annotations"][0].update(bbox="x"), "four numbers.*got 'x'"),
        (lambda t: t["annotations"][0].update(category_id=99), "no category 99"),
        (lambda t: t["annotations"][0].update(category_id=None), "category_id must be"),
        (lambda t: t["annotations"][1].update(segmentation=[[1]]), "three corners"),
        (lambda t: t["images"][0].update(file_name="../a.jpg"), "stay within the folder"),
        (lambda t: t["images"][0].pop("file_name"), "file_name must be"),
        (lambda t: t["images"][0].update(height="x"), "height must be"),
        (lambda t: t["images"][0].update(file_name="gone.jpg"), "with missing images"),
        (lambda t: t["images"][0].update(caption="a"), "tokens_positive must be"),
        (lambda t: t["images"][0].update(id="x"), "id must be"),
        (lambda t: t.update(annotations={}), "annotations must be a list"),
        (lambda t: t.update(categories=[3]), "categories must be a list"),
        (lambda t: t["annotations"][0].update(image_id=None), "image_id must be"),
        (lambda t: t["annotations"][0].update(bbox=[4, 2, -3, 4]), "negative width or height"),
        (lambda t: t["annotations"][1].update(id=1), r"annotations hold 1 ids more than once \(1"),
        (lambda t: t["images"][1].update(id=7), r"images hold 1 ids more than once \(7"),
        (lambda t: t["categories"][1].update(id=1), "categories hold 1 ids more than once"),
    ],
)
def test_what_is_wrong_in_cocos_layout_is_told(tmp_path, change, message):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    table = json.loads(json.dumps(TABLES))
    change(table)
    path = write(tmp_path / "i.json", table)
    with pytest.raises(ConfigError, match=message):
        read_phrases(path, images)


def test_records_that_cannot_be_used_may_be_left_out(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    path = write(tmp_path / "i.json", TABLES)
    with pytest.raises(ConfigError, match=r"1 of 2 records cannot be used: 1 with missing images"):
        read_phrases(path, images)
    assert [each.key for each in read_phrases(path, images, skip_broken=True)] == ["7"]
    samples, faults = find_phrases(path, images, left_out=[0])
    assert [each.key for each in samples] == ["8"]  # not looked at again
    assert [each.place for each in faults] == [0]
    assert len(read_phrases(path, images, limit=1)) == 1


# RefCOCO


def refcoco(folder, name, content):
    write(folder / "instances.json", TABLES)
    return write(folder / name, content)


def is_the_dog(samples, images):
    (sample,) = samples
    assert (sample.key, sample.image, sample.size) == ("4", images / "a.jpg", (30, 40))
    assert [text.text for text in sample.texts] == ["left dog", "dog on the mat"]
    assert [words(text) for text in sample.texts] == [[["left", "dog"]], [["dog"]]]
    assert sample.texts[0].phrases[0].areas == (Area((1, 2, 4, 6)),)
    return True


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_expressions_are_read_out_of_the_published_pickle(tmp_path, protocol):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    folder = tmp_path / "refcoco"
    path = refcoco(folder, "refs(unc).p", b"")
    path.write_bytes(pickle.dumps(REFS, protocol=protocol))
    assert is_the_dog(read_phrases(folder, images), images)
    assert is_the_dog(read_phrases(path, images), images)
    (light,) = read_phrases(path, images, split="val")
    assert light.texts[0].phrases[0].areas[0].polygons
    with pytest.raises(ConfigError, match=r"no split 'test'; it has \['train', 'val'\]"):
        read_phrases(path, images, split="test")


def test_a_pickle_of_python_two_is_read(tmp_path):
    """Its texts are bytes there: opcode U, which protocol 2 of today does not write."""
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    text = pickle.dumps(REFS[:1], protocol=2)
    as_bytes = b"".join(
        part if index == 0 else b"U" + part[:1] + part[4:]
        for index, part in enumerate(text.split(b"X"))
    )
    assert b"X" not in as_bytes
    assert b"U\x08left dog" in as_bytes
    path = refcoco(tmp_path / "refcoco", "refs(unc).p", as_bytes)
    assert is_the_dog(read_phrases(path, images), images)


class Runs:
    """What a pickle may do to whoever opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_call_something_is_not_opened(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    made = tmp_path / "made"
    for harm in (Runs(made), Path("x"), {1, 2}.__class__, print):
        content = pickle.dumps([{**REFS[0], "sentences": harm}], protocol=2)
        path = refcoco(tmp_path / "refcoco", "refs(unc).p", content)
        with pytest.raises(ConfigError, match=r"is not opened: it asks for .*as \.json"):
            read_phrases(path, images)
    assert not made.exists()
    for content in (b"", b"x", pickle.dumps(REFS)[:-20], b"\x80\x02P1\n."):
        path = refcoco(tmp_path / "refcoco", "refs(unc).p", content)
        with pytest.raises(ConfigError, match=r"refs\(unc\)\.p (is no pickle|is not opened)"):
            read_phrases(path, images)
    path = refcoco(tmp_path / "refcoco", "refs(unc).p", pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match="must hold a list"):
        read_phrases(path, images)


def test_expressions_are_read_as_json_too(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    path = refcoco(tmp_path / "refcoco", "refs(unc).json", REFS)
    assert is_the_dog(read_phrases(path, images), images)
    assert is_the_dog(read_phrases(path.parent, images), images)
    write(path.parent / "refs(google).json", REFS)
    with pytest.raises(ConfigError, match="holds 2 files of expressions: name one, such as"):
        read_phrases(path.parent, images)
    (path.parent / "instances.json").unlink()
    with pytest.raises(ConfigError, match=r"needs instances\.json beside it"):
        read_phrases(path, images)
    with pytest.raises(ConfigError, match="no file of expressions"):
        read_phrases(images, images)


def test_expressions_are_read_out_of_the_hubs_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    rows = [
        {
            "split": ref["split"],
            "sentences": [{"sent": each["sent"]} for each in ref["sentences"]],
            "raw_anns": json.dumps(
                {**TABLES["annotations"][ref["ann_id"] - 1], "id": ref["ref_id"]}
            ),
            "raw_image_info": json.dumps(TABLES["images"][0]),
        }
        for ref in REFS
    ]
    path = tmp_path / "train.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert is_the_dog(read_phrases(path, images), images)
    with pytest.raises(ConfigError, match="no split 'testA'"):
        read_phrases(path, images, split="testA")
    other = json.dumps({**TABLES["images"][0], "id": 8})
    rows[0]["raw_image_info"] = other
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    with pytest.raises(ConfigError, match="raw_anns is of image 7, and its expression of image 8"):
        read_phrases(path, images)
    parquet.write_table(arrow.Table.from_pylist([{"x": 1}]), path)
    with pytest.raises(ConfigError, match=r"no column \['sentences', 'raw_anns'"):
        read_phrases(path, images)
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot read"):
        read_phrases(path, images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 99}, "no annotation 99"),
        ({"ann_id": "x"}, "ann_id must be"),
        ({"sentences": []}, "there is no sentence"),
        ({"sentences": [{"sent": 4}]}, "sent must be"),
        ({"sentences": "x"}, "sentences must be"),
        ({"ann_id": 4, "image_id": 8}, "has no extent"),
        ({"ann_id": 5}, "annotation 5 of instances.json is of image 8, and its expression of .* 7"),
        ({"sentences": [{"sent": "..."}]}, "there is no sentence"),
    ],
)
def test_what_is_wrong_in_an_expression_is_told(tmp_path, change, message):
    images = pictures(tmp_path / "images", "a.jpg", "b.jpg")
    path = refcoco(tmp_path / "refcoco", "refs(unc).json", [{**REFS[0], **change}])
    with pytest.raises(ConfigError, match=message):
        read_phrases(path, images)


# Visual Genome


def test_regions_of_visual_genome_are_read_and_found_in_either_folder(tmp_path):
    images = pictures(tmp_path / "images", "VG_100K/1.jpg", "VG_100K_2/3.jpg")
    first, third = read_phrases(write(tmp_path / "region_descriptions.json", REGIONS), images)
    assert first.image == images / "VG_100K" / "1.jpg"
    assert third.image == images / "VG_100K_2" / "3.jpg"
    assert [text.text for text in first.texts] == ["a man wearing a hat", "trees along the road"]
    assert [words(text) for text in first.texts] == [[["man"]], [["trees"]]]
    assert first.texts[1].phrases[0].areas == (Area((-1, 0, 8, 9)),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": 1, "regions": [{"phrase": 3}]}, "phrase must be"),
        ({"id": 1, "regions": [{"phrase": "a", "x": 1}]}, "finite number"),
        ({"id": None, "regions": []}, "id must be"),
        ({"id": 1, "regions": 4}, "regions must be"),
        (4, "a record must be"),
    ],
)
def test_what_is_wrong_in_a_region_is_told(tmp_path, record, message):
    images = pictures(tmp_path / "images", "1.jpg")
    path = write(tmp_path / "r.json", [{"id": 1, "regions": []}, record])
    with pytest.raises(ConfigError, match=message):
        read_phrases(path, images)


# Our own


def test_lines_of_our_own_are_read(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    named = {**LINE, "id": "x", "size": [30, 40]}
    path = write(tmp_path / "p.jsonl", f"{json.dumps(LINE)}\n\n{json.dumps(named)}\n")
    first, second = read_phrases(path, images)
    assert (first.key, second.key, first.size, second.size) == ("1", "x", None, (30, 40))
    assert words(first.texts[0]) == [["car", "car"], ["tree"], ["red", "car"]]
    tree = first.texts[0].phrases[1].areas
    assert tree == (Area((5, 5, 9, 12), ((5, 5, 9, 5, 9, 12),)),)
    assert len(first.texts[0].phrases[2].areas) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "that are no JSON"),
        ({**LINE, "imag": 1}, "unknown key imag.*Did you mean 'image'"),
        ({"image": "a.jpg", "text": "x"}, "a key is missing: phrases"),
        ({**LINE, "phrases": [{"words": "bus", "boxes": [[0, 0, 1, 1]]}]}, "'bus' does not stand"),
        ({**LINE, "phrases": [{"words": "car"}]}, "names no boxes"),
        ({**LINE, "phrases": [{"boxes": [[0, 0, 1, 1]]}]}, "either words"),
        ({**LINE, "phrases": [{"span": [3, 99], "boxes": [[0, 0, 1, 1]]}]}, "no part of"),
        ({**LINE, "phrases": [{"span": [3, 3], "boxes": [[0, 0, 1, 1]]}]}, "no part of"),
        ({**LINE, "phrases": [{"words": "car", "boxes": [[4, 0, 1, 1]]}]}, "has no extent"),
        ({**LINE, "phrases": [{"words": "car", "boxes": [[4, 0, 1]]}]}, "boxes"),
        ({**LINE, "phrases": [{"words": "car", "box": [4, 0, 1, 3]}]}, "Did you mean 'boxes'"),
        ({**LINE, "phrases": [{"words": "car", "segmentations": [[]]}]}, "is empty"),
        ({**LINE, "image": "/etc/a.jpg"}, "stay within the folder"),
        ({**LINE, "image": "b.jpg"}, r"with missing images \(b.jpg\)"),
    ],
)
def test_what_is_wrong_in_a_line_is_told(tmp_path, line, message):
    images = pictures(tmp_path / "images", "a.jpg")
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(ConfigError, match=message):
        read_phrases(write(tmp_path / "p.jsonl", text + "\n"), images)


def test_other_files_and_folders_are_refused_with_what_is_known(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    for name, content in (("a.txt", "x"), ("a.json", {"x": 1}), ("b.json", [1]), ("c.json", [])):
        with pytest.raises(ConfigError, match=r"no known layout.*RefCOCO.*jsonl"):
            read_phrases(write(tmp_path / name, content), images)
    with pytest.raises(ConfigError, match="no folder of pictures"):
        read_phrases(tmp_path / "a.json", tmp_path / "gone")
    with pytest.raises(ConfigError, match="cannot read"):
        read_phrases(tmp_path / "gone.json", images)
    with pytest.raises(ConfigError, match="holds no text with an area"):
        read_phrases(write(tmp_path / "d.json", {"images": [], "annotations": []}), images)
    with pytest.raises(ConfigError, match="limit must be an int of 1 or more"):
        read_phrases(tmp_path / "a.json", images, limit=0)


def test_samples_of_one_name_get_names_of_their_own(tmp_path):
    images = pictures(tmp_path / "images", "a.jpg")
    lines = "".join(json.dumps({**LINE, "id": "x"}) + "\n" for _ in range(2))
    keys = [each.key for each in read_phrases(write(tmp_path / "p.jsonl", lines), images)]
    assert keys == ["x", "x#2"]


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("woman left of the dog", "woman left"),
        ("The man in a red shirt", "man"),
        ("guy holding a bat", "guy"),
        ("second bike from right", "second bike"),
        ("a tall building", "tall building"),
        ("person who is standing", "person"),
        ("on the left", "left"),
        ("the clock is green", "clock"),
        ("T-shirt of the child's father", "T-shirt"),
        ("of the", "of the"),
        ("!!", ""),
    ],
)
def test_a_referring_expression_is_about_what_stands_first(text, head):
    assert " ".join(text[slice(*span)] for span in head_spans(text)) == head


def test_articles_and_prepositions_name_nothing():
    text = "the red car of a man"
    assert [text[slice(*span)] for span in naming_spans(text)] == ["red", "car", "man"]
    assert [text[slice(*span)] for span in naming_spans(text, 8, 20)] == ["car", "man"]
