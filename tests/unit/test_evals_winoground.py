import json
import shutil
import zipfile

import numpy as np
import pytest

from diffenc.errors import ConfigError, MissingExtraError
from diffenc.evals import files as files_module
from diffenc.evals import load_winoground, winoground_from_rows
from evals_data import (
    CAPTIONS,
    color,
    encoded,
    picture,
    winoground_jsonl,
    winoground_rows,
    write_csv,
    write_jsonl,
    write_pictures,
)


def check(benchmark, *, labels=True, exact=True):
    """All items are there, with the right pictures in the right order."""
    assert benchmark.problems == ()
    assert [item.id for item in benchmark.items] == ["0", "1", "2"]
    for index, item in enumerate(benchmark.items):
        assert item.captions == CAPTIONS[index]
        for k, each in enumerate(item.pictures):
            found = each.open()
            assert (found.mode, found.size) == ("RGB", (24, 16))
            near = 0 if exact else 3
            assert all(
                abs(a - b) <= near
                for a, b in zip(found.getpixel((5, 5)), color(index, k), strict=True)
            )
    if labels:
        assert [item.labels["collapsed_tag"] for item in benchmark.items] == [
            ("Object",),
            ("Relation",),
            ("Both",),
        ]
        assert [item.labels["num_main_preds"] for item in benchmark.items] == [
            ("1",),
            ("2",),
            ("1",),
        ]
        assert "secondary_tag" in benchmark.items[0].labels
        assert "secondary_tag" not in benchmark.items[1].labels


@pytest.mark.parametrize("name", ["examples.jsonl", "metadata.jsonl"])
def test_json_lines_with_pictures_by_stem(tmp_path, name):
    check(load_winoground(winoground_jsonl(tmp_path, name=name)))


def test_a_jpeg_copy(tmp_path):
    check(load_winoground(winoground_jsonl(tmp_path, suffix="jpg")), exact=False)


def test_of_a_png_and_a_jpeg_copy_the_png_is_taken(tmp_path):
    winoground_jsonl(tmp_path)
    write_pictures(tmp_path / "images_jpg", "jpg")
    check(load_winoground(tmp_path))


def test_the_hubs_folder_with_an_archive_of_pictures(tmp_path):
    source = winoground_jsonl(tmp_path / "source")
    data = tmp_path / "winoground/data"
    data.mkdir(parents=True)
    shutil.copy(source / "examples.jsonl", data)
    with zipfile.ZipFile(data / "images.zip", "w") as archive:
        for path in sorted((source / "images").iterdir()):
            archive.write(path, f"images/{path.name}")
            archive.writestr(f"__MACOSX/images/{path.name}", b"no picture")
    check(load_winoground(tmp_path / "winoground"))


def metadata_csv(folder):
    """The layout with relative paths, whose tags stand in a second table and a third file."""
    rows = winoground_rows(lambda index, k: f"images/ex_{index}_img_{k}.png")
    columns = ("id", "image_0", "image_1", "caption_0", "caption_1")
    write_csv(folder / "metadata.csv", [{c: row[c] for c in columns} for row in rows], bom=True)
    write_jsonl(folder / "examples.jsonl", winoground_rows(lambda index, k: f"ex_{index}_img_{k}"))
    (folder / "why_winoground_hard.json").write_text(
        json.dumps({"0": ["AmbiguouslyCorrect", "UnusualText"], "2": "NonCompositional"})
    )
    write_pictures(folder / "images")


def test_metadata_with_paths_and_extra_tags(tmp_path):
    metadata_csv(tmp_path / "winoground")
    for data in (tmp_path, tmp_path / "winoground"):
        benchmark = load_winoground(data)
        check(benchmark)
        assert [item.labels.get("hard") for item in benchmark.items] == [
            ("AmbiguouslyCorrect", "UnusualText"),
            None,
            ("NonCompositional",),
        ]


def test_the_same_inside_an_archive(tmp_path):
    metadata_csv(tmp_path / "winoground")
    archive = shutil.make_archive(tmp_path / "all", "zip", tmp_path, "winoground")
    check(load_winoground(archive))


def test_parquet_of_the_hub(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def cell(index, k):
        return {"bytes": encoded(picture(index, k), "png"), "path": f"ex_{index}_img_{k}.png"}

    (tmp_path / "data").mkdir()
    table = arrow.Table.from_pylist(winoground_rows(cell))
    parquet.write_table(
        table.slice(0, 2), tmp_path / "data/test-00000-of-00002.parquet", row_group_size=1
    )
    parquet.write_table(table.slice(2), tmp_path / "data/test-00001-of-00002.parquet")
    check(load_winoground(tmp_path))
    # a table without its pictures beside them does not win
    write_jsonl(tmp_path / "examples.jsonl", winoground_rows(lambda index, k: "gone"))
    check(load_winoground(tmp_path))
    (tmp_path / "data/test-00001-of-00002.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"cannot read .*00001-of-00002.*download it again"):
        load_winoground(tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"diffenc\[evals\]"):
        load_winoground(tmp_path)


@pytest.mark.parametrize(
    "cell",
    [picture, lambda i, k: {"bytes": encoded(picture(i, k), "png"), "path": None}],
    ids=["PIL", "bytes"],
)
def test_rows_in_memory(cell):
    check(winoground_from_rows(winoground_rows(cell)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "rows must be a list of tables, got NoneType"),
        ({"test": []}, "rows must be a list of tables, got dict with the keys .*test"),
        ([{1: 2}], "rows has no column 'id'"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        winoground_from_rows(rows)


def test_an_array_for_a_picture_is_told():
    rows = winoground_rows(lambda index, k: np.zeros((8, 8, 3), np.uint8))
    benchmark = winoground_from_rows(rows)
    assert {problem.kind for problem in benchmark.problems} == {"missing pictures"}


def test_names_of_columns_may_vary_and_extra_ones_are_told(tmp_path):
    names = {"image_0": "Image 0", "caption_1": "caption1", "id": "ID"}
    rows = [
        {**{names.get(key, key): value for key, value in row.items()}, "url": "x"}
        for row in winoground_rows(lambda index, k: f"ex_{index}_img_{k}")
    ]
    write_csv(tmp_path / "metadata.csv", rows)
    write_pictures(tmp_path / "images")
    benchmark = load_winoground(tmp_path)
    check(benchmark)
    notes = "; ".join(benchmark.notes)
    assert "column 'Image 0' is read as 'image_0'" in notes
    assert "columns ['url'] are not used" in notes


def test_a_renamed_column_is_refused_with_what_is_there(tmp_path):
    rows = [
        {"captoin_0" if key == "caption_0" else key: value for key, value in row.items()}
        for row in winoground_rows(lambda index, k: "")
    ]
    write_csv(tmp_path / "metadata.csv", rows)
    with pytest.raises(ConfigError, match=r"no column 'caption_0'.*Did you mean 'captoin_0'"):
        load_winoground(tmp_path)


def test_what_is_wrong_with_rows_is_collected(tmp_path):
    rows = winoground_rows(lambda index, k: f"ex_{index}_img_{k}")
    rows[1]["caption_1"] = " "
    del rows[2]["image_0"]
    write_jsonl(tmp_path / "examples.jsonl", [*rows, {**rows[0], "caption_0": "twice"}])
    with (tmp_path / "examples.jsonl").open("a") as file:
        file.write('{"id": 7, "image_0"\n[1]\n')
    write_pictures(tmp_path / "images")
    (tmp_path / "images/ex_0_img_1.png").unlink()
    benchmark = load_winoground(tmp_path)
    assert benchmark.items == ()
    found = {(problem.kind, problem.where, problem.detail) for problem in benchmark.problems}
    assert ("missing captions", "id 1", "caption_1") in found
    assert ("missing pictures", "id 2", "no value") in found
    assert ("missing pictures", "id 0", "ex_0_img_1") in found
    kinds = [problem.kind for problem in benchmark.problems]
    assert kinds.count("broken rows") == 2


def test_a_second_row_of_an_id_is_a_problem_and_the_first_is_kept(tmp_path):
    rows = winoground_rows(lambda index, k: f"ex_{index}_img_{k}")
    write_jsonl(tmp_path / "examples.jsonl", [*rows, {**rows[0], "caption_0": "twice"}])
    write_pictures(tmp_path / "images")
    benchmark = load_winoground(tmp_path)
    assert [problem.kind for problem in benchmark.problems] == ["ids that occur twice"]
    assert [item.captions for item in benchmark.items] == CAPTIONS


def test_csv_rows_of_another_length_are_problems(tmp_path):
    write_csv(tmp_path / "metadata.csv", winoground_rows(lambda index, k: f"ex_{index}_img_{k}"))
    write_pictures(tmp_path / "images")
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("3,only,three\n\n")
    benchmark = load_winoground(tmp_path)
    assert [problem.detail for problem in benchmark.problems] == ["3 values for 9 columns"]
    assert len(benchmark.items) == 3


def test_what_is_no_winoground_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"is no Winoground: it holds none of metadata.csv"):
        load_winoground(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"neither a folder nor a .zip file"):
        load_winoground(tmp_path / "notes.txt")
    (tmp_path / "half.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match=r"no whole .zip file"):
        load_winoground(tmp_path / "half.zip")
    (tmp_path / "half.zip").unlink()
    (tmp_path / "metadata.csv").write_bytes(b"id,\xff\xfe\n")
    with pytest.raises(ConfigError, match="not in UTF-8"):
        load_winoground(tmp_path)


def test_nothing_is_downloaded(monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        raise FileNotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ConfigError, match=r"accept the terms.*hf download facebook/winoground"):
        load_winoground("facebook/winoground")
    assert asked == [("facebook/winoground", {"repo_type": "dataset", "local_files_only": True})]
    with pytest.raises(ConfigError, match="there is no 'winogrund' here"):
        load_winoground("winogrund")
    assert len(asked) == 1


def test_the_hubs_cache_is_read(tmp_path, monkeypatch):
    winoground_jsonl(tmp_path)
    monkeypatch.setattr(files_module, "cached_dataset", lambda repository: tmp_path)
    check(load_winoground("facebook/winoground"))
