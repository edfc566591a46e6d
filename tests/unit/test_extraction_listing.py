"""Which pictures a folder, a list or an archive holds, and by which names."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffenc.errors import ConfigError, ImageError, MissingExtraError, PromptError
from diffenc.extraction.listing import is_collection, list_pictures, missing_files
from diffenc.inputs.images import load_image


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), color).save(file, "PNG")
    return file.getvalue()


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def add(archive, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def test_a_folder_is_searched_in_the_order_of_names_for_pictures_alone(tmp_path):
    for name in ("b.JPG", "a b.png", "sub/ü\n.webp", "sub/deep/1.tif", ".hidden.png", ".git/x.png"):
        put(tmp_path / name, png("red"))
    for name in ("readme.txt", "labels.json", "sub/noending"):
        put(tmp_path / name)
    listing = list_pictures(tmp_path)
    assert listing.ids == ["a b.png", "b.JPG", "sub/deep/1.tif", "sub/ü\n.webp"]
    assert listing.left_alone == 3
    assert load_image(listing.picture(3)).size == (9, 7)


def test_a_folder_that_leads_into_itself_ends(tmp_path):
    put(tmp_path / "a/1.png")
    (tmp_path / "a/up").symlink_to(tmp_path)
    put(tmp_path / "elsewhere/2.png")
    (tmp_path / "a/other").symlink_to(tmp_path / "elsewhere")
    ids = list_pictures(tmp_path).ids
    assert sorted(Path(name).name for name in ids) == ["1.png", "2.png"]


def test_names_that_are_no_unicode_are_spelled_out_and_found(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    put(tmp_path / name, png("blue"))
    listing = list_pictures(tmp_path)
    assert listing.ids == ["caf\\xe9.png"]
    assert load_image(listing.picture(0)).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("names", [[], ["notes.txt", "video.mp4"]])
def test_a_folder_without_pictures_says_so(tmp_path, names):
    for name in names:
        put(tmp_path / name)
    with pytest.raises(ConfigError, match=f"holds no pictures: none of its {len(names)} files"):
        list_pictures(tmp_path)


def write_list(path, rows):
    if path.suffix == ".csv":
        names = list(rows[0])
        quoted = [names, *([str(row[name]) for name in names] for row in rows)]
        lines = [
            ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) for cells in quoted
        ]
        path.write_text("\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_list_gives_paths_beside_it_texts_and_names(tmp_path, ending):
    put(tmp_path / "pics/a.png", png("red"))
    outside = tmp_path / "elsewhere.png"
    put(outside, png("blue"))
    rows = [
        {"image": "pics/a.png", "question": 'what, "exactly"?', "key": "one"},
        {"image": str(outside), "question": "", "key": "two"},
        {"image": "pics/a.png", "question": "näch\nste", "key": "three"},
    ]
    path = tmp_path / f"list{ending}"
    write_list(path, rows)
    listing = list_pictures(path, prompt_column="question", id_column="key")
    assert listing.ids == ["one", "two", "three"]
    assert listing.prompts == ['what, "exactly"?', "", "näch\nste"]
    colors = [load_image(listing.picture(place)).getpixel((0, 0)) for place in range(3)]
    assert colors == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    with pytest.raises(
        ConfigError, match=r"names pics/a.png twice, as pictures 1 and 3.*id-column"
    ):
        list_pictures(path)


def test_a_text_file_lists_a_path_per_line(tmp_path):
    (tmp_path / "list.txt").write_bytes("a.png\r\n\nü b.png\n".encode())
    assert list_pictures(tmp_path / "list.txt").ids == ["a.png", "ü b.png"]


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        (
            "l.csv",
            "path,text\na.png,b",
            ConfigError,
            r"no column 'image'; its columns are \['path'",
        ),
        ("l.csv", "image,text\na.png", ConfigError, "line 2 has 1 values for 2 columns"),
        ("l.csv", "image,image,text\na,b,c", ConfigError, "has the column 'image' twice"),
        ("l.csv", "image,text\n", ConfigError, "lists no pictures"),
        ("l.csv", "", ConfigError, "no column 'image'"),
        ("l.jsonl", '{"image": "a.png"}\n', ConfigError, "has no column 'text'"),
        ("l.jsonl", '{"image": "a", "text": "b"}\n{"image": "c"}', PromptError, "line 2: 'text'"),
        ("l.jsonl", '{"image": 3, "text": "b"}', ConfigError, "line 1: the path in 'image' is no"),
        ("l.jsonl", '{"image": {"bytes": ""}, "text": ""}', ConfigError, "pictures, not paths"),
        ("l.jsonl", "{", ConfigError, "line 1 is no JSON"),
        ("l.parquet", "PAR1", ConfigError, "cannot read"),
        ("l.txt", "a.png", ConfigError, "without columns"),
    ],
)
def test_a_list_that_cannot_be_read_says_where(tmp_path, name, text, error, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        list_pictures(tmp_path / name, prompt_column="text")


def test_a_parquet_list_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "l.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffenc\[parquet\]'"):
        list_pictures(tmp_path / "l.parquet")


def test_an_archive_gives_its_pictures_in_place_with_the_texts_beside_them(tmp_path):
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "b.jpg", png("red"))
        add(archive, "b.txt", b"a red one\n")
        add(archive, "b.json", b"{}")
        add(archive, "dir/a.x.png", png("blue"))
        add(archive, "dir/a.txt", "ein blaues ü".encode())
        add(archive, "._b.jpg", b"resource fork")
        folder = tarfile.TarInfo("c.png")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    listing = list_pictures(path, prompt_column="txt")
    assert listing.ids == ["b.jpg", "dir/a.x.png"]
    assert listing.prompts == ["a red one", "ein blaues ü"]
    assert load_image(listing.picture(1)).getpixel((0, 0)) == (0, 0, 255)
    assert list_pictures(path).left_alone == 4
    with pytest.raises(PromptError, match=r"b.jpg in .* has no text beside it: there is no b.cap"):
        list_pictures(path, prompt_column="cap")


def test_a_picture_in_an_archive_gets_the_text_of_its_own_name_alone(tmp_path):
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("v1.0.png", "v1.1.png", "cat.png", "dog.left.png", "dog.right.png", "b.jpg"):
            add(archive, name, png("red"))
        for name in ("v1.0", "v1.1", "cat", "cat.de", "dog", "b.jpg"):
            add(archive, f"{name}.txt", f"of {name}".encode())
    prompts = list_pictures(path, prompt_column="txt").prompts
    assert prompts == ["of v1.0", "of v1.1", "of cat", "of dog", "of dog", "of b.jpg"]
    with tarfile.open(path, "w") as archive:
        add(archive, "v1.0.png", png("red"))
        add(archive, "v1.1.txt", b"of another picture")
    with pytest.raises(PromptError, match=r"there is no v1.0.txt and no v1.0.png.txt and no v1.tx"):
        list_pictures(path, prompt_column="txt")


@pytest.mark.parametrize(
    ("mode", "names", "message"),
    [
        ("w:gz", ["a.png"], "is compressed.*as gunzip does"),
        ("w", ["a.png", "b.png", "a.png"], "names a.png twice, as pictures 1 and 3"),
        ("w", ["a.txt"], "holds no pictures: none of its 1 files"),
    ],
)
def test_an_archive_that_cannot_be_read_in_place_says_why(tmp_path, mode, names, message):
    path = tmp_path / "some.tar"
    with tarfile.open(path, mode) as archive:
        for name in names:
            add(archive, name, png("red"))
    with pytest.raises(ConfigError, match=message):
        list_pictures(path)


def test_an_archive_that_is_cut_off_or_none_is_told(tmp_path):
    path = tmp_path / "some.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", png("red"))
        add(archive, "b.png", np.random.default_rng(0).bytes(50_000))
    whole = path.read_bytes()
    path.write_bytes(whole[:20_000])
    with pytest.raises(ConfigError, match=r"no whole .tar file"):
        list_pictures(path)
    path.write_bytes(whole)
    listing = list_pictures(path)
    path.write_bytes(whole[:20_000])
    with pytest.raises(ImageError, match=r"b.png in .*: it is cut off"):
        listing.picture(1)
    path.write_bytes(b"no archive at all" * 99)
    with pytest.raises(ConfigError, match=r"no whole .tar file"):
        list_pictures(path)


def test_what_is_listed_and_missing_is_known_beforehand(tmp_path):
    put(tmp_path / "a.png", png("red"))
    (tmp_path / "list.txt").write_text("a.png\ngone.png\n")
    assert missing_files(list_pictures(tmp_path / "list.txt")) == {
        1: f"no such image file: {tmp_path / 'gone.png'}"
    }


def test_a_digest_tells_names_and_texts_and_their_order_apart(tmp_path):
    digests = set()
    for rows in (
        [("a", "x"), ("b", "y")],
        [("b", "y"), ("a", "x")],
        [("a", "y"), ("b", "x")],
        [("ax", ""), ("b", "y")],
        [("a", "x")],
    ):
        write_list(tmp_path / "l.csv", [{"image": name, "text": text} for name, text in rows])
        digests.add(list_pictures(tmp_path / "l.csv", prompt_column="text").digest())
    assert len(digests) == 5


def test_columns_are_refused_where_there_are_none(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="is a folder, which has no column 'text'"):
        list_pictures(tmp_path, prompt_column="text")
    with pytest.raises(ConfigError, match="is no list, and has no column 'key'"):
        list_pictures(tmp_path, id_column="key")
    with pytest.raises(ConfigError, match="is no list, and has no column 'path'"):
        list_pictures(tmp_path, image_column="path")
    for column in ("prompt_column", "image_column", "id_column"):
        with pytest.raises(ConfigError, match="pictures alone have no column 'text'"):
            list_pictures([tmp_path / "a.png"], **{column: "text"})
    (tmp_path / "a.txt").write_text("a.png\n")
    with pytest.raises(ConfigError, match="is a list of paths without columns"):
        list_pictures(tmp_path / "a.txt", image_column="path")
    with pytest.raises(ConfigError, match="there is no such list"):
        list_pictures(tmp_path / "no.csv")
    with pytest.raises(ConfigError, match="there are no pictures"):
        list_pictures([])


def test_collections_are_told_from_pictures_by_their_looks(tmp_path):
    assert [
        is_collection(tmp_path / name) for name in ("", "a.CSV", "a.tar", "a.txt", "a.png", "a")
    ] == [True, True, True, True, False, False]
